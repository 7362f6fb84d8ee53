"""Calls every op of the CUDA library past the dispatcher, with tensors of the CPU. Run with fake_gpu.c preloaded."""

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import iin_fast._library  # noqa: F401 (loads the ops)
from iin_fast.flow import NetBuilder, ProgramBuilder, Weights, affine
from iin_fast.flow.layers import Net

KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def call(op: str, *arguments: Any) -> Any:
    return getattr(torch.ops.iin_fast, op).default.redispatch(KEY, *arguments)


def net(dim: int, hidden: int, context: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of a flow with two layers of one hidden layer; dim is even."""
    half = dim // 2
    shapes = [(2, dim), (2, dim), (2, 2, 2, (half + context) * hidden), (2, 2, 2, hidden)]
    shapes += [(2, 2, 2, 1, hidden * hidden), (2, 2, 2, 1, hidden), (2, 2, 2, hidden * half), (2, 2, 2, half)]
    return [*(torch.ones(shape, dtype=dtype) for shape in shapes), torch.arange(dim).repeat(2, 1)]


def flow(
    rows: int, dtype: torch.dtype, tf32: bool = False, inverse: bool = False, context: int = 0, dim: int = 8
) -> None:
    x = torch.randn(rows, dim, dtype=torch.float64).to(dtype)
    given = torch.ones(1, rows, context, dtype=dtype) if context else None
    tensors = net(dim, 16, context, dtype)
    y, logdet, saved = call("flow", x, given, *tensors, 0.01, 1.0, False, inverse, 2, tf32)
    for kept, weights in itertools.product((saved, saved[:0]), (True, False)):
        call(
            *("flow_backward", y, logdet, y, kept, given, *tensors, 0.01, 1.0, inverse, 2),
            *(context > 0, weights, tf32),
        )


def others(rows: int, features: int, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, row = torch.ones(rows, features, dtype=dtype), torch.ones(rows, dtype=wide)
    shared = torch.ones(rows, 1, dtype=torch.bool)
    call("affine_coupling", x, x, x, 1, 1.0, False)
    call("affine_coupling_backward", x, row, x, x, 1, 1.0, False)
    call("pair_nll", x, x, row, row, shared, [features], 0.9, False)
    call("pair_nll_backward", row, x, x, shared, [features], 0.9)
    for bins in (2, 8, 5000 if features < 10 else 40):  # the last: too many for shared memory
        raw, spline = (
            torch.ones(rows, features, 3 * bins - 1, dtype=dtype),
            (bins, 0, 0, -1, 1, -1, 1, 1e-3, 1e-3, 1e-3),
        )
        for inverse in (False, True):
            call("spline_coupling", x, raw, None, None, *spline, inverse)
            call("spline_coupling_backward", x, row, x, raw, None, None, *spline, inverse)


def program(rows: int, dtype: torch.dtype, tf32: int = 0) -> None:
    """A coupling and an autoregressive layer, forward and back, and the sampling direction."""
    build = ProgramBuilder(4, 0)

    def ones(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=dtype)

    def dense(out: int, inputs: int, mask: Tensor | None = None) -> Net:
        net = NetBuilder()
        refs = build.ref(ones(out, inputs)), build.ref(ones(out))
        weights = Weights(out, *refs) if mask is None else Weights(out, *refs, build.ref(mask))
        return net.build(net.dense(0, weights))

    build.affine(build.ref(ones(4)), build.ref(ones(4)))
    build.coupling((0, 1), (2, 3), dense(4, 2), affine(2, "tanh"))
    build.autoregressive(dense(8, 4, torch.ones(4, 4, dtype=dtype).tril(-1).repeat(2, 1)), affine(4, "tanh"))
    text, tensors, x = build.build().text, list(build.tensors), torch.randn(rows, 4, dtype=dtype)
    y, logdet, saved = call("flow_program", x, None, tensors, text, False, True, 2, tf32)
    wanted = "1" * len(tensors)
    call("flow_program_backward", y, logdet, x, saved, None, tensors, text, False, True, 2, False, wanted, tf32)
    call("flow_program", x, None, tensors, text, True, False, 0, tf32)


def everything() -> None:
    for rows in (5, 3000):
        program(rows, torch.float64)
        for products in (0, 1, 3):
            program(rows, torch.float32, products)
    for dtype in DTYPES:
        turns = (False, True)
        for rows, tf32, inverse, context, dim in itertools.product((5, 300), turns, turns, (0, 3), (6, 16)):
            flow(rows, dtype, tf32, inverse, context, dim)  # rows of 3 features begin anywhere, those of 8 at 16 bytes
        for rows, features in ((3, 7), (64, 64), (1, 100004)):
            others(rows, features, dtype)


def wide_nets() -> None:
    for dtype, tf32, rows in itertools.product(DTYPES[1:], (False, True), (2048, 2049)):  # large tiles, small ones
        x = torch.ones(rows, 16, dtype=dtype)
        call("flow", x, None, *net(16, 256, 0, dtype), 0.01, 1.0, False, False, 2, tf32)


def one() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    y, logdet = call("affine_coupling", x, x, x, 1, 1.0, False)
    print(x.data_ptr(), y.data_ptr(), logdet.data_ptr())


def in_a_thread() -> None:
    """A thread has no current context until something makes one current."""
    one()
    thread = threading.Thread(target=one)
    thread.start()
    thread.join()


CALLS: dict[str, Callable[[], None]] = {
    "everything": everything,
    "one": one,
    "in_a_thread": in_a_thread,
    "wide nets": wide_nets,
    "few rows": lambda: flow(5, torch.float32),
}

if __name__ == "__main__":
    CALLS[sys.argv[1]]()
