"""How likely held-out latents are, and how exactly they come back."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays import checked_latents
from ..iin import IIN

__all__ = ["gaussian_nats_per_dim", "invertibility_error", "nats_per_dim", "normal_nats_per_dim"]


@torch.no_grad()
def nats_per_dim(model: IIN, z: Tensor, batch: int = 1024, *, context: Tensor | None = None) -> float:
    r"""The negative log-likelihood of latents ``[n, dim]`` under the model, in nats per dimension.

    .. math:: -\frac{1}{nN} \sum_i \log p(z_i) = \frac{1}{nN} \sum_i
              \left(\tfrac12 \|T(z_i)\|^2 + \tfrac N2 \log 2\pi - \log|\det T'(z_i)|\right)

    Any real number; lower is better, and only for the same latents comparable: scaling z by c adds log c. With the
    ``context`` ``[n, context_dim]`` of a conditional model it is that of p(z | context).

    References:
        Esser, Rombach, Ommer, CVPR 2020, Sec. 3.1. Papamakarios et al., Masked Autoregressive Flow, NeurIPS 2017.
    """
    z = _latents("nats_per_dim", z, model)
    total = sum(model.log_prob(*rows).double().sum().item() for rows in in_parts(model, batch, z, context))
    return -total / z.numel()


def normal_nats_per_dim(z: Tensor | ArrayLike) -> float:
    """Negative log-likelihood under N(0, 1), in nats per dimension: a baseline that knows nothing of the latents."""
    x = checked_latents("normal_nats_per_dim", "z", z)
    return float(0.5 * np.mean(x * x) + 0.5 * math.log(2 * math.pi))


def gaussian_nats_per_dim(z: Tensor | ArrayLike, train: Tensor | ArrayLike) -> float:
    """Negative log-likelihood under the Gaussian of the training latents, in nats per dimension: the linear baseline.

    Mean and covariance are those of ``train`` ``[m, dim]``; the covariance is shrunk towards its mean variance by
    dim / (dim + m), so that it is not singular.
    """
    x, t = checked_latents("gaussian_nats_per_dim", "z", z), checked_latents("gaussian_nats_per_dim", "train", train)
    m, dim = t.shape
    if x.shape[1] != dim:
        raise ValueError(f"gaussian_nats_per_dim: z has {x.shape[1]} dimensions, expected {dim} like train")
    centred = t - t.mean(0)
    covariance = centred.T @ centred / m
    share = dim / (dim + m)
    floor = (
        float(np.trace(covariance)) / dim or 1e-12 * float(np.mean(t * t)) or 1e-12
    )  # of constants, and of zeros alone
    covariance = (1 - share) * covariance + share * floor * np.eye(dim)
    logdet = np.linalg.slogdet(covariance)[1]
    offset = x - t.mean(0)
    square = (offset * np.linalg.solve(covariance, offset.T).T).sum(1).mean()
    return float(0.5 * (square + logdet + dim * math.log(2 * math.pi)) / dim)


@torch.no_grad()
def invertibility_error(model: IIN, z: Tensor, batch: int = 1024, *, context: Tensor | None = None) -> dict[str, float]:
    """``max`` and ``median`` of ``|T^-1(T(z)) - z|`` over all elements of ``z`` ``[n, dim]``.

    ``context`` is that of a conditional model. 0 would be exact; float32 gives about 1e-6 times the size of z, more for a badly conditioned flow. Lower is better.

    References:
        Behrmann, Vicol, Wang, Grosse, Jacobsen, Understanding and Mitigating Exploding Inverses in Invertible Neural
        Networks, AISTATS 2021.
    """
    z = _latents("invertibility_error", z, model)
    parts = [
        (model.decode(model.encode(part, given), given) - part).abs().double()
        for part, given in in_parts(model, batch, z, context)
    ]
    error = torch.cat(parts)
    return {"max": error.max().item(), "median": error.median().item()}


def in_parts(model: IIN, batch: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors ``[n, …]``, ``batch`` at a time, where the model is and in its type; None stays None."""
    n = next(len(tensor) for tensor in tensors if tensor is not None)
    for start in range(0, n, batch):
        rows = slice(start, start + batch)
        yield tuple(None if x is None else x[rows].to(model.device, model.dtype) for x in tensors)  # type: ignore[misc]


def _latents(where: str, z: Tensor, model: IIN) -> Tensor:
    if not isinstance(z, Tensor):
        raise TypeError(f"{where}: z is a {type(z).__name__}, expected a torch.Tensor [n, dim]")
    if z.dim() != 2 or z.shape[0] == 0 or z.shape[1] != model.dim:
        raise ValueError(f"{where}: z has shape {list(z.shape)}, expected [n, {model.dim}] with at least one sample")
    return z.to(model.device, model.dtype)
