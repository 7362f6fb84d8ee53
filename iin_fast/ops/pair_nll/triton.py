"""pair_nll in Triton: forward and backward, one kernel each.

Bytes an element of the pair in float32: 8 forward (reads both samples), 16 backward (reads both, writes both gradients).
A program owns a tile of whole rows and walks their columns with the loss in registers; backward owns a tile of rows
and columns. The ends of the factors travel as kernel arguments, 64 a launch, so that nothing is copied to the device and a
call can be captured in a graph; more factors take one launch for each 64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    CompileCase,
    add_term,
    autotuned,
    bucket,
    ceil_div,
    compensated,
    launch,
    on_device,
    power_of_two,
    recorded,
    rows,
    strided,
    sum_parts,
    tile_of,
    tiles,
    tl_dtype,
)
from ..types import accumulator_type

__all__ = ["compile_cases", "pair_nll", "pair_nll_backward"]

# 8 or 4 elements a thread, as in affine_coupling.
_CONFIGS = [
    triton.Config({"TILE": 2048}, num_warps=8, num_stages=1),
    triton.Config({"TILE": 1024}, num_warps=8, num_stages=1),
    triton.Config({"TILE": 512}, num_warps=4, num_stages=1),
]
_WIDEST = 512  # columns of a tile, at most the smallest tile
FACTORS_PER_LAUNCH = 64


def _fitting(configs: list[triton.Config], _: dict[str, Any], *, WIDE: Any, **__: Any) -> list[triton.Config]:
    """float64 with the smallest tile: the forward kernel spills in the others."""
    return configs[-1:] if WIDE == tl.float64 else configs


@triton.jit
def _shared(shared, ends, long_row, column, shared_row, valid, WIDE: tl.constexpr):
    """1 where the pair shares the column's factor, else 0."""
    k = tl.zeros_like(column)
    for i in tl.static_range(len(ends)):
        k += (column >= ends[i]).to(column.dtype)
    return tl.load(shared + long_row * shared_row + k, mask=valid, other=0).to(WIDE)


@triton.jit
def _difference_and_precision(a, b, m, REST: tl.constexpr, INVERSE_VARIANCE: tl.constexpr):
    """b - m rho a, whose first difference is exact where b is near a, and 1 / (1 - m rho²)."""
    return (b - m * a) + m * REST * a, m * INVERSE_VARIANCE + (1 - m)


@autotuned(_CONFIGS, key=["width", "batch_bucket"], fitting=_fitting)
@triton.jit(do_not_specialize=["batch", "batch_bucket", "shared_row"])
def _forward(
    za,  # [batch, width], rows za_row apart
    zb,
    logdet_a,  # [batch]
    logdet_b,
    shared,  # [batch, len(ends)] bytes, rows shared_row apart
    ends,  # column behind the last one of each factor
    loss,  # [parts, batch]
    batch,
    width,
    za_row,
    zb_row,
    logdet_a_row,
    logdet_b_row,
    shared_row,
    part,  # columns of a part
    batch_bucket,
    REST: tl.constexpr,  # 1 - rho, and 1 / (1 - rho²)
    INVERSE_VARIANCE: tl.constexpr,
    PER_ELEMENT: tl.constexpr,  # constants of an element, and of an element of a shared factor
    PER_SHARED: tl.constexpr,
    LOGDETS: tl.constexpr,  # whether this launch brings them
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_R: tl.constexpr = TILE // BLOCK_N
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * part
    long_row = row.to(tl.int64)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_N], WIDE)
    lost = tl.zeros([BLOCK_R, BLOCK_N], WIDE)
    for first in range(start, tl.minimum(start + part, width), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)[None, :]
        valid = (row < batch)[:, None] & (column < width)
        a = tl.load(za + long_row * za_row + column, mask=valid, other=0.0).to(WIDE)
        b = tl.load(zb + long_row * zb_row + column, mask=valid, other=0.0).to(WIDE)
        m = _shared(shared, ends, long_row, column, shared_row, valid, WIDE)
        difference, precision = _difference_and_precision(a, b, m, REST, INVERSE_VARIANCE)
        energy = 0.5 * (a * a + difference * difference * precision) + (PER_ELEMENT + m * PER_SHARED)
        total, lost = add_term(total, lost, tl.where(valid, energy, 0.0))
    result = tl.sum(compensated(total, lost), 1)
    if LOGDETS and tl.program_id(1) == 0:
        at = row.to(tl.int64)
        result -= tl.load(logdet_a + at * logdet_a_row, mask=row < batch, other=0.0).to(WIDE)
        result -= tl.load(logdet_b + at * logdet_b_row, mask=row < batch, other=0.0).to(WIDE)
    tl.store(loss + tl.program_id(1).to(tl.int64) * batch + row, result, mask=row < batch)


@autotuned(_CONFIGS, key=["width", "batch_bucket"])
@triton.jit(do_not_specialize=["batch", "batch_bucket", "shared_row"])
def _backward(
    grad,  # [batch]
    za,  # [batch, width], rows za_row apart
    zb,
    shared,  # [batch, len(ends)] bytes, rows shared_row apart
    ends,  # column behind the last one of each factor
    grad_a,  # [batch, width], rows grad_a_row apart, as grad_b
    grad_b,
    batch,
    width,
    grad_row,
    za_row,
    zb_row,
    grad_a_row,
    shared_row,
    batch_bucket,
    RHO: tl.constexpr,
    REST: tl.constexpr,  # 1 - rho, and 1 / (1 - rho²)
    INVERSE_VARIANCE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_R: tl.constexpr = TILE // BLOCK_N
    row_tile, column_tile = tile_of(width, BLOCK_N)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = (row < batch)[:, None] & (column < width)
    long_row = row.to(tl.int64)[:, None]
    g = tl.load(grad + row.to(tl.int64) * grad_row, mask=row < batch, other=0.0).to(WIDE)[:, None]
    a = tl.load(za + long_row * za_row + column, mask=valid, other=0.0).to(WIDE)
    b = tl.load(zb + long_row * zb_row + column, mask=valid, other=0.0).to(WIDE)
    m = _shared(shared, ends, long_row, column, shared_row, valid, WIDE)
    difference, precision = _difference_and_precision(a, b, m, REST, INVERSE_VARIANCE)
    pull = difference * precision
    out = long_row * grad_a_row + column
    tl.store(grad_a + out, (g * (a - m * RHO * pull)).to(grad_a.dtype.element_ty), mask=valid)
    tl.store(grad_b + out, (g * pull).to(grad_b.dtype.element_ty), mask=valid)


def _near_one(rho: float) -> tuple[float, float]:
    """1 - rho and 1 - rho², before they are rounded to float32, where rho next to 1 would be 1."""
    return 1 - rho, (1 - rho) * (1 + rho)


def _groups(sizes: Sequence[int]) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """The columns, the factors and the factors' ends within the columns, of each launch."""
    start = 0
    for first in range(0, len(sizes), FACTORS_PER_LAUNCH):
        ends = tuple(accumulate(sizes[first : first + FACTORS_PER_LAUNCH]))
        if ends[-1] > 0:
            yield slice(start, start + ends[-1]), slice(first, first + len(ends)), ends
        start += ends[-1]


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
    rest, variance = _near_one(rho)
    per_element, per_shared = (math.log(2 * math.pi), 0.5 * math.log(variance)) if normalized else (0.0, 0.0)
    mask = shared.contiguous().view(torch.uint8)
    plans = []  # columns, factors, ends, tile, columns of a part, parts
    for columns, factors, ends in _groups(sizes):
        block = min(power_of_two(ends[-1]), _WIDEST)
        parts = max(1, min(ends[-1] // 4096, ceil_div(1024, batch)))
        part = ceil_div(ceil_div(ends[-1], parts), block) * block
        plans.append((columns, factors, ends, block, part, ceil_div(ends[-1], part)))
    total = sum(plan[-1] for plan in plans)
    sums = loss[None] if total == 1 else loss.new_empty(total, batch)
    at = 0
    with on_device(za):
        for columns, factors, ends, block, part, parts in plans:
            launch(
                _forward,
                lambda meta, block=block, parts=parts: (ceil_div(batch, meta["TILE"] // block), parts),
                **strided("row", za=a[:, columns], zb=b[:, columns], shared=mask[:, factors]),
                **strided("row", logdet_a=logdet_a, logdet_b=logdet_b),
                ends=ends,
                loss=sums[at:],
                batch=batch,
                width=ends[-1],
                part=part,
                batch_bucket=bucket(batch),
                REST=rest,
                INVERSE_VARIANCE=1 / variance,
                PER_ELEMENT=per_element,
                PER_SHARED=per_shared,
                LOGDETS=at == 0,
                WIDE=tl_dtype(loss.dtype),
                BLOCK_N=block,
            )
            at += parts
        if total > 1:
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
    mask = shared.contiguous().view(torch.uint8)
    rest, variance = _near_one(rho)
    with on_device(za):
        for columns, factors, ends in _groups(sizes):
            block = min(power_of_two(ends[-1]), _WIDEST)
            launch(
                _backward,
                tiles(batch, ends[-1], block),
                **strided("row", grad=grad, za=a[:, columns], zb=b[:, columns], shared=mask[:, factors]),
                ends=ends,
                **strided("row", grad_a=grad_a[:, columns]),
                grad_b=grad_b[:, columns],
                batch=batch,
                width=ends[-1],
                batch_bucket=bucket(batch),
                RHO=rho,
                REST=rest,
                INVERSE_VARIANCE=1 / variance,
                WIDE=tl_dtype(za.dtype),
                BLOCK_N=block,
            )
    return grad_a, grad_b


def compile_cases() -> list[CompileCase]:
    """The kernels of representative calls, for triton.compile: name, kernel, signature, constexprs, options."""
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for batch, sizes in ((25, [22, 11, 31]), (4096, [3, 4, 5]), (16, [60000, 5536])):
            z = torch.empty(batch, sum(sizes), dtype=dtype, device="meta")
            logdet = z.new_empty(batch, dtype=accumulator_type(dtype))
            shared = torch.empty(batch, len(sizes), dtype=torch.bool, device="meta")
            label = f"pair_nll {str(dtype).removeprefix('torch.')} [{batch}, {sum(sizes)}]"
            calls[label] = partial(pair_nll, z, z, logdet, logdet, shared, sizes, 0.975, True)
            calls[f"{label} backward"] = partial(pair_nll_backward, logdet, z, z, shared, sizes, 0.975)
    return recorded(calls)
