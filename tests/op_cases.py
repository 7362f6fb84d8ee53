"""The cases of the ops' tests: shapes and types, the tensors for them, and layouts. One table for all backends.

Each case names the backends that run it. "cuda" are the CUDA kernels in the host emulator, "triton" the Triton kernels in
Triton's interpreter. Both are a thousand times slower than a GPU, so they leave out what is large and shows nothing new.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iin_fast.ops.flow import pack
from iin_fast.ops.spline_coupling import PARAMETERIZATIONS, parameter_count
from iin_fast.ops.spline_coupling import TAILS as TAIL_CODES
from iin_fast.ops.types import FLOATING, accumulator_type

__all__ = [
    "ALIGNED_FLOW",
    "SMALL_FLOW",
    "AFFINE_COUPLING",
    "BACKEND",
    "DEFINED",
    "DTYPES",
    "FLOW",
    "FLOW_BOUNDS",
    "FORMS",
    "LAYOUTS",
    "LONGEST_SUM",
    "LONG_ROWS",
    "SUM_UNITS",
    "PAIR_NLL",
    "SPLINE_COUPLING",
    "SPLINE_ENDS",
    "SPLINE_NOT_FINITE",
    "SPLINE_STRONG",
    "TAILS",
    "FlowShape",
    "cases",
    "coupling_inputs",
    "environment",
    "few",
    "flow_inputs",
    "pair_inputs",
    "rows_apart",
    "spline_inputs",
]

BACKEND = os.environ.get("IIN_FAST_BACKEND") or "cpp"
"""The backend that this process tests. tests/backends/test_triton.py runs tests marked "triton" with that one."""

DEFINED = [BACKEND] if BACKEND == "triton" else [BACKEND, "reference"]
"""The backend, and the definition: tests on the C++ code have checked that by the time Triton's interpreter is at it."""

DTYPES = list(FLOATING)
TAILS = list(TAIL_CODES)
FORMS = list(PARAMETERIZATIONS)
ALL = "cpp cuda triton"

# [batch, features], or any shape
AFFINE_COUPLING = {
    (0, 4): ALL,
    (4, 0): ALL,
    (1, 1): ALL,
    (5, 1): "cpp cuda",
    (1, 64): "cpp",
    (2, 3): "cpp cuda",
    (9, 8): "cpp cuda",
    (7, 31): ALL,
    (25, 32): ALL,
    (19, 70): "cpp cuda",
    (130, 70): "cpp",
    (3, 1000): "cpp triton",
    (5,): "cpp",
    (3, 4, 5, 6): "cpp",
}

# Long rows: with CUDA a block a row, in vectors and not, and several blocks a row; with Triton several programs a row.
LONG_ROWS = {(3, 1024): "cuda", (2, 1001): "cuda", (2, 10_001): "triton", (1, 40_000): "cpp cuda"}

# The most terms of a sum, and how many units of the last place it may be off where torch.sum is right: the interpreter adds
# the columns of a tile as numpy does, 16 of them one by one.
LONGEST_SUM = {"cpp": 1_000_000, "cuda": 200_000, "triton": 80_000}
SUM_UNITS = {"cpp": 1, "cuda": 1, "triton": 4}

# batch, sizes of the factors
PAIR_NLL = {
    (0, (4,)): ALL,
    (3, ()): "cpp cuda",
    (1, (1,)): ALL,
    (1, (3, 1)): "cpp cuda",
    (7, (3, 4, 5)): ALL,
    (25, (22, 11, 31)): ALL,
    (9, (16, 16, 32)): "cpp cuda",
    (20, (70,)): "cpp cuda",
    (130, (70,)): "cpp",
    (3, (0, 600, 1)): "cpp triton",
    (3, (0, 600, 0, 0, 8)): "cpp cuda",
    (2, (1000, 1000, 48)): "cpp cuda",
    (2, (1,) * 9): "cpp cuda",
    # more factors than a launch takes, some of no element, a launch of none, and one that is long
    (3, (2, 0, 1, 3) * 16 + (0,) * 64 + (1, 2) * 10 + (9000, 3)): "cpp triton",
}

# rows, features, bins: no element, one, tiles of several rows, of one, and of a part of one
SPLINE_COUPLING = {
    (0, 4, 8): ALL,
    (5, 0, 8): ALL,
    (1, 1, 1): ALL,
    (7, 3, 2): ALL,
    (45, 1, 8): "cpp cuda",
    (33, 2, 5): ALL,
    (5, 17, 8): "cpp triton",
    (25, 32, 8): "cpp cuda",
    (2, 1, 64): "cpp triton",
    (3, 70, 10): "cpp cuda",
    (2, 300, 4): ALL,
}

# Of tests/spline_cases.py. bins, bound: the ends of the box. "cuda16": the CUDA kernels in types of 16 bits, which do not hold 0.7
SPLINE_ENDS = {
    **{(bins, 3.0): "cpp cuda cuda16" for bins in (1, 2, 8, 64)},
    **{(bins, 0.7): "cpp cuda" for bins in (1, 2, 8, 64)},
    (5, 0.7): "triton",
}
# bins, rows: what is not finite
SPLINE_NOT_FINITE = {
    (1, 300): "cpp cuda",
    (2, 300): "cpp cuda",
    (8, 300): "cpp cuda",
    (1, 40): "triton",
    (3, 200): "triton",
}
# rows: strong raw values
SPLINE_STRONG = {60_000: "cpp", 2000: "cuda", 500: "triton"}


class FlowShape(NamedTuple):
    """``contexts``: 1, or n_flows if each block has a context of its own."""

    batch: int
    dim: int
    n_flows: int
    hidden: int
    depth: int
    context_dim: int = 0
    contexts: int = 1


# Tails of every kind of vector and of the last panel, chunks of rows beyond one, nets that threads share and nets that they
# don't; with CUDA and Triton tiles of every kind.
SMALL_FLOW = FlowShape(7, 5, 3, 17, 2, 3, 3)
ALIGNED_FLOW = FlowShape(32, 64, 1, 128, 1)  # no tile has a rest; takes long in the emulator, where some tests name it
FLOW = {
    FlowShape(0, 4, 1, 8, 1): ALL,
    FlowShape(1, 2, 1, 1, 0): ALL,
    SMALL_FLOW: ALL,
    FlowShape(33, 9, 2, 70, 1, 2): ALL,
    FlowShape(130, 8, 2, 16, 1): ALL,
    FlowShape(131, 7, 1, 65, 1, 4): "cpp cuda",
    FlowShape(3, 140, 1, 8, 1): ALL,
    FlowShape(19, 16, 2, 24, 1): "cuda",  # all rows of tiles begin at multiples of 16 bytes
    FlowShape(129, 133, 1, 12, 0, 1): "cpp cuda",
    ALIGNED_FLOW: "cpp",
    FlowShape(1, 2, 2, 1, 0): "cpp",
    FlowShape(1, 2, 1, 17, 1): "cpp",
    FlowShape(2, 3, 2, 17, 1): "cpp",
    FlowShape(7, 7, 3, 70, 2, 5, 3): "cpp",
    FlowShape(25, 64, 2, 130, 1): "cpp",
    FlowShape(130, 8, 2, 64, 2, 3): "cpp",
    FlowShape(50, 64, 1, 530, 1): "cpp",  # more inputs than a block of weights holds
    FlowShape(2, 33, 1, 512, 0): "cpp",
    FlowShape(1000, 5, 2, 40, 3): "cpp",
    FlowShape(300, 9, 2, 130, 1, 4, 2): "cpp",
    FlowShape(20, 150, 1, 33, 1, 70): "cpp",
}

# How far outputs and gradients may be from the definition in float64, in the norm: rounding takes single hidden units across
# the kink of their LeakyReLU. TF32 keeps as many bits of a factor as float16.
FLOW_BOUNDS = {torch.float32: (2e-6, 1e-5), torch.float16: (5e-3, 5e-2), torch.bfloat16: (5e-2, 3e-1)}


def cases(table: dict[Any, str], backend: str = BACKEND) -> list[Any]:
    """The cases of a table that ``backend`` runs."""
    return [case for case, backends in table.items() if backend in backends]


def few(values: Iterable[Any], count: int = 1) -> list[Any]:
    """All of them, or the first ones in the interpreter: for what the other tests show for each already."""
    return list(values)[: count if BACKEND == "triton" else None]


def environment(isa: str) -> dict[str, str]:
    """For a process that imports what this one does, with an instruction set of its own."""
    return {**os.environ, "IIN_FAST_CPU": isa, "PYTHONPATH": os.pathsep.join(sys.path)}


def rows_apart(t: Tensor, columns: int = 3) -> Tensor:
    """``t`` with rows further apart than they are long, the first of them not at the start of its memory."""
    return torch.nn.functional.pad(t, (columns, columns + 1), value=torch.nan)[..., columns : columns + t.shape[-1]]


# The same [rows, columns] with other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": rows_apart,
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "columns first": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


def normal(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """The same numbers for every type."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def coupling_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, squash: str = "tanh", scale: float = 1.0
) -> list[Tensor | None]:
    """x, raw_scale and shift."""
    x, raw, shift = (scale * t for t in normal([shape] * 3, dtype))
    return [x, None if squash == "none" else raw, shift]


def pair_inputs(batch: int, sizes: Iterable[int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """za, zb, logdet_a and logdet_b; and shared."""
    sizes = list(sizes)
    tensors = [*normal([(batch, sum(sizes))] * 2, dtype), *normal([(batch,)] * 2, accumulator_type(dtype), seed=1)]
    return tensors, torch.rand(batch, len(sizes), generator=torch.Generator().manual_seed(0)) < 0.5


def spline_inputs(
    rows: int,
    features: int,
    bins: int,
    tails: str | None,
    dtype: torch.dtype = torch.float64,
    spread: float = 1.5,
    seed: int = 0,
    reach: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """x, a third of it outside of [-``reach``, ``reach``], and raw values of deviation ``spread``."""
    x, raw = normal([(rows, features), (rows, features, parameter_count(bins, tails))], torch.float64, seed)
    return (reach * x).to(dtype), (spread * raw).to(dtype)


def flow_inputs(
    shape: FlowShape | tuple[int, ...], dtype: torch.dtype = torch.float64, size: float = 1.0
) -> list[Tensor | None]:
    """The arguments of a flow whose nets have outputs of about ``size``, the same numbers for every type."""
    batch, dim, n_flows, hidden, depth, context_dim, contexts = FlowShape(*shape)
    generator = torch.Generator().manual_seed(dim * 1000 + hidden)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    half = dim - dim // 2
    inside = half + context_dim
    tensors = [
        randn(batch, dim),
        randn(contexts, batch, context_dim) if context_dim else None,
        0.3 * randn(n_flows, dim),
        (1 + 0.3 * torch.tanh(randn(n_flows, dim))) * randn(n_flows, dim).sign(),
        pack(randn(n_flows, 2, 2, hidden, inside) / inside**0.5),
        0.3 * randn(n_flows, 2, 2, hidden),
        pack(1.2 * randn(n_flows, 2, 2, depth, hidden, hidden) / hidden**0.5),
        0.3 * randn(n_flows, 2, 2, depth, hidden),
        pack(size * randn(n_flows, 2, 2, dim - half, hidden) / hidden**0.5),
        0.3 * size * randn(n_flows, 2, 2, dim - half),
    ]
    permutation = torch.stack([torch.randperm(dim, generator=generator) for _ in range(n_flows)])
    return [None if t is None else t.float().to(dtype) for t in tensors] + [permutation]
