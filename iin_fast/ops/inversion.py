"""What backward by inversion tells of itself."""

import itertools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .autograd import has_values

__all__ = ["check_inverse"]

_inverted = itertools.count(1)  # backward passes that inverted
_warned: list[float] = []  # the error that was warned of


@torch.no_grad()
def check_inverse(op: str, x: Tensor, back: Callable[[Tensor], Tensor]) -> None:
    """Warn where the inverse does not lead back to the input. It is tried on a few rows, at calls 1, 2, 4, 8, …

    Args:
        op: who warns.
        x: the input that backward recovers.
        back: numbers of rows -> those rows, from the output.
    """
    if not has_values(x) or torch._C._len_torch_dispatch_stack() or x.shape[0] == 0 or _warned:
        return  # nothing to look at, or somebody who counts ops
    number = next(_inverted)
    if number & (number - 1):
        return
    rows = torch.arange(0, x.shape[0], -(-x.shape[0] // 16), device=x.device)
    wanted = x[rows].double()
    error = ((back(rows).double() - wanted).abs().max() / wanted.abs().max()).item()
    if error > torch.finfo(x.dtype).eps ** 0.5:
        _warned.append(error)
        warnings.warn(
            f"{op}: with memory='invert' backward recovers its input from the output to {error:.1e} of its size "
            f"({len(rows)} rows, {x.dtype}), and gradients are as wrong or worse; use memory='auto', or float64",
            RuntimeWarning,
            stacklevel=2,
        )
