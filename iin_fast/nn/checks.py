"""Checks of what users pass to modules."""

from torch import Tensor

__all__ = ["check_features"]


def check_features(where: str, name: str, x: Tensor, dim: int) -> None:
    """Refuse anything but a floating ``[batch, dim]``.

    Raises:
        ValueError: another rank or feature count.
        TypeError: not a tensor, or an integer, boolean or complex one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: {name} is a {type(x).__name__}, expected a torch.Tensor")
    if x.dim() != 2:
        raise ValueError(
            f"{where}: {name} has shape {list(x.shape)}, expected [batch, {dim}]; "
            f"bring it to two dimensions, for one sample with {name}[None]"
        )
    if x.shape[1] != dim:
        raise ValueError(f"{where}: {name} has {x.shape[1]} features (shape {list(x.shape)}), expected [batch, {dim}]")
    if not x.is_floating_point():
        raise TypeError(f"{where}: {name} has dtype {x.dtype}, expected a floating type; convert with {name}.float()")
