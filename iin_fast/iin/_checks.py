"""Checks that the method's modules share: each names the caller, the argument, what came and what was expected."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops.checks import check_dtype, check_floating, check_rank, check_shape

__all__ = ["check_latents", "checked_int"]


def checked_int(where: str, name: str, value: object, least: int = 1) -> int:
    """``value`` as an int of at least ``least``; TypeError and ValueError name ``where`` and ``name``."""
    expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{where}: {name} is {value!r}, expected {expected}") from None
    if number < least:
        raise ValueError(f"{where}: {name} is {number}, expected {expected}")
    return number


def check_latents(where: str, latents: Iterable[tuple[str, Tensor]], dim: int, like: Tensor) -> None:
    """Floating tensors ``[batch, dim]`` of one shape, with the device and (without autocast) dtype of ``like``."""
    first: tuple[str, Tensor] | None = None
    for name, z in latents:
        check_floating(where, name, z)
        check_rank(where, name, z, f"[batch, {dim}]", 2)
        check_shape(where, name, z, (z.shape[0], dim), "([batch, dim])")
        if z.device != like.device:
            raise ValueError(f"{where}: {name} is on {z.device}, expected {like.device}; move it with .to(…)")
        if not torch.is_autocast_enabled(z.device.type):
            check_dtype(where, name, z, like.dtype, "like the model; convert it with .to(…)")
        if first is None:
            first = name, z
        check_shape(where, name, z, first[1].shape, f"like {first[0]}")
        check_dtype(where, name, z, first[1].dtype, f"like {first[0]}")
