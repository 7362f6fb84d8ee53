"""Disentanglement, completeness and informativeness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays import MISSING
from ._data import Array, require_sklearn
from .probe import above_chance, balanced_accuracy, train_and_test

__all__ = ["dci", "dci_from_importances"]


def dci(
    factors: Mapping[str, Tensor | ArrayLike],
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    *,
    dimensions: bool = False,
    train_factors: Mapping[str, Tensor | ArrayLike] | None = None,
    train_labels: Tensor | ArrayLike | None = None,
    max_samples: int = 2000,
    trees: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Creates disentanglement, completeness and informativeness.

    A random forest reads each concept k from all dimensions; its impurity importances, summed over the dimensions of
    factor i, are :math:`R_{ik}`. With F factors, K concepts, :math:`P_{ik} = R_{ik} / \sum_k R_{ik}` and
    :math:`\tilde P_{ik} = R_{ik} / \sum_i R_{ik}`,

    .. math::
        D = \sum_i \frac{\sum_k R_{ik}}{\sum_{ik} R_{ik}} \left(1 + \sum_k P_{ik} \log_K P_{ik}\right), \quad
        C = \sum_k \frac{\sum_i R_{ik}}{\sum_{ik} R_{ik}} \left(1 + \sum_i \tilde P_{ik} \log_F \tilde P_{ik}\right)

    D: each factor serves one concept. C: each concept is served by one factor. I: the forest's balanced accuracy on
    samples apart, rescaled so that chance is 0. All range from 0 to 1; higher is better. The paper's importances are
    those of single dimensions (``dimensions=True``) from a lasso or a random forest, its I an error. A forest gives
    noise dimensions a little importance, so a large residual keeps D and C somewhat below 1. With one concept D is 1,
    with one factor C is 1, whatever the data.

    Args:
        factors, labels, names, train_factors, train_labels, max_samples, seed: as for :func:`leak`.
        dimensions: take single dimensions, not whole factors.
        trees: of each forest.

    Returns:
        ``disentanglement``, ``completeness``, ``informativeness``; ``importances``: factor to concept (not for
        ``dimensions``), each concept's summing to 1.

    References:
        Eastwood, Williams, A Framework for the Quantitative Evaluation of Disentangled Representations, ICLR 2018, Sec. 2.
    """
    require_sklearn("dci")
    from sklearn.ensemble import RandomForestClassifier

    data = train_and_test("dci", factors, labels, names, train_factors, train_labels, max_samples, seed)
    train, train_codes, test, test_codes = data
    joined, other = np.concatenate(list(train.values()), 1), np.concatenate(list(test.values()), 1)
    owner = np.repeat(np.arange(len(train)), [part.shape[1] for part in train.values()])
    importances = np.zeros((joined.shape[1] if dimensions else len(train), len(names)))
    informativeness = []
    for j in range(len(names)):
        seen, scored = train_codes[:, j] != MISSING, test_codes[:, j] != MISSING
        y = train_codes[seen, j]
        # All features at every split, and no tiny leaves: where one feature tells the class, noise is never chosen.
        forest = RandomForestClassifier(
            trees, max_features=None, min_samples_leaf=5, class_weight="balanced", random_state=seed % 2**32
        ).fit(joined[seen], y)
        importances[:, j] = (
            forest.feature_importances_
            if dimensions
            else np.bincount(owner, weights=forest.feature_importances_, minlength=len(train))
        )
        accuracy = balanced_accuracy(forest.predict(other[scored]), test_codes[scored, j])
        informativeness.append(above_chance(accuracy, 1.0 / len(np.unique(y))))
    result: dict[str, Any] = {
        **dci_from_importances(importances),
        "informativeness": float(np.mean(informativeness)),
    }
    if not dimensions:
        result["importances"] = {
            factor: dict(zip(names, map(float, row), strict=True))
            for factor, row in zip(train, importances, strict=True)
        }
    return result


def dci_from_importances(importances: ArrayLike) -> dict[str, float]:
    """``disentanglement`` and ``completeness`` of importances R ``[factors, concepts]``, as in :func:`dci`.

    Example:
        >>> dci_from_importances([[1, 0], [0, 1]])
        {'disentanglement': 1.0, 'completeness': 1.0}
        >>> dci_from_importances([[1, 1], [1, 1]])
        {'disentanglement': 0.0, 'completeness': 0.0}
    """
    r = np.asarray(importances, dtype=np.float64)
    if r.ndim != 2 or 0 in r.shape or (r < 0).any() or not np.isfinite(r).all():
        raise ValueError(f"dci: importances of shape {list(r.shape)}, expected [factors, concepts] from 0, finite")
    return {"disentanglement": _concentration(r), "completeness": _concentration(r.T)}


def _concentration(r: Array) -> float:
    """1 less the normalised entropy of each row, averaged with the rows' sums as weights."""
    if r.sum() == 0:
        return 0.0
    if r.shape[1] == 1:
        return 1.0
    rows = r[r.sum(1) > 0]
    weight = rows.sum(1)
    p = rows / weight[:, None]
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(1) / np.log(r.shape[1])
    return float(np.clip((weight * (1.0 - entropy)).sum() / weight.sum(), 0.0, 1.0))
