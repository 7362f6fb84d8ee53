"""The factor loss in plain torch: the executable definition that every backend is tested against."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import accumulator_type

__all__ = ["pair_nll"]


def _difference_and_precision(a: Tensor, b: Tensor, m: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """b - m ρ a, and 1 / (1 - m ρ²); m is 1 where an element is shared, else 0.

    In float32 ρ and 1 would be the same number for ρ next to 1, so 1 - ρ is computed before it is rounded.
    """
    rest = 1 - rho
    return (b - m * a) + m * rest * a, m * (1 / (rest * (1 + rho))) + (1 - m)


def pair_nll(
    za: Tensor,  # [batch, dim]
    zb: Tensor,  # [batch, dim]
    logdet_a: Tensor,  # [batch]
    logdet_b: Tensor,  # [batch]
    shared: Tensor,  # [batch, factors] bool
    sizes: Sequence[int],
    rho: float,
    normalized: bool,
) -> Tensor:  # [batch]
    wide = accumulator_type(za.dtype)
    a, b = za.to(wide), zb.to(wide)
    loss = 0.5 * a.square().sum(1) - logdet_a - logdet_b
    for k, (a_k, b_k) in enumerate(zip(a.split(list(sizes), 1), b.split(list(sizes), 1), strict=True)):
        difference, precision = _difference_and_precision(a_k, b_k, shared[:, k, None].to(wide), rho)
        loss = loss + 0.5 * (difference.square() * precision).sum(1)
    if normalized:
        count = shared.to(wide) @ torch.tensor(list(sizes), dtype=wide, device=za.device)
        loss = loss + za.shape[1] * math.log(2 * math.pi) + 0.5 * count * math.log((1 - rho) * (1 + rho))
    return loss
