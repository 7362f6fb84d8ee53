"""Checks that the method's modules share: each names the caller, the argument, what came and what was expected."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops.checks import check_dtype, check_floating, check_rank, check_shape

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
    """Floating-point tensors ``[batch, dim]`` of one shape and dtype, on ``device``."""
    first: tuple[str, Tensor] | None = None
    for name, z in latents:
        check_floating(where, name, z)
        check_rank(where, name, z, f"[batch, {dim}]", 2)
        check_shape(where, name, z, (z.shape[0], dim), "([batch, dim])")
        if z.device != device:
            raise ValueError(f"{where}: {name} is on {z.device}, expected {device}; move it with .to({str(device)!r})")
        if first is None:
            first = name, z
        check_shape(where, name, z, first[1].shape, f"like {first[0]}")
        check_dtype(where, name, z, first[1].dtype, f"like {first[0]}")
