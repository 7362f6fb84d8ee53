"""How much pairs that share a concept have in common, factor by factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays import MISSING, to_numpy
from ._data import Array, Codes, checked_factors, checked_labels

__all__ = ["pair_correlation", "shared_correlation"]


def pair_correlation(
    factors: Mapping[str, Tensor | ArrayLike],
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    *,
    pairs: int = 20000,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    r"""Creates the correlation of each factor over pairs with the same, and with different classes of each concept.

    .. math:: \mathrm{corr}_F = \frac{\sum_{i \in F} \mathrm{Cov}(\tilde z^a_i, \tilde z^b_i)}
                                     {\sum_{i \in F} \mathrm{Var}(\tilde z_i)}

    around the mean of all samples. The classes of a concept are drawn evenly, then rows evenly; the other concepts are
    free. Range -1 to 1. The loss asks for ρ in the concept's own factor over pairs with the same class (``same``), and
    for 0 everywhere else. In a factor that tells C classes apart, pairs of different classes have about
    -1 / (C - 1) times the share of its variance that the class explains. Over pairs of the same class that share is
    also the most that ρ can reach, so a factor that varies within a class stays below it.

    Args:
        factors: name to ``[n, size]``.
        labels: classes from 0, -1 where unknown.
        names: of the concepts.
        pairs: how many of each kind.
        seed: draws them.

    Returns:
        ``same`` and ``different``: factor to concept to correlation.

    References:
        Esser, Rombach, Ommer, CVPR 2020, Sec. 3.2 (σ_ab) and "Estimating Dimensionality of Factors".
    """
    arrays = checked_factors("pair_correlation", factors)
    n = len(next(iter(arrays.values())))
    codes = checked_labels("pair_correlation", labels, names, n)
    random = np.random.default_rng(seed)
    same: dict[str, dict[str, float]] = {factor: {} for factor in arrays}
    different: dict[str, dict[str, float]] = {factor: {} for factor in arrays}
    for j, name in enumerate(names):
        column = codes[:, j]
        members = [np.flatnonzero(column == label) for label in np.unique(column[column != MISSING])]
        shared = _pairs([m for m in members if len(m) > 1], True, pairs, random)
        apart = _pairs(members, False, pairs, random)
        for factor, part in arrays.items():
            same[factor][name] = _correlation(part, *shared) if shared else float("nan")
            different[factor][name] = _correlation(part, *apart) if apart else float("nan")
            if not np.isfinite(same[factor][name]):
                raise ValueError(f"pair_correlation: labels of {name!r} have no two samples of one class")
    return {"same": same, "different": different}


def shared_correlation(
    factors: Mapping[str, Tensor | ArrayLike],
    shared: Tensor | ArrayLike,  # [pairs, concepts]
    names: Sequence[str],
) -> dict[str, dict[str, dict[str, float]]]:
    r"""Creates the correlation of each factor over ready pairs that share a concept, and over those that do not.

    The quantity is that of :func:`pair_correlation`, for pairs of which no label is known. The loss asks for ρ in the
    concept's own factor over pairs that share it, and for 0 in every factor that a pair does not share. What varies in
    the concept between two samples that share it lowers what ρ can be reached.

    Args:
        factors: name to ``[2 × pairs, size]``: the first samples, then the second ones.
        shared: bool, what pair i has in common.
        names: of the concepts, the columns of ``shared``.

    Returns:
        ``shared`` and ``apart``: factor to concept to correlation, -1 to 1; a concept without such pairs is left out.

    Raises:
        TypeError, ValueError: factors and ``shared`` that don't fit each other.

    References:
        Esser, Rombach, Ommer, CVPR 2020, Sec. 3.2.

    Example:
        >>> from iin_fast.evaluate import shared_correlation
        >>> za, noise = np.random.default_rng(0).standard_normal((2, 2000, 1))
        >>> zb = np.where(np.arange(2000)[:, None] % 2, noise, za)  # every other pair has it in common
        >>> shared = np.arange(2000)[:, None] % 2 == 0
        >>> found = shared_correlation({"digit": np.concatenate([za, zb])}, shared, ["digit"])
        >>> round(found["shared"]["digit"]["digit"], 1), abs(round(found["apart"]["digit"]["digit"], 1))
        (1.0, 0.0)
    """
    where = "shared_correlation"
    arrays = checked_factors(where, factors)
    n = len(next(iter(arrays.values())))
    mask = to_numpy(shared)
    if mask.dtype != bool:
        raise TypeError(f"{where}: shared is {mask.dtype}, expected bool")
    if mask.shape != (n // 2, len(names)) or n % 2:
        expected = f"[{n / 2:g}, {len(names)}], a row for each pair of the {n} samples and a column for each name"
        raise ValueError(f"{where}: shared has shape {list(mask.shape)}, expected {expected}")
    found: dict[str, dict[str, dict[str, float]]] = {kind: {f: {} for f in arrays} for kind in ("shared", "apart")}
    for k, name in enumerate(names):
        for kind, rows in (("shared", np.flatnonzero(mask[:, k])), ("apart", np.flatnonzero(~mask[:, k]))):
            for factor, part in arrays.items():
                if len(rows):
                    found[kind][factor][name] = _correlation(part, rows, rows + n // 2)
    return found


def _pairs(members: list[Codes], equal: bool, pairs: int, random: np.random.Generator) -> tuple[Codes, Codes] | None:
    """Rows a and b of one class and two samples, or of two classes."""
    if not members:
        return None
    size = np.array([len(m) for m in members])
    order = np.concatenate(members)
    start = np.cumsum(size) - size
    first = random.integers(len(members), size=pairs)
    place = random.integers(size[first])
    if equal:
        second = first
        other = random.integers(size[first] - 1)
        other = other + (other >= place)
    else:
        drawn = random.integers(len(members) - 1, size=pairs)
        second = drawn + (drawn >= first)
        other = random.integers(size[second])
    return order[start[first] + place], order[start[second] + other]


def _correlation(part: Array, a: Codes, b: Codes) -> float:
    x, y = part[a] - part.mean(0), part[b] - part.mean(0)
    variance = 0.5 * ((x * x).sum() + (y * y).sum())
    return float((x * y).sum() / variance) if variance > 0 else 0.0
