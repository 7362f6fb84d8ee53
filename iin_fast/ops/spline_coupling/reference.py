"""Rational-quadratic splines in plain torch: the executable definition that every backend of the op is tested against.

Durkan et al. 2019, Sec. 3.1. Beyond the box ``[left, right]``: the identity (tails "linear" and "circular"), or straight
lines with the slopes of the outer knots (tails "none").
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["spline_coupling"]


def _with_value(t: Tensor, value: Tensor) -> Tensor:
    """``value``, with the derivatives of ``t``."""
    return t - t.detach() + value.detach()


def _knots(raw: Tensor, low: float, high: float, minimum: float) -> Tensor:  # [..., bins] -> [..., bins + 1]
    sizes = minimum + (1 - minimum * raw.shape[-1]) * torch.softmax(raw, -1)
    knots = low + (high - low) * F.pad(sizes.cumsum(-1), (1, 0))
    last = knots[..., -1:]  # exactly high, but NaN where the sizes are
    return torch.cat([knots[..., :-1], high + (last - last.detach())], -1)


def _root(share: Tensor, slope0: Tensor, slope1: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The position in a bin whose image lies at ``share`` of its height: the root of Eq. 29-32 of the paper's appendix,
    made of sums of positive terms, so that no rounding takes it out of [0, 1]; and 1 - that, as exact where it is small."""
    other = 1 - share
    half = (slope0 * other - slope1 * share) / (2 * delta)
    rising = half >= 0
    far = torch.where(rising, half, -half) + (half * half + share * other).sqrt()
    before, after = torch.where(rising, share, far), torch.where(rising, far, other)
    return before / (before + after), after / (before + after)


def spline_coupling(
    x: Tensor,  # [rows, features]
    parameters: Tensor,  # [rows, features, 2 bins + derivatives]
    bins: int,
    tails: str,
    parameterization: str,
    box: tuple[float, float, float, float],  # left, right, bottom, top
    min_width: float,
    min_height: float,
    min_derivative: float,  # zuko: the smallest slope
    inverse: bool,
) -> tuple[Tensor, Tensor]:  # [rows, features], [rows]
    """The op; 16-bit types are computed in float32, and their log-det is float32."""
    dtype = x.dtype
    if dtype.itemsize == 2:
        x, parameters = x.float(), parameters.float()
    left, right, bottom, top = box
    low, high = (bottom, top) if inverse else (left, right)
    above = x > high
    outside = above | (x < low)  # NaN is not
    within = torch.where(outside, x.detach().clamp(low, high), x)
    at_end = within >= high
    if tails != "none":  # the identity owes nothing to the parameters
        parameters = parameters.masked_fill(outside[..., None], 0.0)

    widths, heights, raw = parameters.split([bins, bins, parameters.shape[-1] - 2 * bins], -1)
    log_slope = math.log(min_derivative) if parameterization == "zuko" else 0.0
    if parameterization == "zuko":
        widths, heights = (w / (1 + (2 * w / log_slope).abs()) for w in (widths, heights))
        min_width = min_height = 0.0
    knots_x, knots_y = _knots(widths, left, right, min_width), _knots(heights, bottom, top, min_height)
    if tails == "linear":
        raw = F.pad(raw, (1, 1))
    elif tails == "circular":
        raw = torch.cat([raw, raw[..., :1]], -1)

    # the ends of the box lie in the first and the last bin, also where rounding puts other knots on them
    key = within.detach().masked_fill(at_end, math.inf).masked_fill(within <= low, -math.inf)
    k = (key[..., None] >= (knots_y if inverse else knots_x)[..., 1:-1].detach()).sum(-1, keepdim=True)

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index).squeeze(-1)

    def slope(raw: Tensor) -> Tensor:
        if parameterization == "zuko":
            return torch.exp(raw / (1 + (raw / log_slope).abs()))
        # beyond 40 a softplus is its argument to rounding, and below its derivatives don't overflow; an infinite raw value is NaN
        return min_derivative + (F.softplus(raw, threshold=40.0) + 0 * raw.detach())

    slope0, slope1 = slope(at(raw, k)), slope(at(raw, k + 1))
    if tails == "linear":
        slope0 = slope0.masked_fill(k[..., 0] == 0, 1.0)
        slope1 = slope1.masked_fill(k[..., 0] == bins - 1, 1.0)
    x0, y0 = at(knots_x, k), at(knots_y, k)
    least = torch.finfo(x.dtype).eps / 4  # a bin too small to be seen holds an end of the box at most
    width = (at(knots_x, k + 1) - x0).clamp_min(least * (right - left))
    height = (at(knots_y, k + 1) - y0).clamp_min(least * (top - bottom))
    delta = height / width
    share = (within - y0) / height if inverse else (within - x0) / width
    share = _with_value(share, share.clamp(0, 1).masked_fill(at_end & ~share.isnan(), 1.0))
    theta, rest = _root(share, slope0, slope1, delta) if inverse else (share, 1 - share)
    theta, rest = (torch.where(outside, t.detach(), t) for t in (theta, rest))
    denominator = delta + (slope0 + slope1 - 2 * delta) * theta * rest
    numerator = slope1 * theta**2 + 2 * delta * theta * rest + slope0 * rest**2
    logdet = numerator.log() + 2 * (delta / denominator).log()
    if inverse:
        logdet, mapped, low, high = -logdet, x0 + width * theta, left, right
    else:
        mapped = y0 + height * (delta * theta**2 + slope0 * theta * rest) / denominator
        low, high = bottom, top
    # nothing leaves the box, and its ends are exact; NaN stays NaN
    held = mapped.detach().clamp(low, high)
    mapped = _with_value(mapped, held.masked_fill(at_end & ~held.isnan(), high))

    if tails == "none":
        edge = torch.where(above, slope1, slope0)
        beyond = mapped.detach() + (x - within) * (1 / edge if inverse else edge)
        y = torch.where(outside, beyond, mapped)
    else:
        y, logdet = torch.where(outside, x, mapped), logdet.masked_fill(outside, 0.0)
    return y.to(dtype), logdet.sum(1)
