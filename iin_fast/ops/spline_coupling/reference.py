"""Rational-quadratic splines in plain torch: the executable definition that every backend of the op is tested against.

Durkan et al. 2019, Sec. 3.1. Beyond the box ``[left, right]``: the identity (tails "linear" and "circular"), or straight
lines with the slopes of the outer knots (tails "none").
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["spline_coupling"]


def _knots(raw: Tensor, low: float, high: float, minimum: float) -> Tensor:  # [..., bins] -> [..., bins + 1]
    sizes = minimum + (1 - minimum * raw.shape[-1]) * torch.softmax(raw, -1)
    inner = low + (high - low) * sizes.cumsum(-1)[..., :-1]
    ends = raw.new_full(raw.shape[:-1] + (1,), low), raw.new_full(raw.shape[:-1] + (1,), high)
    return torch.cat([ends[0], inner, ends[1]], -1)


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
    widths, heights, raw = parameters.split([bins, bins, parameters.shape[-1] - 2 * bins], -1)
    if parameterization == "zuko":
        log_slope = math.log(min_derivative)
        widths, heights = (w / (1 + (2 * w / log_slope).abs()) for w in (widths, heights))
        min_width = min_height = 0.0
        slopes = torch.exp(raw / (1 + (raw / log_slope).abs()))
    else:
        slopes = min_derivative + F.softplus(raw, threshold=1e9)
    if tails == "linear":
        slopes = F.pad(slopes, (1, 1), value=1.0)
    elif tails == "circular":
        slopes = torch.cat([slopes, slopes[..., :1]], -1)
    knots_x, knots_y = _knots(widths, left, right, min_width), _knots(heights, bottom, top, min_height)

    low, high = (bottom, top) if inverse else (left, right)
    inside = (x >= low) & (x <= high)
    within = x.clamp(low, high)
    position = (knots_y if inverse else knots_x)[..., 1:-1].detach()
    k = (within[..., None] >= position).sum(-1, keepdim=True)

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index).squeeze(-1)

    x0, y0 = at(knots_x, k), at(knots_y, k)
    width, height = at(knots_x, k + 1) - x0, at(knots_y, k + 1) - y0
    slope0, slope1 = at(slopes, k), at(slopes, k + 1)
    delta = height / width
    bend = slope0 + slope1 - 2 * delta
    if inverse:
        rise = within - y0
        a, b, c = rise * bend + height * (delta - slope0), height * slope0 - rise * bend, -delta * rise
        theta = 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0).sqrt())
        mapped = x0 + width * theta
    else:
        theta = (within - x0) / width
        mapped = y0 + height * (delta * theta**2 + slope0 * theta * (1 - theta)) / (delta + bend * theta * (1 - theta))
    numerator = slope1 * theta**2 + 2 * delta * theta * (1 - theta) + slope0 * (1 - theta) ** 2
    logdet = numerator.log() + 2 * (delta / (delta + bend * theta * (1 - theta))).log()
    logdet = -logdet if inverse else logdet

    if tails == "none":
        edge = torch.where(x > high, slopes[..., -1], slopes[..., 0])
        slope = 1 / edge if inverse else edge
        outside, outside_logdet = mapped.detach() + (x - within.detach()) * slope, slope.log()
    else:
        outside, outside_logdet = x, torch.zeros_like(x)
    y, logdet = torch.where(inside, mapped, outside), torch.where(inside, logdet, outside_logdet)
    return y.to(dtype), logdet.sum(1)
