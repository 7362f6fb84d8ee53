"""Checks that the method's modules share: each names the caller, the argument, what came and what was expected."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["check_latents", "positive_int"]


def positive_int(where: str, name: str, value: object) -> int:
    """``value`` as an int of at least 1; TypeError and ValueError name ``where`` and ``name``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{where}: {name} is {value!r}, expected a positive integer") from None
    if number < 1:
        raise ValueError(f"{where}: {name} is {number}, expected a positive integer")
    return number


def check_latents(where: str, latents: Iterable[tuple[str, Tensor]], dim: int, device: torch.device) -> None:
    """Floating-point tensors ``[batch, dim]`` of one batch size, on ``device``."""
    first = None  # [batch, dim] of the first latent
    for name, z in latents:
        if not isinstance(z, Tensor):
            raise TypeError(f"{where}: {name} is a {type(z).__name__}, expected a torch.Tensor [batch, {dim}]")
        if z.dim() != 2 or z.shape[1] != dim:
            raise ValueError(f"{where}: {name} has shape {list(z.shape)}, expected [batch, {dim}]")
        if not z.is_floating_point():
            raise TypeError(f"{where}: {name} is {z.dtype}, expected a real floating-point type")
        if z.device != device:
            raise ValueError(f"{where}: {name} is on {z.device}, expected {device}; move it with .to({str(device)!r})")
        if first is None:
            first, first_name = z, name
        elif z.shape != first.shape:
            raise ValueError(f"{where}: {name} has shape {list(z.shape)}, expected {list(first.shape)} like {first_name}")
        elif z.dtype != first.dtype:
            raise TypeError(f"{where}: {name} is {z.dtype}, expected {first.dtype} like {first_name}")
