"""spline_coupling in Triton: forward, inverse and backward, one kernel each.

With K bins and linear tails an element reads 2K raw widths and heights, two of its K - 1 raw derivatives and x, and writes
y: 4 (2K + 4) bytes in float32, 80 at K = 8; backward also reads the gradient and writes all gradients: 4 (5K + 5), 180 at
K = 8. (Derivatives that are not read lie in the same sectors of memory, so a GPU moves up to 4 (3K + 1), and 4 (6K + 1).)
A program owns a tile [rows, features, bins], bins padded to a power of two, and walks the features of its rows with the
log-det in registers: softmax, running sums, the search for the bin and the map are reductions along the tile's last axis,
and no knot is ever written to memory. Long rows are shared by several programs, and summed in a fixed order.
"""

import math
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
    tile_of,
    tl_dtype,
)
from ..types import accumulator_type
from . import PARAMETERIZATIONS, TAILS

__all__ = ["compile_cases", "spline_coupling", "spline_coupling_backward"]

_LINEAR, _NO_TAILS, _CIRCULAR = (tl.constexpr(TAILS[name]) for name in ("linear", "none", "circular"))

# Numbers of a tile (elements times padded bins) and warps; a thread holds a dozen values for each of its numbers.
_CONFIGS = [
    triton.Config({"TILE": 512}, num_warps=4, num_stages=1),
    triton.Config({"TILE": 1024}, num_warps=4, num_stages=1),
    triton.Config({"TILE": 512}, num_warps=8, num_stages=1),
]
_LEAST = 256  # of elements of a row times padded bins


def _fitting(
    configs: list[triton.Config], _: dict[str, Any], *, WIDE: Any, BINS: int, **__: Any
) -> list[triton.Config]:
    """float64 and many bins with the fewest numbers a thread, which needs no spills."""
    return configs[-1:] if WIDE == tl.float64 or BINS > 32 else configs


@triton.jit
def _shares(raw, valid, ZUKO: tl.constexpr, SOFTNESS: tl.constexpr):
    """Softmax along the last axis, its running sum from the left without the own share, and the squeeze's derivative."""
    step = tl.zeros_like(raw) + 1
    if ZUKO:
        shrink = 1 / (1 + tl.abs(2 * raw * SOFTNESS))
        step = shrink * shrink
        raw = raw * shrink
    raw = tl.where(valid, raw, float("-inf"))
    e = tl.exp(raw - tl.max(raw, 2)[:, :, None])
    share = e / tl.sum(e, 2)[:, :, None]
    return share, tl.cumsum(share, 2) - share, step


@triton.jit
def _pick(values, chosen):
    return tl.sum(tl.where(chosen, values, 0.0), 2)


@triton.jit
def _at_least(part, LEAST: tl.constexpr):
    """A bin too small to be seen holds an end of the box at most; it is given some size. NaN stays NaN."""
    return tl.where(part < LEAST, tl.zeros_like(part) + LEAST, part)


@triton.jit
def _slope(raw, ZUKO: tl.constexpr, SOFTNESS: tl.constexpr, MIN_D: tl.constexpr):
    """The slope at a knot and its derivative by the raw value. The slope of an infinite raw value is NaN."""
    if ZUKO:
        shrink = 1 / (1 + tl.abs(raw * SOFTNESS))
        slope = tl.exp(raw * shrink)
        return slope, slope * shrink * shrink
    else:
        soft, derivative = softplus(raw)
        return MIN_D + (soft + 0 * raw), derivative


@triton.jit
def _locate(
    x, widths, heights, derivatives, valid,
    BINS: tl.constexpr, TAILS: tl.constexpr, ZUKO: tl.constexpr, SOFTNESS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr,
    MIN_W: tl.constexpr, MIN_H: tl.constexpr, MIN_D: tl.constexpr,
    INVERSE: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The bin of each coordinate [rows, features]: corner, size, slopes; and what backward needs besides. Raw widths, heights and
    derivatives of an element begin at the pointers [rows, features]."""
    k = tl.arange(0, BLOCK_K)[None, None, :]
    real = k < BINS
    inside = valid[:, :, None] & real
    share_w, mass_w, step_w = _shares(
        tl.load(widths[:, :, None] + k, mask=inside, other=0.0).to(WIDE), real, ZUKO, SOFTNESS
    )
    share_h, mass_h, step_h = _shares(
        tl.load(heights[:, :, None] + k, mask=inside, other=0.0).to(WIDE), real, ZUKO, SOFTNESS
    )
    before = k.to(WIDE)
    left = LEFT + (RIGHT - LEFT) * (MIN_W * before + (1 - MIN_W * BINS) * mass_w)
    bottom = BOTTOM + (TOP - BOTTOM) * (MIN_H * before + (1 - MIN_H * BINS) * mass_h)
    # the ends of the box lie in the first and the last bin, also where rounding puts other knots on them
    inner = tl.where(x > (BOTTOM if INVERSE else LEFT), x, float("-inf"))
    key = tl.where(x >= (TOP if INVERSE else RIGHT), float("inf"), inner)
    reached = key[:, :, None] >= (bottom if INVERSE else left)
    number = tl.sum((real & (k > 0) & reached).to(tl.int32), 2)
    here = k == number[:, :, None]
    sx, sy = _pick(left, here), _pick(bottom, here)
    LEAST: tl.constexpr = 2.0**-54 if WIDE == tl.float64 else 2.0**-25  # a quarter of the type's epsilon
    width = (RIGHT - LEFT) * _at_least(MIN_W + (1 - MIN_W * BINS) * _pick(share_w, here), LEAST)
    height = (TOP - BOTTOM) * _at_least(MIN_H + (1 - MIN_H * BINS) * _pick(share_h, here), LEAST)
    if TAILS == _LINEAR:
        first = number - 1
        second = number
        has0 = number > 0
        has1 = number < BINS - 1
    else:
        first = number
        second = number + 1
        if TAILS == _CIRCULAR:
            second = tl.where(second == BINS, 0, second)
        has0 = number >= 0
        has1 = number >= 0
    raw0 = tl.load(derivatives + first, mask=valid & has0, other=0.0).to(WIDE)
    raw1 = tl.load(derivatives + second, mask=valid & has1, other=0.0).to(WIDE)
    slope0, step0 = _slope(raw0, ZUKO, SOFTNESS, MIN_D)
    slope1, step1 = _slope(raw1, ZUKO, SOFTNESS, MIN_D)
    slope0 = tl.where(has0, slope0, 1.0)
    slope1 = tl.where(has1, slope1, 1.0)
    return (
        number, sx, width, sy, height, slope0, slope1, step0, step1, share_w, mass_w, step_w, share_h, mass_h, step_h
    )  # fmt: skip


@triton.jit
def _clamp(value, LOW: tl.constexpr, HIGH: tl.constexpr):
    """NaN stays NaN. (A bare Python float in a where would be a float32.)"""
    zero = tl.zeros_like(value)
    return tl.where(value < LOW, zero + LOW, tl.where(value > HIGH, zero + HIGH, value))


@triton.jit
def _held(mapped, at_end, LOW: tl.constexpr, HIGH: tl.constexpr):
    """What the map gives, held in the box; that of the upper edge is the upper edge. NaN stays NaN."""
    return tl.where(at_end & (mapped >= LOW), tl.zeros_like(mapped) + HIGH, _clamp(mapped, LOW, HIGH))


@triton.jit
def _root(share, width, height, slope0, slope1, WIDE: tl.constexpr):
    """The position in a bin whose image lies at `share` of its height, and 1 - that; csrc/spline_coupling has the same."""
    other = 1 - share
    half = (slope0 * other - slope1 * share) * width / (2 * height)
    square = half * half + share * other
    far = tl.abs(half) + (tl.sqrt(square) if WIDE == tl.float64 else tl.sqrt_rn(square))
    rising = half >= 0
    before = tl.where(rising, share, far)
    after = tl.where(rising, far, other)
    total = tl.where(before + after == 0, 1.0, before + after)
    return before / total, after / total


@triton.jit
def _position(x, sx, width, sy, height, slope0, slope1, HIGH: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr):
    """Where in its bin a coordinate lies, in [0, 1], and 1 - that; at the upper edge of the box exactly 1 and 0. NaN stays NaN."""
    share = _clamp((x - sy) / height if INVERSE else (x - sx) / width, 0.0, 1.0)
    share = tl.where((x >= HIGH) & (share >= 0), 1.0, share)
    if INVERSE:
        return _root(share, width, height, slope0, slope1, WIDE)
    else:
        return share, 1 - share


@triton.jit
def _image(theta, rest, sy, width, height, slope0, slope1):
    """y and log dy/dx."""
    delta = height / width
    mixed = theta * rest
    denominator = delta + (slope0 + slope1 - 2 * delta) * mixed
    numerator = slope1 * theta * theta + 2 * delta * mixed + slope0 * rest * rest
    logdet = tl.log(numerator) + 2 * tl.log(delta / denominator)
    return sy + height * (delta * theta * theta + slope0 * mixed) / denominator, logdet


@triton.jit
def _image_backward(theta, rest, width, height, slope0, slope1, grad_y, grad_logdet):
    """Gradients of grad_y y + grad_logdet logdet by theta, width, height and slopes; csrc/spline_coupling has the same."""
    delta = height / width
    mixed = theta * rest
    square = theta * theta
    bend = slope0 + slope1 - 2 * delta
    over = 1 / (delta + bend * mixed)
    numerator = slope1 * square + 2 * delta * mixed + slope0 * rest * rest
    below = 1 / numerator
    rational = (delta * square + slope0 * mixed) * over
    g = grad_y * height
    turn = rest - theta
    by_theta = g * delta * numerator * over * over + grad_logdet * (
        (2 * slope1 * theta + 2 * delta * turn - 2 * slope0 * rest) * below - 2 * bend * turn * over
    )
    by_delta = g * (square - rational * (1 - 2 * mixed)) * over + grad_logdet * (
        2 / delta + 2 * mixed * below - 2 * (1 - 2 * mixed) * over
    )
    by_slope0 = g * mixed * (1 - rational) * over + grad_logdet * (rest * rest * below - 2 * mixed * over)
    by_slope1 = -g * mixed * rational * over + grad_logdet * (square * below - 2 * mixed * over)
    by_width = -(by_theta * theta + by_delta * delta) / width
    by_height = grad_y * rational + by_delta / width
    return by_theta, by_width, by_height, by_slope0, by_slope1


@autotuned(_CONFIGS[1:], key=["features", "batch_bucket", "BINS", "INVERSE"], fitting=_fitting)
@triton.jit(do_not_specialize=["batch", "batch_bucket"])
def _forward(
    x,  # [batch, features], rows x_row apart
    widths,  # [batch, features, BINS], the last axis contiguous
    heights,  # [batch, features, BINS], the last axis contiguous
    derivatives,  # [batch, features, DERIVATIVES], the last axis contiguous
    y,  # [batch, features], contiguous
    logdet,  # [parts, batch]
    batch,
    features,
    x_row,
    widths_row,
    widths_feature,
    heights_row,
    heights_feature,
    derivatives_row,
    derivatives_feature,
    part,  # features of a part
    batch_bucket,
    BINS: tl.constexpr,
    TAILS: tl.constexpr,
    ZUKO: tl.constexpr,
    SOFTNESS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    MIN_W: tl.constexpr,
    MIN_H: tl.constexpr,
    MIN_D: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_R: tl.constexpr = max(1, TILE // (BLOCK_K * BLOCK_F))
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    long_row = row.to(tl.int64)[:, None]
    start = tl.program_id(1) * part
    LOW: tl.constexpr = BOTTOM if INVERSE else LEFT
    HIGH: tl.constexpr = TOP if INVERSE else RIGHT
    total = tl.zeros([BLOCK_R, BLOCK_F], WIDE)
    lost = tl.zeros([BLOCK_R, BLOCK_F], WIDE)
    for begin in range(start, tl.minimum(start + part, features), BLOCK_F):
        feature = begin + tl.arange(0, BLOCK_F)[None, :]
        valid = (row < batch)[:, None] & (feature < features)
        value = tl.load(x + long_row * x_row + feature, mask=valid, other=0.0).to(WIDE)
        within = _clamp(value, LOW, HIGH)
        number, sx, width, sy, height, slope0, slope1, _0, _1, _2, _3, _4, _5, _6, _7 = _locate(
            within,
            widths + long_row * widths_row + feature * widths_feature,
            heights + long_row * heights_row + feature * heights_feature,
            derivatives + long_row * derivatives_row + feature * derivatives_feature,
            valid, BINS, TAILS, ZUKO, SOFTNESS, LEFT, RIGHT, BOTTOM, TOP, MIN_W, MIN_H, MIN_D, INVERSE, WIDE, BLOCK_K,
        )  # fmt: skip
        theta, rest = _position(within, sx, width, sy, height, slope0, slope1, HIGH, INVERSE, WIDE)
        mapped, gained = _image(theta, rest, sy, width, height, slope0, slope1)
        if INVERSE:
            mapped = sx + width * theta
            gained = -gained
        mapped = _held(mapped, within >= HIGH, LEFT if INVERSE else BOTTOM, RIGHT if INVERSE else TOP)
        outside = (value < within) | (value > within)
        if TAILS == _NO_TAILS:  # straight on
            edge = tl.where(value > within, slope1, slope0)
            excess = value - within
            mapped = tl.where(outside, mapped + (excess / edge if INVERSE else excess * edge), mapped)
        else:
            mapped = tl.where(outside, value, mapped)
            gained = tl.where(outside, 0.0, gained)
        tl.store(y + long_row * features + feature, mapped.to(y.dtype.element_ty), mask=valid)
        total, lost = add_term(total, lost, tl.where(valid, gained, 0.0))
    tl.store(
        logdet + tl.program_id(1).to(tl.int64) * batch + row, tl.sum(compensated(total, lost), 1), mask=row < batch
    )


@triton.jit
def _share_gradient(
    to,
    corner,
    size,
    share,
    mass,
    step,
    number,
    none,
    valid,
    SCALE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Through the softmax: gradients of raw widths or heights from those by the bin's corner and size; 0 where `none`."""
    k = tl.arange(0, BLOCK_K)[None, None, :]
    n = number[:, :, None]
    here = k == n
    common = corner * _pick(mass, here) + size * _pick(share, here)
    own = tl.where(k < n, corner[:, :, None], tl.where(here, size[:, :, None], 0.0))
    gradient = tl.where(none[:, :, None], 0.0, SCALE * share * (own - common[:, :, None]) * step)
    tl.store(to[:, :, None] + k, gradient.to(to.dtype.element_ty), mask=valid[:, :, None] & (k < BINS))


@autotuned(_CONFIGS[::2], key=["features", "batch_bucket", "BINS", "INVERSE"], fitting=_fitting)
@triton.jit(do_not_specialize=["batch", "batch_bucket"])
def _backward(
    grad_y,  # [batch, features], rows grad_y_row apart
    grad_logdet,  # [batch]
    x,  # [batch, features], rows x_row apart
    widths,  # [batch, features, BINS], the last axis contiguous
    heights,  # [batch, features, BINS], the last axis contiguous
    derivatives,  # [batch, features, DERIVATIVES], the last axis contiguous
    grad_x,  # [batch, features], contiguous
    grad_widths,  # as the raw values
    grad_heights,
    grad_derivatives,
    batch,
    features,
    grad_y_row,
    grad_logdet_row,
    x_row,
    widths_row,
    widths_feature,
    heights_row,
    heights_feature,
    derivatives_row,
    derivatives_feature,
    grad_widths_row,
    grad_widths_feature,
    grad_heights_row,
    grad_heights_feature,
    grad_derivatives_row,
    grad_derivatives_feature,
    batch_bucket,
    BINS: tl.constexpr,
    TAILS: tl.constexpr,
    ZUKO: tl.constexpr,
    SOFTNESS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BOTTOM: tl.constexpr,
    TOP: tl.constexpr,
    MIN_W: tl.constexpr,
    MIN_H: tl.constexpr,
    MIN_D: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    DERIVATIVES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_R: tl.constexpr = max(1, TILE // (BLOCK_K * BLOCK_F))
    row_tile, feature_tile = tile_of(features, BLOCK_F)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    long_row = row.to(tl.int64)[:, None]
    feature = feature_tile * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    valid = (row < batch)[:, None] & (feature < features)
    value = tl.load(x + long_row * x_row + feature, mask=valid, other=0.0).to(WIDE)
    gy = tl.load(grad_y + long_row * grad_y_row + feature, mask=valid, other=0.0).to(WIDE)
    gl = tl.load(grad_logdet + row.to(tl.int64) * grad_logdet_row, mask=row < batch, other=0.0).to(WIDE)[:, None]
    LOW: tl.constexpr = BOTTOM if INVERSE else LEFT
    HIGH: tl.constexpr = TOP if INVERSE else RIGHT
    within = _clamp(value, LOW, HIGH)
    number, sx, width, sy, height, slope0, slope1, step0, step1, share_w, mass_w, step_w, share_h, mass_h, step_h = (
        _locate(
            within,
            widths + long_row * widths_row + feature * widths_feature,
            heights + long_row * heights_row + feature * heights_feature,
            derivatives + long_row * derivatives_row + feature * derivatives_feature,
            valid, BINS, TAILS, ZUKO, SOFTNESS, LEFT, RIGHT, BOTTOM, TOP, MIN_W, MIN_H, MIN_D, INVERSE, WIDE, BLOCK_K,
        )
    )  # fmt: skip
    excess = value - within
    theta, rest = _position(within, sx, width, sy, height, slope0, slope1, HIGH, INVERSE, WIDE)
    outside = (value < within) | (value > within)
    _, slope_log = _image(theta, rest, sy, width, height, slope0, slope1)
    slope = tl.where(outside, tl.where(value > within, slope1, slope0), tl.exp(slope_log))
    from_y = gy
    from_logdet = tl.zeros_like(gy) + gl
    result = gy
    if INVERSE:
        # x = f^-1(y): dx = (dy - f_p dp) / f_x, log-det = -log f_x; at fixed parameters the log-det moves with x
        curve, _c0, _c1, _c2, _c3 = _image_backward(
            theta, rest, width, height, slope0, slope1, gy * 0, from_logdet * 0 + 1
        )
        result = (gy - gl * tl.where(outside, 0.0, curve / width)) / slope
        from_y = -result
        from_logdet = -from_logdet
    by_theta, by_width, by_height, by_slope0, by_slope1 = _image_backward(
        theta, rest, width, height, slope0, slope1, from_y, from_logdet
    )
    edge = by_theta / width
    if not INVERSE:
        result = tl.where(outside, gy * slope, edge)
    corner_x = -edge
    corner_y = from_y
    by_raw0 = by_slope0 * step0
    by_raw1 = by_slope1 * step1
    same = outside & (TAILS != 1)
    if TAILS == _NO_TAILS:
        # beyond the box the coordinate is held at its edge, and a line of the outer slope goes on from there
        beyond = from_y * (excess / slope if INVERSE else excess)
        by_raw0 += tl.where(value < within, beyond * step0, 0.0)
        by_raw1 += tl.where(value > within, beyond * step1, 0.0)
        by_width = tl.where(outside, by_width + edge * theta, by_width)
        corner_x = tl.where(outside, 0.0, corner_x)
    else:  # the identity: nothing of the spline counts, finite or not
        result = tl.where(outside, gy, result)
        corner_x = tl.where(outside, 0.0, corner_x)
        corner_y = tl.where(outside, 0.0, corner_y)
        by_width = tl.where(outside, 0.0, by_width)
        by_height = tl.where(outside, 0.0, by_height)
        by_raw0 = tl.where(outside, 0.0, by_raw0)
        by_raw1 = tl.where(outside, 0.0, by_raw1)
    tl.store(grad_x + long_row * features + feature, result.to(grad_x.dtype.element_ty), mask=valid)
    to_widths = grad_widths + long_row * grad_widths_row + feature * grad_widths_feature
    to_heights = grad_heights + long_row * grad_heights_row + feature * grad_heights_feature
    to_derivatives = grad_derivatives + long_row * grad_derivatives_row + feature * grad_derivatives_feature
    SCALE_W: tl.constexpr = (RIGHT - LEFT) * (1 - MIN_W * BINS)
    SCALE_H: tl.constexpr = (TOP - BOTTOM) * (1 - MIN_H * BINS)
    _share_gradient(to_widths, corner_x, by_width, share_w, mass_w, step_w, number, same, valid, SCALE_W, BINS, BLOCK_K)
    _share_gradient(
        to_heights, corner_y, by_height, share_h, mass_h, step_h, number, same, valid, SCALE_H, BINS, BLOCK_K
    )
    if DERIVATIVES > 0:
        d = tl.arange(0, BLOCK_D)[None, None, :]
        knot = d + 1 if TAILS == _LINEAR else d  # the left end of bin `knot`, the right end of the one before
        before = tl.where(knot == 0, BINS, knot) - 1 if TAILS == _CIRCULAR else knot - 1
        n = number[:, :, None]
        gradient = tl.where(n == knot, by_raw0[:, :, None], 0.0)
        gradient += tl.where(n == before, by_raw1[:, :, None], 0.0)
        at = to_derivatives[:, :, None] + d
        tl.store(at, gradient.to(at.dtype.element_ty), mask=valid[:, :, None] & (d < DERIVATIVES))


def _constants(
    x: Tensor, bins: int, tails: int, form: int, limits: tuple[float, ...], inverse: bool, block_f: int
) -> dict[str, Any]:
    left, right, bottom, top, min_width, min_height, min_derivative = limits
    softness = 0.0
    zuko = form == PARAMETERIZATIONS["zuko"]
    if zuko:
        softness, min_width, min_height = 1 / math.log(min_derivative), 0.0, 0.0
    return dict(
        BINS=bins,
        TAILS=tails,
        ZUKO=zuko,
        SOFTNESS=softness,
        LEFT=left,
        RIGHT=right,
        BOTTOM=bottom,
        TOP=top,
        MIN_W=min_width,
        MIN_H=min_height,
        MIN_D=min_derivative,
        INVERSE=inverse,
        WIDE=tl_dtype(x.dtype),
        BLOCK_K=power_of_two(bins),
        BLOCK_F=block_f,
    )


def _values(
    bins: int, parameters: Tensor, heights: Tensor | None, derivatives: Tensor | None, prefix: str = ""
) -> dict[str, Any]:
    """Widths, heights and derivatives as a kernel takes them, of one tensor or three; the last axis is contiguous."""
    if heights is None or derivatives is None:
        parts = _contiguous(parameters).tensor_split((bins, 2 * bins), 2)
    else:
        parts = tuple(_contiguous(part) for part in (parameters, heights, derivatives))
    names = (prefix + name for name in ("widths", "heights", "derivatives"))
    return strided("row feature", **dict(zip(names, parts, strict=True)))


def _contiguous(values: Tensor) -> Tensor:
    return values if values.shape[2] < 2 or values.stride(2) == 1 else values.contiguous()


def _features_of_a_tile(features: int, bins: int) -> int:
    return min(power_of_two(features), max(1, _LEAST // power_of_two(bins)))


def _row_tiles(batch: int, bins: int, block_f: int) -> Callable[[dict[str, int]], int]:
    return lambda meta: ceil_div(batch, max(1, meta["TILE"] // (power_of_two(bins) * block_f)))


def spline_coupling(
    x: Tensor,
    parameters: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    bins: int,
    tails: int,
    parameterization: int,
    left: float,
    right: float,
    bottom: float,
    top: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """As torch.ops.iin_fast.spline_coupling: y [batch, features], logdet [batch]."""
    batch, features = x.shape
    y = torch.empty(batch, features, dtype=x.dtype, device=x.device)
    logdet = torch.empty(batch, dtype=accumulator_type(x.dtype), device=x.device)
    if y.numel() == 0:
        return y, logdet.zero_()
    x, block_f = rows(x, batch, features), _features_of_a_tile(features, bins)
    limits = (left, right, bottom, top, min_width, min_height, min_derivative)
    parts = max(1, min(features // 128, ceil_div(1024, batch)))
    part = ceil_div(ceil_div(features, parts), block_f) * block_f
    parts = ceil_div(features, part)
    sums = logdet if parts == 1 else logdet.new_empty(parts, batch)
    row_tiles = _row_tiles(batch, bins, block_f)
    with on_device(x):
        launch(
            _forward,
            lambda meta: (row_tiles(meta), parts),
            **strided("row", x=x),
            **_values(bins, parameters, heights, derivatives),
            y=y,
            logdet=sums,
            batch=batch,
            features=features,
            part=part,
            batch_bucket=bucket(batch),
            **_constants(x, bins, tails, parameterization, limits, inverse, block_f),
        )
        if parts > 1:
            sum_parts(sums, logdet)
    return y, logdet


def spline_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    parameters: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    bins: int,
    tails: int,
    parameterization: int,
    left: float,
    right: float,
    bottom: float,
    top: float,
    min_width: float,
    min_height: float,
    min_derivative: float,
    inverse: bool,
) -> tuple[Tensor, ...]:
    """As torch.ops.iin_fast.spline_coupling_backward: gradients of x and the raw values, contiguous."""
    batch, features = x.shape
    grad_x = torch.empty(batch, features, dtype=x.dtype, device=x.device)
    grads = [
        torch.empty(0 if t is None else t.shape, dtype=x.dtype, device=x.device)
        for t in (parameters, heights, derivatives)
    ]
    if grad_x.numel() == 0:
        return grad_x, *grads
    x, g, block_f = rows(x, batch, features), rows(grad_y, batch, features), _features_of_a_tile(features, bins)
    limits = (left, right, bottom, top, min_width, min_height, min_derivative)
    knots = parameters.shape[2] - 2 * bins if derivatives is None else derivatives.shape[2]
    by_heights, by_derivatives = grads[1:] if derivatives is not None else (None, None)
    row_tiles = _row_tiles(batch, bins, block_f)
    with on_device(x):
        launch(
            _backward,
            lambda meta: (row_tiles(meta) * ceil_div(features, block_f),),  # as `tiles` of triton_common
            **strided("row", grad_y=g, grad_logdet=grad_logdet, x=x),
            **_values(bins, parameters, heights, derivatives),
            grad_x=grad_x,
            **_values(bins, grads[0], by_heights, by_derivatives, "grad_"),
            batch=batch,
            features=features,
            batch_bucket=bucket(batch),
            **_constants(x, bins, tails, parameterization, limits, inverse, block_f),
            DERIVATIVES=knots,
            BLOCK_D=power_of_two(knots),
        )
    return grad_x, *grads


def compile_cases() -> list[CompileCase]:
    """The kernels of representative calls, for triton.compile: name, kernel, signature, constexprs, options."""
    calls: dict[str, Callable[[], Any]] = {}
    shapes = [(torch.float32, 8, 0, 0), (torch.float32, 8, 0, 1), (torch.float32, 10, 1, 0), (torch.float32, 64, 2, 0)]
    shapes += [(torch.bfloat16, 8, 0, 0), (torch.float64, 8, 0, 0)]
    for dtype, bins, tails, form in shapes:
        count = 2 * bins + (bins - 1, bins + 1, bins)[tails]
        x = torch.empty(4096, 32, dtype=dtype, device="meta")
        parameters, logdet = x.new_empty(4096, 32, count), x.new_empty(4096, dtype=accumulator_type(dtype))
        for inverse in (False, True):
            options = (bins, tails, form, -3.0, 3.0, -3.0, 3.0, 1e-3, 1e-3, 1e-3, inverse)
            label = f"spline_coupling {str(dtype).removeprefix('torch.')} bins {bins} {('nflows', 'zuko')[form]}"
            label += " inverse" if inverse else ""
            calls[label] = partial(spline_coupling, x, parameters, None, None, *options)
            calls[f"{label} backward"] = partial(
                spline_coupling_backward, x, logdet, x, parameters, None, None, *options
            )
    return recorded(calls)
