"""Affine coupling in plain torch: the executable definition that every backend is tested against."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import accumulator_type

__all__ = ["SQUASHES", "Squash", "affine_coupling"]


class Squash(NamedTuple):
    """What maps a raw scale to the log-scale s."""

    code: int
    """In csrc/affine_coupling/affine_coupling.h and in the text of a flow program."""
    log_scale: Callable[[Tensor, float], Tensor]
    """(raw, clamp) -> s"""
    clamp: float = 1.0
    """Its default."""
    clamp_is: Literal["no option", "bound of |s|", "least scale"] = "no option"


SQUASHES = {
    "identity": Squash(0, lambda raw, _: raw),
    "tanh": Squash(1, lambda raw, clamp: clamp * torch.tanh(raw), 1.0, "bound of |s|"),
    "atan": Squash(2, lambda raw, clamp: clamp * 0.636 * torch.atan(raw), 2.0, "bound of |s|"),
    "sigmoid": Squash(3, lambda raw, _: torch.log(torch.sigmoid(raw + 2) + 1e-3)),
    "none": Squash(4, lambda raw, _: torch.zeros_like(raw)),
    # torch's softplus has a step at its threshold
    "softplus": Squash(5, lambda raw, clamp: torch.log(clamp - F.logsigmoid(-raw)), 1e-3, "least scale"),
    "softclip": Squash(6, lambda raw, clamp: raw / (1 + raw.abs() / clamp), math.log(1e3), "bound of |s|"),
}


def affine_coupling(
    x: Tensor,  # [batch, ...]
    raw_scale: Tensor | None,  # [batch, ...]
    shift: Tensor,  # [batch, ...]
    squash: str,
    clamp: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:  # [batch, ...], [batch]
    wide = accumulator_type(x.dtype)
    v, t = x.to(wide), shift.to(wide)
    if raw_scale is None:
        y = v - t if inverse else v + t
        return y.to(x.dtype), v.new_zeros(x.shape[0])
    s = SQUASHES[squash].log_scale(raw_scale.to(wide), clamp)
    y = (v - t) * torch.exp(-s) if inverse else v * torch.exp(s) + t
    logdet = s.flatten(1).sum(1) if x.dim() > 1 else s
    return y.to(x.dtype), -logdet if inverse else logdet
