"""Directions inside a factor along which a person can move a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import checked_int
from ..iin import Factors

__all__ = ["Axis", "axes_of", "principal_axes"]

MOST_CLASSES = 10  # sliders of one factor; more can't be looked through
MOST_DIRECTIONS = 3


@dataclass(frozen=True)
class Axis:
    """A direction inside one factor.

    Attributes:
        name: what it is called on the page; no two axes of a factor share one.
        direction: ``[dim]``, 0 outside the factor. Position 1 adds all of it.
        low, high: how far a slider goes.
    """

    name: str
    direction: Tensor
    low: float
    high: float


def principal_axes(factors: Factors, name: str, most: int = MOST_DIRECTIONS) -> Tensor:
    r"""The directions in which a factor varies most over samples: ``[directions, dim]``, each one standard deviation long.

    .. math:: v_k = \sqrt{\lambda_k}\, u_k, \quad \operatorname{Cov}(\tilde z_\text{name})\, u_k = \lambda_k u_k

    The largest variance comes first. A direction's sign is that of its largest entry, made positive. In all other
    factors the directions are 0.

    Args:
        factors: of the samples, two at least.
        name: of the factor.
        most: how many directions; a factor has no more than its size.

    Raises:
        TypeError, ValueError: one sample alone, an unknown factor.

    Example:
        >>> from iin_fast import Factors
        >>> factors = Factors({"size": torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]), "residual": torch.zeros(4, 1)})
        >>> principal_axes(factors, "size")
        tensor([[2.4495, 0.0000, 0.0000],
                [0.0000, 0.8165, 0.0000]])
    """
    where = "principal_axes"
    checked_int(where, "most", most)
    if not isinstance(factors, Factors):
        raise TypeError(f"{where}: factors is a {type(factors).__name__}, expected iin_fast.Factors")
    if name not in factors:
        raise ValueError(f"{where}: name is {name!r}, expected one of {list(factors)}")
    part = factors[name].double()
    if len(part) < 2:
        raise ValueError(f"{where}: factors have {len(part)} samples, expected two at least")
    values, vectors = torch.linalg.eigh(part.T.cov().reshape(part.shape[1], -1))
    found = (vectors * values.clamp(min=0).sqrt()).T.flip(0)[:most]
    found = found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
    axes = found.new_zeros(len(found), factors.tensor.shape[1])
    axes[:, _place(factors, name)] = found
    return axes.to(factors.tensor.dtype)


def axes_of(factors: Factors, name: str, codes: Tensor | None = None, classes: Sequence[str] = ()) -> dict[str, Axis]:
    """The axes of one factor by name: to its classes where samples have labels of it, and its principal directions.

    A class axis leads from the mean of all other labelled samples to the mean of the class, as ``IIN.axis`` does.

    Args:
        factors: of the samples.
        name: of the factor.
        codes: classes of the concept of that name, ``[samples]``, -1 where unknown; or None. The ten most frequent
            classes get an axis.
        classes: what the codes stand for, where the labels were texts: in the names of axes.
    """
    axes: list[Axis] = []
    if codes is not None:
        known, counts = codes[codes >= 0].unique(return_counts=True)
        frequent = known[counts.argsort(descending=True, stable=True)[:MOST_CLASSES]].sort().values
        for code in frequent.tolist() if len(known) > 1 else ():
            direction = torch.zeros_like(factors.tensor[0])
            own, other = factors[name][codes == code], factors[name][(codes >= 0) & (codes != code)]
            direction[_place(factors, name)] = own.mean(0) - other.mean(0)
            text = classes[code] if code < len(classes) else code
            axes.append(Axis(f"to {name} {text}", direction, -1.0, 2.0))
    for number, direction in enumerate(principal_axes(factors, name)):
        axes.append(Axis(f"direction {number + 1}", direction, -3.0, 3.0))
    return {axis.name: axis for axis in axes}


def _place(factors: Factors, name: str) -> slice:
    """Where a factor lies among the features."""
    start = 0
    for other, size in factors.sizes.items():
        if other == name:
            break
        start += size
    return slice(start, start + factors.sizes[name])
