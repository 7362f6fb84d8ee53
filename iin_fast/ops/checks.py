"""Checks of arguments that all ops share. Each error names the op, the argument, what came and what was expected."""

import math
import operator
from typing import SupportsFloat

import torch
from torch import Tensor

__all__ = [
    "autocast_enabled",
    "check_device",
    "check_dtype",
    "check_floating",
    "check_like",
    "check_rank",
    "check_shape",
    "checked_int",
    "checked_number",
]

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` is; torch can't be asked for tensors without data."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


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


def checked_number(where: str, name: str, value: object) -> float:
    """``value`` as a finite float; TypeError and ValueError name ``where`` and ``name``."""
    if isinstance(value, bool) or not isinstance(value, (float, int, SupportsFloat)):
        raise TypeError(f"{where}: {name} is {value!r}, expected a finite number")
    number = float(value)
    if not -math.inf < number < math.inf:  # math.isfinite is nothing that torch.compile could trace
        raise ValueError(f"{where}: {name} is {number}, expected a finite number")
    return number


def check_floating(op: str, name: str, value: object, allowed: tuple[torch.dtype, ...] = FLOATING) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in allowed:
        raise TypeError(
            f"{op}: {name} has dtype {_short(value.dtype)}, expected one of {', '.join(map(_short, allowed))}"
        )
    return value


def check_rank(op: str, name: str, value: Tensor, expected: str, *ranks: int) -> None:
    if value.dim() not in ranks:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, expected {expected}")


def check_shape(op: str, name: str, value: Tensor, shape: tuple[int, ...] | torch.Size, like: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, expected {list(shape)} {like}")


def check_dtype(op: str, name: str, value: Tensor, dtype: torch.dtype, like: str) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {_short(value.dtype)}, expected {_short(dtype)} {like}")


def check_like(op: str, name: str, value: object, shape: torch.Size, like: str, x: Tensor, x_name: str = "x") -> None:
    """A floating tensor of this shape, with the device and, without autocast, the dtype of the floating tensor ``x``."""
    if isinstance(value, Tensor) and value.dtype == x.dtype and value.device == x.device and value.shape == shape:
        return
    tensor = check_floating(op, name, value)
    check_device(op, name, tensor, x, x_name)
    check_shape(op, name, tensor, shape, like)
    if not autocast_enabled(x):
        check_dtype(op, name, tensor, x.dtype, f"like {x_name}")


def check_device(op: str, name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, expected {like.device} like {like_name}")
