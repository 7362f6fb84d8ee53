"""affine_coupling in Triton: forward, inverse and backward, one kernel each.

Bytes per element in float32: 16 forward and inverse (reads x, raw, shift; writes y), 24 backward (reads value, raw, the
gradient; writes three). A program owns a tile of whole rows and walks their columns with the log-det in registers. Where
rows are too few to fill a GPU, several programs share a row and their sums are added by a second kernel, in a fixed
order. Backward reduces nothing: a program owns a tile of rows and columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    CompileCase,
    add_term,
    atan,
    autotuned,
    bucket,
    ceil_div,
    compensated,
    launch,
    on_device,
    power_of_two,
    recorded,
    rows,
    softplus,
    strided,
    sum_parts,
    tanh,
    tile_of,
    tiles,
    tl_dtype,
)
from ..types import accumulator_type
from .reference import SQUASHES

__all__ = ["affine_coupling", "affine_coupling_backward", "compile_cases"]

# Elements of a tile and warps: 8 a thread let a thread of a 16-bit type read 16 bytes, 4 leave it registers; with 16
# float64 kernels spill (compile_cases).
_CONFIGS = [
    triton.Config({"TILE": 2048}, num_warps=8, num_stages=1),
    triton.Config({"TILE": 1024}, num_warps=8, num_stages=1),
    triton.Config({"TILE": 512}, num_warps=4, num_stages=1),
]
_WIDEST = 512  # columns of a tile, at most the smallest tile

_IDENTITY, _TANH, _ATAN, _SIGMOID, _NONE, _SOFTPLUS, _SOFTCLIP = (tl.constexpr(s.code) for s in SQUASHES.values())


@triton.jit
def log_scale(raw, SQUASH: tl.constexpr, CLAMP: tl.constexpr):
    """s and ds / draw."""
    tl.static_assert(SQUASH != _NONE)
    if SQUASH == _IDENTITY:
        return raw, tl.zeros_like(raw) + 1
    elif SQUASH == _TANH:
        unit = tanh(raw)
        return CLAMP * unit, CLAMP * (1 - unit * unit)
    elif SQUASH == _ATAN:
        return CLAMP * 0.636 * atan(raw), CLAMP * 0.636 / (1 + raw * raw)
    elif SQUASH == _SOFTPLUS:
        soft, derivative = softplus(raw)
        scale = soft + CLAMP
        return tl.log(scale), derivative / scale
    elif SQUASH == _SOFTCLIP:
        shrink = 1 / (1 + tl.abs(raw / CLAMP))
        return raw * shrink, shrink * shrink
    else:
        tl.static_assert(SQUASH == _SIGMOID)
        unit = 1 / (1 + tl.exp(-(raw + 2)))
        scale = unit + 1e-3
        return tl.log(scale), unit * (1 - unit) / scale


@autotuned(_CONFIGS, key=["width", "batch_bucket"])
@triton.jit(do_not_specialize=["batch", "batch_bucket"])
def _forward(
    x,  # [batch, width], rows x_row apart
    raw,
    shift,
    y,  # [batch, width], contiguous
    logdet,  # [parts, batch]
    batch,
    width,
    x_row,
    raw_row,
    shift_row,
    part,  # columns of a part
    batch_bucket,
    SQUASH: tl.constexpr,
    CLAMP: tl.constexpr,
    INVERSE: tl.constexpr,
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
        v = tl.load(x + long_row * x_row + column, mask=valid, other=0.0).to(WIDE)
        t = tl.load(shift + long_row * shift_row + column, mask=valid, other=0.0).to(WIDE)
        if SQUASH == _NONE:
            result = v - t if INVERSE else v + t
        else:
            s, _ = log_scale(tl.load(raw + long_row * raw_row + column, mask=valid, other=0.0).to(WIDE), SQUASH, CLAMP)
            result = (v - t) * tl.exp(-s) if INVERSE else v * tl.exp(s) + t
            total, lost = add_term(total, lost, tl.where(valid, s, 0.0))
        tl.store(y + long_row * width + column, result.to(y.dtype.element_ty), mask=valid)
    summed = tl.sum(compensated(total, lost), 1)
    tl.store(logdet + tl.program_id(1).to(tl.int64) * batch + row, -summed if INVERSE else summed, mask=row < batch)


@autotuned(_CONFIGS, key=["width", "batch_bucket"])
@triton.jit(do_not_specialize=["batch", "batch_bucket"])
def _backward(
    grad_y,  # [batch, width], rows grad_y_row apart
    grad_logdet,  # [batch], grad_logdet_row apart
    value,  # what multiplies ds: x of the forward map, y of the inverse map
    raw,
    grad_x,  # [batch, width], contiguous, as the next two
    grad_raw,
    grad_shift,
    batch,
    width,
    grad_y_row,
    grad_logdet_row,
    value_row,
    raw_row,
    batch_bucket,
    SQUASH: tl.constexpr,
    CLAMP: tl.constexpr,
    INVERSE: tl.constexpr,
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
    out = long_row * width + column
    g = tl.load(grad_y + long_row * grad_y_row + column, mask=valid, other=0.0).to(WIDE)
    if SQUASH == _NONE:
        gx = g
    else:
        gl = tl.load(grad_logdet + row.to(tl.int64) * grad_logdet_row, mask=row < batch, other=0.0).to(WIDE)[:, None]
        v = tl.load(value + long_row * value_row + column, mask=valid, other=0.0).to(WIDE)
        r = tl.load(raw + long_row * raw_row + column, mask=valid, other=0.0).to(WIDE)
        s, derivative = log_scale(r, SQUASH, CLAMP)
        if INVERSE:
            gx = g * tl.exp(-s)
            gs = -(g * v + gl)
        else:
            e = tl.exp(s)
            gx = g * e
            gs = g * (e * v) + gl  # e v is as large as y: it overflows only where y does
        tl.store(grad_raw + out, (gs * derivative).to(grad_raw.dtype.element_ty), mask=valid)
    tl.store(grad_x + out, gx.to(grad_x.dtype.element_ty), mask=valid)
    tl.store(grad_shift + out, (-gx if INVERSE else g).to(grad_shift.dtype.element_ty), mask=valid)


def _width(x: Tensor) -> int:
    return x[0].numel() if len(x) else 0


def affine_coupling(
    x: Tensor, raw_scale: Tensor | None, shift: Tensor, squash: int, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """As torch.ops.iin_fast.affine_coupling: y like x, logdet [batch]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    logdet = torch.empty(x.shape[:1], dtype=accumulator_type(x.dtype), device=x.device)
    batch, width = x.shape[0], _width(x)
    if y.numel() == 0:
        return y, logdet.zero_()
    v, t = rows(x, batch, width), rows(shift, batch, width)
    raw = v if raw_scale is None else rows(raw_scale, batch, width)
    block = min(power_of_two(width), _WIDEST)
    # parts of at least 4096 columns, as many as it takes for a thousand programs
    parts = max(1, min(width // 4096, ceil_div(1024, batch)))
    part = ceil_div(ceil_div(width, parts), block) * block
    parts = ceil_div(width, part)
    sums = logdet if parts == 1 else logdet.new_empty(parts, batch)
    with on_device(x):
        launch(
            _forward,
            lambda meta: (ceil_div(batch, meta["TILE"] // block), parts),
            **strided("row", x=v, raw=raw, shift=t),
            y=y,
            logdet=sums,
            batch=batch,
            width=width,
            part=part,
            batch_bucket=bucket(batch),
            SQUASH=squash,
            CLAMP=clamp,
            INVERSE=inverse,
            WIDE=tl_dtype(x.dtype),
            BLOCK_N=block,
        )
        if parts > 1:
            sum_parts(sums, logdet)
    return y, logdet


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    value: Tensor,
    raw_scale: Tensor | None,
    squash: int,
    clamp: float,
    inverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As torch.ops.iin_fast.affine_coupling_backward: gradients of x, raw_scale and shift, contiguous."""
    empty = partial(torch.empty, value.shape, dtype=value.dtype, device=value.device)
    grad_x, grad_raw, grad_shift = empty(), None if raw_scale is None else empty(), empty()
    batch, width = value.shape[0], _width(value)
    if value.numel() == 0:
        return grad_x, grad_raw, grad_shift
    g, v = rows(grad_y, batch, width), rows(value, batch, width)
    raw = v if raw_scale is None else rows(raw_scale, batch, width)
    block = min(power_of_two(width), _WIDEST)
    with on_device(value):
        launch(
            _backward,
            tiles(batch, width, block),
            **strided("row", grad_y=g, grad_logdet=grad_logdet, value=v, raw=raw),
            grad_x=grad_x,
            grad_raw=grad_x if grad_raw is None else grad_raw,
            grad_shift=grad_shift,
            batch=batch,
            width=width,
            batch_bucket=bucket(batch),
            SQUASH=squash,
            CLAMP=clamp,
            INVERSE=inverse,
            WIDE=tl_dtype(value.dtype),
            BLOCK_N=block,
        )
    return grad_x, grad_raw, grad_shift


def compile_cases() -> list[CompileCase]:
    """The kernels of representative calls, for triton.compile: name, kernel, signature, constexprs, options."""
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for name, (squash, _, clamp, _) in SQUASHES.items():
            if name != "tanh" and dtype != torch.float32:
                continue
            for batch, width in ((4096, 32), (25, 31), (16, 65536)) if name == "tanh" else ((4096, 32),):
                x = torch.empty(batch, width, dtype=dtype, device="meta")
                raw = None if name == "none" else x
                logdet = x.new_empty(batch, dtype=accumulator_type(dtype))
                label = f"affine_coupling {name} {str(dtype).removeprefix('torch.')} [{batch}, {width}]"
                for inverse in (False, True) if dtype == torch.float32 and batch == 4096 else (False,):
                    which = f"{label} inverse" if inverse else label
                    arguments = (raw, x, squash, clamp, inverse)
                    calls[which] = partial(affine_coupling, x, *arguments)
                    back = (x, logdet, x, raw, squash, clamp, inverse)
                    calls[f"{which} backward"] = partial(affine_coupling_backward, *back)
    return recorded(calls)
