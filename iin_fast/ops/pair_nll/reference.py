"""The factor loss in plain torch: the executable definition that every backend is tested against."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pair_nll"]


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
    wide = torch.float64 if za.dtype == torch.float64 else torch.float32
    a, b = za.to(wide), zb.to(wide)
    loss = 0.5 * a.square().sum(1) - logdet_a - logdet_b
    for k, (a_k, b_k) in enumerate(zip(a.split(list(sizes), 1), b.split(list(sizes), 1), strict=True)):
        m = shared[:, k, None].to(wide)
        loss = loss + 0.5 * ((b_k - m * rho * a_k).square() / (1 - m * rho**2)).sum(1)
    if normalized:
        count = shared.to(wide) @ torch.tensor(list(sizes), dtype=wide, device=za.device)
        loss = loss + za.shape[1] * math.log(2 * math.pi) + 0.5 * count * math.log(1 - rho**2)
    return loss
