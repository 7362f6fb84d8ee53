"""Checks that the method's modules share: each names the caller, the argument, what came and what was expected."""

from collections.abc import Iterable

from torch import Tensor

from ..ops.checks import autocast_enabled, check_dtype, check_floating, check_rank, check_shape, checked_int

__all__ = ["check_latents", "checked_int"]


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
