"""Checks of what users pass to modules."""

from torch import Tensor

from ..ops.checks import check_floating, check_rank

__all__ = ["check_features"]


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
