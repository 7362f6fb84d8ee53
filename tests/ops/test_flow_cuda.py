"""The CUDA kernels of the flow, run on the host (tests/cuda_emulator), against the definition."""

import ctypes
from typing import Any

import pytest
import torch
from cuda_emulator import call, data, load, type_name
from torch import Tensor

from iin_fast.nn import Flow
from iin_fast.ops.flow import reference
from iin_fast.ops.flow.saved import saved_bytes
from iin_fast.testing.backends import relative_error

# batch, dim, n_flows, hidden, depth, context (0: none), contexts per block
SHAPES = [
    (0, 4, 1, 8, 1, 0, False),
    (1, 2, 1, 1, 0, 0, False),
    (7, 5, 3, 17, 2, 3, True),
    (33, 9, 2, 70, 1, 2, False),
    (130, 8, 2, 16, 1, 0, False),
    (131, 7, 1, 65, 1, 4, False),
    (3, 140, 1, 8, 1, 0, False),
    (129, 133, 1, 12, 0, 1, False),
]
ALIGNED = (40, 64, 2, 128, 2, 0, False)
TENSORS = (
    *("x", "context", "loc", "scale", "weight_in", "bias_in", "weight_hidden", "bias_hidden", "weight_out", "bias_out"),
    "permutation",
)


class FlowSizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("batch", "dim", "n_flows", "hidden", "depth", "context_dim", "contexts")
    ]


class FlowCall(ctypes.Structure):
    """FlowCall in tests/cuda_emulator/flow.cpp."""

    _fields_ = [
        ("sizes", FlowSizes),
        *((name, ctypes.c_void_p) for name in TENSORS),
        ("x_row", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("leaky_slope", "activation_slope")),
        *((name, ctypes.c_bool) for name in ("exact_logdet", "inverse", "save", "tf32")),
        *((name, ctypes.c_void_p) for name in ("y", "logdet")),
        *((name, ctypes.c_int64) for name in ("launches", "saved_bytes")),
    ]


def arguments(
    batch: int, dim: int, n: int, hidden: int, depth: int, width: int, own: bool, dtype: torch.dtype
) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    flow = Flow(dim, n, hidden, depth, context_dim=width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        assert flow.loc is not None
        flow.loc.normal_(generator=generator)
        flow.scale.uniform_(0.5, 2, generator=generator)
        flow.scale[:, 0] *= -1
    x = torch.randn(batch, 2 * dim, generator=generator, dtype=torch.float64)
    context = torch.randn(n if own else 1, batch, width, generator=generator, dtype=torch.float64) if width else None
    names = ("weight_in", "bias_in", "weight_hidden", "bias_hidden", "weight_out", "bias_out")
    tensors = [x, context, flow.loc, flow.scale, *(getattr(flow, name) for name in names)]
    given: list[Any] = [None if t is None else t.detach().to(dtype) for t in tensors]
    given[0] = given[0][:, :dim]  # rows further apart than they are long
    return [*given, flow.permutation]


def flow_call(given: list[Any], slope: float, exact: bool, inverse: bool, save: bool, tf32: bool) -> FlowCall:
    x, context, loc, *_ = given
    bias_in, bias_hidden = given[5], given[7]
    sizes = FlowSizes(
        *(len(x), x.shape[1], loc.shape[0], bias_in.shape[3], bias_hidden.shape[3]),
        *((0, 0) if context is None else (context.shape[2], context.shape[0])),
    )
    pointers = [ctypes.c_void_p(x.data_ptr()), *(data(t) for t in given[1:])]
    return FlowCall(sizes, *pointers, x.stride(0), 0.01, slope, exact, inverse, save, tf32)


def forward(
    given: list[Any],
    slope: float = 1.0,
    exact: bool = False,
    inverse: bool = False,
    save: bool = False,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, FlowCall]:
    x = given[0]
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    logdet = torch.full(x.shape[:1], torch.nan, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    c = flow_call(given, slope, exact, inverse, save, tf32)
    c.y, c.logdet = y.data_ptr(), logdet.data_ptr()
    call(load("flow").flow_forward, type_name(x.dtype), ctypes.byref(c))
    return y, logdet, c


def wide(given: list[Any]) -> list[Any]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in given]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_definition_in_float64(shape: tuple[Any, ...], inverse: bool) -> None:
    given = arguments(*shape, torch.float64)
    slope = 0.8 if shape[5] else 1.0
    expected = reference.flow(*given, 0.01, slope, True, inverse)
    for save in (False, True):
        y, logdet, c = forward(given, slope, True, inverse, save)
        for got, want in zip((y, logdet), expected, strict=True):
            assert relative_error(got, want) < 1e-12, (save, got.shape)
        if shape[0]:
            _, _, n, _, depth, *_ = shape
            assert c.launches == 2 * n * (depth + 2) + 3
        if save and shape[0]:
            assert c.saved_bytes == saved_bytes(given[0], shape[3], shape[4], shape[2], inverse)


@pytest.mark.parametrize(
    "dtype, tf32, bound",
    [
        (torch.float32, False, 2e-6),
        (torch.float32, True, 5e-3),
        (torch.float16, False, 5e-3),
        (torch.bfloat16, False, 5e-2),
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_other_types_judged_by_float64(dtype: torch.dtype, tf32: bool, bound: float, inverse: bool) -> None:
    for shape in (ALIGNED, *SHAPES[2:6]):
        given = arguments(*shape, dtype)
        # an exact log-det would jump where rounding takes a value across the kink of the activation
        judge = reference.flow(*wide(given), 0.01, 0.8, False, inverse)
        y, logdet, _ = forward(given, 0.8, False, inverse, tf32=tf32)
        for got, want in zip((y, logdet), judge, strict=True):
            assert (got.double() - want).norm() < bound * want.norm(), (shape, got.shape)
        if tf32 and shape == ALIGNED:
            assert (y.double() - judge[0]).norm() > 1e-5 * judge[0].norm()  # it is TF32 that multiplied


def test_the_published_size_in_float32() -> None:
    given = arguments(25, 64, 1, 512, 2, 0, False, torch.float32)
    judge, _ = reference.flow(*wide(given))
    plain, _ = reference.flow(*given)
    y, _, _ = forward(given)
    error = (y.double() - judge).norm()
    assert error < 2 * (plain.double() - judge).norm() + 1e-7 * judge.norm()  # as good as float32


@pytest.mark.parametrize("inverse", [False, True])
def test_a_wrong_permutation_stays_inside(inverse: bool) -> None:
    given = arguments(5, 4, 2, 8, 1, 0, False, torch.float32)
    given[-1] = torch.full_like(given[-1], 2**40)
    forward(given, inverse=inverse)


def test_the_same_bits_every_time() -> None:
    given = arguments(*ALIGNED, torch.float32)
    first, second = (forward(given) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
