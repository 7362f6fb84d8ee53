"""Labels and values of users as numpy arrays."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["MISSING", "checked_latents", "dense", "to_numpy"]

MISSING = -1
"""The label of a sample whose class is not known."""


def to_numpy(values: Tensor | ArrayLike) -> NDArray[Any]:
    """On the CPU, in their type; numpy has no bfloat16, so that becomes float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def checked_latents(where: str, name: str, values: Tensor | ArrayLike) -> NDArray[np.float64]:
    """Finite real numbers ``[n, dim]`` as float64."""
    array = to_numpy(values)
    if array.dtype.kind != "f":
        raise TypeError(f"{where}: {name} is {array.dtype}, expected real floating-point numbers")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{where}: {name} has shape {list(array.shape)}, expected [n, dim] with at least one sample")
    latents: NDArray[np.float64] = array.astype(np.float64)
    if not np.isfinite(latents).all():
        raise ValueError(f"{where}: {name} has NaN or Inf, expected finite numbers")
    return latents


def dense(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Non-negative codes renumbered from 0 without gaps, in their order."""
    if codes.max() < 8 * len(codes):
        present = np.zeros(codes.max() + 1, dtype=bool)
        present[codes] = True
        return (np.cumsum(present) - 1)[codes]
    return np.unique(codes, return_inverse=True)[1]
