"""pair_nll in Triton: forward and backward, one kernel each.

Bytes an element of the pair in float32: 8 forward (reads both samples), 16 backward (reads both, writes both gradients).
A program owns a tile of whole rows and walks their columns with the loss in registers; backward owns a tile of rows
and columns. Which factor a column belongs to comes from a table of ``dim`` indices that stays on the device.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    CompileCase,
    autotuned,
    bucket,
    ceil_div,
    launch,
    on_device,
    power_of_two,
    recorded,
    rows,
    sum_parts,
    tl_dtype,
    wide,
)

__all__ = ["compile_cases", "pair_nll", "pair_nll_backward"]

# 8 or 4 elements a thread, as in affine_coupling.
_CONFIGS = [
    triton.Config({"TILE": 2048}, num_warps=8, num_stages=1),
    triton.Config({"TILE": 1024}, num_warps=8, num_stages=1),
    triton.Config({"TILE": 512}, num_warps=4, num_stages=1),
]
_WIDEST = 512  # columns of a tile, at most the smallest tile


def _fitting(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """float64 with the smallest tile: the forward kernel spills in the others."""
    return configs[-1:] if constants.get("WIDE") == tl.float64 else configs


@triton.jit
def _shared(shared, factor, long_row, column, width, factors, valid, WIDE: tl.constexpr):
    """1 where the pair shares the column's factor, else 0."""
    k = tl.load(factor + column, mask=column < width, other=0)
    return tl.load(shared + long_row * factors + k, mask=valid, other=0).to(WIDE)


@autotuned(_CONFIGS, key=["width", "batch_bucket"], fitting=_fitting)
@triton.jit(do_not_specialize=["batch", "batch_bucket", "factors"])
def _forward(
    za,  # [batch, width], rows za_row apart
    zb,
    logdet_a,  # [batch]
    logdet_b,
    shared,  # [batch, factors] bytes
    factor,  # [width] int32
    loss,  # [parts, batch]
    batch,
    width,
    za_row,
    zb_row,
    logdet_a_row,
    logdet_b_row,
    factors,
    part,  # columns of a part
    batch_bucket,
    RHO: tl.constexpr,
    PER_ELEMENT: tl.constexpr,  # constants of an element, and of an element of a shared factor
    PER_SHARED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_R: tl.constexpr = TILE // BLOCK_N
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * part
    long_row = row.to(tl.int64)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_N], WIDE)
    for first in range(start, tl.minimum(start + part, width), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)[None, :]
        valid = (row < batch)[:, None] & (column < width)
        a = tl.load(za + long_row * za_row + column, mask=valid, other=0.0).to(WIDE)
        b = tl.load(zb + long_row * zb_row + column, mask=valid, other=0.0).to(WIDE)
        m = _shared(shared, factor, long_row, column, width, factors, valid, WIDE)
        difference = b - m * RHO * a
        energy = 0.5 * (a * a + difference * difference / (1 - m * (RHO * RHO))) + (PER_ELEMENT + m * PER_SHARED)
        total += tl.where(valid, energy, 0.0)
    result = tl.sum(total, 1)
    if tl.program_id(1) == 0:
        at = row.to(tl.int64)
        result -= tl.load(logdet_a + at * logdet_a_row, mask=row < batch, other=0.0).to(WIDE)
        result -= tl.load(logdet_b + at * logdet_b_row, mask=row < batch, other=0.0).to(WIDE)
    tl.store(loss + tl.program_id(1).to(tl.int64) * batch + row, result, mask=row < batch)


@autotuned(_CONFIGS, key=["width", "batch_bucket"])
@triton.jit(do_not_specialize=["batch", "batch_bucket", "factors"])
def _backward(
    grad,  # [batch]
    za,  # [batch, width], rows za_row apart
    zb,
    shared,  # [batch, factors] bytes
    factor,  # [width] int32
    grad_a,  # [batch, width], contiguous
    grad_b,
    batch,
    width,
    grad_row,
    za_row,
    zb_row,
    factors,
    batch_bucket,
    RHO: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_R: tl.constexpr = TILE // BLOCK_N
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = (row < batch)[:, None] & (column < width)
    long_row = row.to(tl.int64)[:, None]
    g = tl.load(grad + row.to(tl.int64) * grad_row, mask=row < batch, other=0.0).to(WIDE)[:, None]
    a = tl.load(za + long_row * za_row + column, mask=valid, other=0.0).to(WIDE)
    b = tl.load(zb + long_row * zb_row + column, mask=valid, other=0.0).to(WIDE)
    m = _shared(shared, factor, long_row, column, width, factors, valid, WIDE)
    pull = (b - m * RHO * a) / (1 - m * (RHO * RHO))
    out = long_row * width + column
    tl.store(grad_a + out, (g * (a - m * RHO * pull)).to(grad_a.dtype.element_ty), mask=valid)
    tl.store(grad_b + out, (g * pull).to(grad_b.dtype.element_ty), mask=valid)


@lru_cache(maxsize=64)
def _factor_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[dim] int32, the factor of each column; kept, since a copy to the device at every call would wait for it."""
    index = [k for k, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(index, dtype=torch.int32).to(device)


def pair_nll(
    za: Tensor,
    zb: Tensor,
    logdet_a: Tensor,
    logdet_b: Tensor,
    shared: Tensor,
    sizes: Sequence[int],
    rho: float,
    normalized: bool,
) -> Tensor:
    """As torch.ops.iin_fast.pair_nll: losses [batch]."""
    batch, width = za.shape
    loss = torch.empty(batch, dtype=logdet_a.dtype, device=za.device)
    if batch == 0:
        return loss
    if width == 0:
        return torch.sub(-logdet_a, logdet_b, out=loss)
    a, b = rows(za, batch, width), rows(zb, batch, width)
    per_element, per_shared = (math.log(2 * math.pi), 0.5 * math.log(1 - rho**2)) if normalized else (0.0, 0.0)
    block = min(power_of_two(width), _WIDEST)
    parts = max(1, min(width // 4096, ceil_div(1024, batch)))
    part = ceil_div(ceil_div(width, parts), block) * block
    parts = ceil_div(width, part)
    sums = loss if parts == 1 else loss.new_empty(parts, batch)
    with on_device(za):
        launch(
            _forward,
            lambda meta: (ceil_div(batch, meta["TILE"] // block), parts),
            *(a, b, logdet_a, logdet_b, shared.contiguous().view(torch.uint8), _factor_of(tuple(sizes), za.device)),
            *(sums, batch, width, a.stride(0), b.stride(0), logdet_a.stride(0), logdet_b.stride(0), len(sizes), part),
            bucket(batch),
            **dict(RHO=rho, PER_ELEMENT=per_element, PER_SHARED=per_shared, WIDE=tl_dtype(loss.dtype), BLOCK_N=block),
        )
        if parts > 1:
            sum_parts(sums, loss)
    return loss


def pair_nll_backward(
    grad: Tensor, za: Tensor, zb: Tensor, shared: Tensor, sizes: Sequence[int], rho: float
) -> tuple[Tensor, Tensor]:
    """As torch.ops.iin_fast.pair_nll_backward: gradients of za and zb, contiguous."""
    batch, width = za.shape
    grad_a, grad_b = (torch.empty(batch, width, dtype=za.dtype, device=za.device) for _ in range(2))
    if grad_a.numel() == 0:
        return grad_a, grad_b
    a, b = rows(za, batch, width), rows(zb, batch, width)
    block = min(power_of_two(width), _WIDEST)
    with on_device(za):
        launch(
            _backward,
            lambda meta: (ceil_div(batch, meta["TILE"] // block), ceil_div(width, block)),
            *(grad, a, b, shared.contiguous().view(torch.uint8), _factor_of(tuple(sizes), za.device), grad_a, grad_b),
            *(batch, width, grad.stride(0), a.stride(0), b.stride(0), len(sizes), bucket(batch)),
            **dict(RHO=rho, WIDE=tl_dtype(za.dtype), BLOCK_N=block),
        )
    return grad_a, grad_b


def compile_cases() -> list[CompileCase]:
    """The kernels of representative calls, for triton.compile: name, kernel, signature, constexprs, options."""
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for batch, sizes in ((25, [22, 11, 31]), (4096, [3, 4, 5]), (16, [60000, 5536])):
            z = torch.empty(batch, sum(sizes), dtype=dtype, device="meta")
            logdet = z.new_empty(batch, dtype=wide(dtype))
            shared = torch.empty(batch, len(sizes), dtype=torch.bool, device="meta")
            label = f"pair_nll {str(dtype).removeprefix('torch.')} [{batch}, {sum(sizes)}]"
            calls[label] = partial(pair_nll, z, z, logdet, logdet, shared, sizes, 0.975, True)
            calls[f"{label} backward"] = partial(pair_nll_backward, logdet, z, z, shared, sizes, 0.975)
    return recorded(calls)
