"""Affine coupling in plain torch: the executable definition that every backend is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import accumulator_type

__all__ = ["affine_coupling", "log_scale"]


def log_scale(raw: Tensor, squash: str, clamp: float) -> Tensor:
    """s of raw, for every squash but "none"."""
    if squash == "identity":
        return raw
    if squash == "tanh":
        return clamp * torch.tanh(raw)
    if squash == "atan":
        return clamp * 0.636 * torch.atan(raw)
    if squash == "sigmoid":
        return torch.log(torch.sigmoid(raw + 2) + 1e-3)
    if squash == "softplus":  # of flow programs, as softclip
        return torch.log(clamp - F.logsigmoid(-raw))  # torch's softplus has a step at its threshold
    if squash == "softclip":
        return raw / (1 + raw.abs() / clamp)
    raise ValueError(f"affine_coupling: squash {squash!r} has no scale")


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
    s = log_scale(raw_scale.to(wide), squash, clamp)
    y = (v - t) * torch.exp(-s) if inverse else v * torch.exp(s) + t
    logdet = s.flatten(1).sum(1) if x.dim() > 1 else s
    return y.to(x.dtype), -logdet if inverse else logdet
