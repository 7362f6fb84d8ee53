"""How many nats a factor tells about a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays import MISSING, dense
from ._data import Array, Codes, checked_factors, checked_labels, subset

__all__ = ["factor_label_information", "label_entropy"]

_EQUAL = 1e-6  # of the standard deviation: values that differ by less are one, for bins
_JITTER = 1e-10  # of the standard deviation: makes equal values differ, as the estimator assumes


def factor_label_information(
    factors: Mapping[str, Tensor | ArrayLike],
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    *,
    estimator: Literal["neighbours", "bins"] = "neighbours",
    k: int = 3,
    bins: int = 20,
    max_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Creates the matrix of mutual information between factors and labels, in nats.

    ``estimator="neighbours"`` (Ross) works on whole vectors. With :math:`d_i` the distance from sample i to its k-th
    nearest neighbour of the same class, :math:`m_i` the samples of any class nearer than that (itself included) and
    :math:`N_{y_i}` the samples of its class,

    .. math:: I = \psi(N) + \psi(k) - \langle \psi(N_{y_i}) \rangle - \langle \psi(m_i) \rangle

    with Euclidean distances between standardised dimensions. A class with one sample is left out. In many dimensions
    neighbours are far and the estimate is low: compare factors of similar size, or read it with the leak test.
    ``estimator="bins"`` cuts each dimension into bins of equal counts, for factors of one dimension; it is biased up by
    about (bins - 1)(classes - 1) / 2n nats. A value that alone fills a bin (zeros behind a ReLU) gets one for itself,
    and the other values share the rest of the bins. Values are equal where they differ by less than a millionth of the standard
    deviation.

    Range: 0 (independent) to the label's entropy (the factor tells the label); estimates are cut to it. A concept's
    own factor should be high, all others 0.

    Args:
        factors: name to ``[n, size]``.
        labels: classes from 0, -1 where unknown (those samples are left out for that concept).
        names: of the concepts, one a column.
        estimator: ``"neighbours"`` or ``"bins"``.
        k: neighbours; fewer in a class that is smaller.
        bins: bins per dimension.
        max_samples: at most so many samples are used, drawn by ``seed``; time grows with their square.
        seed: draws them.

    Returns:
        ``nats`` and ``normalised`` (nats over entropy): factor to concept to value; ``entropy``: concept to nats.

    Raises:
        TypeError, ValueError: factors or labels that don't fit, a concept with fewer than two classes, bins for a
            factor of more than one dimension.

    References:
        Ross, Mutual Information between Discrete and Continuous Data Sets, PLoS ONE 9(2), 2014, eq. 2.
        Chen, Li, Grosse, Duvenaud, Isolating Sources of Disentanglement in VAEs, NeurIPS 2018, Sec. 4.1 (normalisation).

    Example:
        >>> label = np.arange(300)[:, None] % 3
        >>> found = factor_label_information({"shape": label.astype(float)}, label, ["shape"])
        >>> round(found["normalised"]["shape"]["shape"], 2)
        1.0
    """
    where = "factor_label_information"
    arrays = checked_factors(where, factors)
    n = len(next(iter(arrays.values())))
    codes = checked_labels(where, labels, names, n)
    if estimator not in ("neighbours", "bins"):
        raise ValueError(f"{where}: estimator is {estimator!r}, expected 'neighbours' or 'bins'")
    rows = subset(n, max_samples, seed)
    codes = checked_labels(where, codes[rows], names, len(rows))
    entropy = {name: label_entropy(codes[:, j]) for j, name in enumerate(names)}
    nats: dict[str, dict[str, float]] = {}
    for factor, part in arrays.items():
        if estimator == "bins":
            if part.shape[1] != 1:
                raise ValueError(f"{where}: {factor!r} has {part.shape[1]} dimensions, expected 1 for estimator='bins'")
            found = [_in_bins(part[rows, 0], codes[:, j], bins) for j in range(len(names))]
        else:
            found = _by_neighbours(part[rows], codes, k, np.random.default_rng(seed))
        nats[factor] = {
            name: float(np.clip(value, 0.0, entropy[name])) for name, value in zip(names, found, strict=True)
        }
    normalised = {factor: {name: value / entropy[name] for name, value in row.items()} for factor, row in nats.items()}
    return {"estimator": estimator, "samples": len(rows), "nats": nats, "normalised": normalised, "entropy": entropy}


def label_entropy(codes: ArrayLike) -> float:
    """Entropy in nats of the known labels (-1 is unknown): 0 for one class, log C for C equally frequent ones."""
    known = np.asarray(codes)
    shares = np.unique(known[known != MISSING], return_counts=True)[1] / max(1, (known != MISSING).sum())
    return float(-(shares * np.log(shares)).sum()) + 0.0


def _by_neighbours(part: Array, codes: Codes, k: int, random: np.random.Generator) -> list[float]:
    """Ross's estimate for each column of ``codes`` ``[n, concepts]``."""
    spread = part.std(0)
    points = (part - part.mean(0)) / np.where(spread > 0, spread, 1.0)
    points = points + _JITTER * random.standard_normal(points.shape)
    x = torch.from_numpy(points)
    n = len(x)
    # Distances by subtraction: by a matrix product, the smallest would drown in rounding.
    mode = "donot_use_mm_for_euclid_dist"
    found = []
    block = max(1, 2**21 // n)
    distance = torch.cat([torch.cdist(x[i : i + block], x, compute_mode=mode) for i in range(0, n, block)])
    for column in codes.T:
        counts = np.bincount(column[column != MISSING])
        used = np.flatnonzero((column != MISSING) & (counts[column] > 1))
        total = inside = neighbours = classes = 0.0
        index = torch.from_numpy(used)
        for label in np.unique(column[used]):
            members = torch.from_numpy(np.flatnonzero(column == label))
            size = len(members)
            nearest = min(k, size - 1)
            radius = distance[members][:, members].kthvalue(nearest + 1, dim=1).values  # the sample itself is the first
            within = (distance[members][:, index] < radius[:, None]).sum(1)
            inside += torch.digamma(within.clamp_min(1).double()).sum().item()
            neighbours += size * torch.digamma(torch.tensor(float(nearest), dtype=torch.float64)).item()
            classes += size * torch.digamma(torch.tensor(float(size), dtype=torch.float64)).item()
            total += size
        if total == 0:
            found.append(0.0)
            continue
        whole = torch.digamma(torch.tensor(total, dtype=torch.float64)).item()
        found.append(whole + (neighbours - classes - inside) / total)
    return found


def _in_bins(values: Array, column: Codes, bins: int) -> float:
    """Plug-in estimate between ``values``, cut into bins, and the known labels."""
    known = column != MISSING
    values, label = values[known], dense(column[known])
    place = _places(values, bins)
    table = np.zeros((place.max() + 1, label.max() + 1))
    np.add.at(table, (place, label), 1.0)
    table /= len(values)
    independent = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    filled = table > 0
    return float((table[filled] * np.log(table[filled] / independent[filled])).sum())


def _places(values: Array, bins: int) -> Codes:  # [n], [n]
    """The bin of each value: of about equal counts, where a value as frequent as a bin has one for itself."""
    spread = values.std()
    if spread > 0:  # noise of rounding would spread a value over bins, and rare ones would share a bin with some of it
        values = np.round((values - values.mean()) / (_EQUAL * spread))
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    alone = np.zeros(len(counts), dtype=bool)
    while True:  # the more rows are in bins of their own, the smaller the other bins
        left, rows = bins - alone.sum(), counts[~alone].sum()
        frequent = ~alone & (counts * left >= rows)
        if not frequent.any():
            break
        alone |= frequent
    place = np.empty(len(counts), dtype=np.int64)
    place[alone] = np.arange(alone.sum())
    others = counts[~alone]
    middle = others.cumsum() - (others + 1) // 2  # the row in the middle of each value's rows
    place[~alone] = alone.sum() + middle * left // max(1, rows)
    return place[index]
