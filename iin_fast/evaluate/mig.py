"""The mutual information gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor

from ._data import checked_factors, single_dimensions
from .information import factor_label_information

__all__ = ["gap", "mig"]


def mig(
    factors: Mapping[str, Tensor | ArrayLike],
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    *,
    dimensions: bool = False,
    max_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Creates the mutual information gap: how much more the best factor knows of a concept than the second best.

    .. math:: \mathrm{MIG} = \frac1K \sum_k \frac{I(\tilde z_{(1)}; y_k) - I(\tilde z_{(2)}; y_k)}{H(y_k)}

    Range 0 (two factors know the same) to 1 (one factor knows it all, the others nothing); higher is better. The paper
    takes single dimensions, which ``dimensions=True`` does (with bins); a factor of several dimensions, as an IIN has,
    is then punished for spreading its concept within itself, so by default whole factors are compared (with
    neighbours). The estimators and arguments are those of :func:`factor_label_information`.

    Returns:
        ``mig``; and ``gaps``, concept to its own gap.

    References:
        Chen, Li, Grosse, Duvenaud, Isolating Sources of Disentanglement in VAEs, NeurIPS 2018, Sec. 4.1, eq. 6.
    """
    arrays = checked_factors("mig", factors)
    if dimensions:
        arrays = single_dimensions(arrays)
    found = factor_label_information(
        arrays,
        labels,
        names,
        estimator="bins" if dimensions else "neighbours",
        max_samples=max_samples,
        seed=seed,
    )
    gaps = gap(found["normalised"], names)
    return {"mig": sum(gaps.values()) / len(gaps), "gaps": gaps}


def gap(scores: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """For each concept, the best factor's score less the second best's (less 0 where there is one factor)."""
    gaps = {}
    for name in names:
        best, second, *_ = sorted((row[name] for row in scores.values()), reverse=True) + [0.0]
        gaps[name] = best - second
    return gaps
