"""Checks of what users pass, for the whole package: each error names the caller, the argument, what came and what was expected."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from .ops.types import FLOATING

__all__ = [
    "HOOKS",
    "autocast_enabled",
    "broadcast_shapes",
    "check_device",
    "check_dtype",
    "check_features",
    "check_floating",
    "check_kind",
    "check_latents",
    "check_like",
    "check_rank",
    "check_shape",
    "checked_choice",
    "checked_dtype",
    "checked_flag",
    "checked_int",
    "checked_ints",
    "checked_net",
    "checked_number",
    "checked_seed",
    "readable",
    "version",
]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` is; torch can't be asked for tensors without data."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""What a module holds its hooks in."""


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """As torch.broadcast_shapes, whose first call loads sympy: half a second."""
    if torch.compiler.is_compiling():
        return torch.broadcast_shapes(*shapes)
    return torch.broadcast_tensors(*(torch.empty(shape, device="meta") for shape in shapes))[0].shape  # type: ignore[no-untyped-call, no-any-return]


def readable(tensor: Tensor) -> bool:
    """Whether a tensor has values, as those on the meta device, torch's fake ones and those that vmap maps have not."""
    if tensor.is_meta or type(tensor).__name__ == "FakeTensor":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def version(tensor: Tensor) -> int:
    """Counts what has been written into a tensor; -1 for one that does not count."""
    return -1 if tensor.is_inference() else tensor._version


def checked_int(where: str, name: str, value: object, least: int = 1) -> int:
    """``value`` as an int of at least ``least``; TypeError and ValueError name ``where`` and ``name``."""
    expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
    try:
        if isinstance(value, bool):
            raise TypeError
        # operator.index would make torch.compile take a size that varies as a constant
        number = value if isinstance(value, int) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{where}: {name} is {value!r}, expected {expected}") from None
    if number < least:
        raise ValueError(f"{where}: {name} is {number}, expected {expected}")
    return number


def checked_seed(where: str, seed: object, name: str = "seed") -> int:
    """``seed`` as an int of the range that torch's generators take, from 0; TypeError and ValueError name ``where`` and ``name``."""
    number = checked_int(where, name, seed, least=0)
    if number >= 2**64:
        raise ValueError(f"{where}: {name} is {number}, expected an integer below 2**64")
    return number


def checked_ints(where: str, name: str, values: object, least: int = 1) -> list[int]:
    """``values`` as a list of ints of at least ``least`` each."""
    single = isinstance(values, str | bytes) or (isinstance(values, Tensor) and not values.dim())
    if single or not isinstance(values, Iterable):
        raise TypeError(f"{where}: {name} is {values!r}, expected a list of integers")
    return [checked_int(where, f"{name}[{i}]", value, least) for i, value in enumerate(values)]


def checked_number(
    where: str,
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """``value`` as a finite float within bounds; TypeError and ValueError name ``where`` and ``name``."""
    number = math.nan
    # Not a tensor: its gradient would be lost, and reading it waits for the device.
    typed = not isinstance(value, bool | Tensor) and isinstance(value, (float, int, SupportsFloat))
    if typed:
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError):  # an array of several, an int beyond all floats
            typed = False
    # Comparisons, which NaN fails: math.isfinite is nothing that torch.compile could trace.
    fits = (-math.inf if above is None else above) < number < (math.inf if below is None else below)
    if fits and (least is None or number >= least):
        return number
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", least), ("above", above), ("below", below))
        if bound is not None
    ]
    expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
    raise (ValueError if typed else TypeError)(f"{where}: {name} is {value!r}, expected {expected}")


def checked_flag(where: str, name: str, value: object) -> bool:
    """``value``, which is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} is {value!r}, expected True or False")
    return value


def checked_choice(where: str, name: str, value: Any, choices: Sequence[Any]) -> Any:
    """``value``, which is one of ``choices``."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{where}: {name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def checked_net(where: str, name: str, value: Any) -> Any:
    """``value``, which can be called."""
    if not callable(value):
        raise TypeError(f"{where}: {name} is {value!r}, expected a torch.nn.Module")
    return value


def checked_dtype(where: str, dtype: object) -> None:
    """Refuse what is no type of parameters; None is torch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{where}: dtype is {dtype!r}, expected a real floating-point type, such as torch.float32")


def check_kind(where: str, name: str, value: object, dtype: torch.dtype, expected: str) -> None:
    """A tensor of a type that is not floating; ``expected`` says it in words."""
    if not isinstance(value, Tensor) or value.dtype != dtype:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{where}: {name} is {got}, expected {expected}")


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


def check_features(where: str, name: str, x: Tensor, dim: int) -> None:
    """Refuse anything but a floating ``[batch, dim]``.

    Raises:
        ValueError: another rank or feature count.
        TypeError: not a tensor, or an integer, boolean or complex one.
    """
    check_floating(where, name, x)
    check_rank(where, name, x, f"[batch, {dim}]; give one sample as {name}[None]", 2)
    if x.shape[1] != dim:
        raise ValueError(f"{where}: {name} has shape {list(x.shape)}, expected [batch, {dim}]")


def check_latents(where: str, latents: Iterable[tuple[str, Tensor]], dim: int, like: Tensor) -> None:
    """Floating tensors ``[batch, dim]`` of one shape, with the device and (without autocast) dtype of ``like``."""
    first: tuple[str, Tensor] | None = None
    for name, z in latents:
        check_floating(where, name, z)
        check_rank(where, name, z, f"[batch, {dim}]", 2)
        check_shape(where, name, z, (z.shape[0], dim), "([batch, dim])")
        if z.device != like.device:
            raise ValueError(f"{where}: {name} is on {z.device}, expected {like.device}; move it with .to(…)")
        if not autocast_enabled(z):
            check_dtype(where, name, z, like.dtype, "like the model; convert it with .to(…)")
        if first is None:
            first = name, z
        check_shape(where, name, z, first[1].shape, f"like {first[0]}")
        check_dtype(where, name, z, first[1].dtype, f"like {first[0]}")
