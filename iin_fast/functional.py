"""Stand-ins for the fused functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["affine_coupling", "pair_nll"]


def affine_coupling(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    *,
    squash: str = "tanh",
    clamp: float | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    assert squash == "tanh"
    s = raw_scale.tanh()
    if inverse:
        return (x - shift) * (-s).exp(), -s.sum(1)
    return x * s.exp() + shift, s.sum(1)


def pair_nll(
    za: Tensor,
    zb: Tensor,
    logdet_a: Tensor,
    logdet_b: Tensor,
    shared: Tensor,
    sizes: Sequence[int],
    rho: float,
    *,
    normalized: bool = False,
) -> Tensor:
    m = shared.to(za).repeat_interleave(torch.tensor(list(sizes)), dim=1)
    b = 0.5 * (zb - m * rho * za).square() / (1 - m * rho**2)
    return 0.5 * za.square().sum(1) - logdet_a + b.sum(1) - logdet_b
