"""The separated attribute predictability score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays import MISSING
from ._data import single_dimensions
from .mig import gap
from .probe import Probe, above_chance, balanced_accuracy, train_and_test

__all__ = ["sap"]


def sap(
    factors: Mapping[str, Tensor | ArrayLike],
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    *,
    dimensions: bool = False,
    train_factors: Mapping[str, Tensor | ArrayLike] | None = None,
    train_labels: Tensor | ArrayLike | None = None,
    max_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Creates the separated attribute predictability: how much better the best factor reads a concept than the second.

    .. math:: \mathrm{SAP} = \frac1K \sum_k \left( S_{(1)k} - S_{(2)k} \right), \quad
              S_{ik} = \max\left(0, \frac{A_{ik} - 1/C_k}{1 - 1/C_k}\right)

    with :math:`A_{ik}` the balanced accuracy, on samples apart, of a linear classifier (logistic regression; the paper
    takes a linear support vector machine) that reads concept k from factor i alone. Range 0 (two factors read it
    alike) to 1 (one reads all of it, the others nothing); higher is better. Rescaling by chance, which the paper does
    not do, makes 1 reachable for any number of classes. The paper takes single dimensions: ``dimensions=True``.

    Args:
        factors, labels, names, train_factors, train_labels, max_samples, seed: as for :func:`leak`.
        dimensions: score single dimensions, not whole factors.

    Returns:
        ``sap``; ``gaps``, concept to its gap; ``scores``, factor to concept to S (not for single dimensions).

    References:
        Kumar, Sattigeri, Balakrishnan, Variational Inference of Disentangled Latent Concepts from Unlabeled
        Observations, ICLR 2018, Sec. 3.
    """
    data = train_and_test("sap", factors, labels, names, train_factors, train_labels, max_samples, seed)
    train, train_codes, test, test_codes = data
    if dimensions:
        train, test = single_dimensions(train), single_dimensions(test)
    scores: dict[str, dict[str, float]] = {factor: {} for factor in train}
    for j, name in enumerate(names):
        seen, scored = train_codes[:, j] != MISSING, test_codes[:, j] != MISSING
        y, truth = train_codes[seen, j], test_codes[scored, j]
        chance = 1.0 / len(np.unique(y))
        for factor in train:
            read = Probe(train[factor][seen], y, "linear", seed).read(test[factor][scored])
            scores[factor][name] = above_chance(balanced_accuracy(read, truth), chance)
    gaps = gap(scores, names)
    result: dict[str, Any] = {"sap": sum(gaps.values()) / len(gaps), "gaps": gaps}
    return result if dimensions else {**result, "scores": scores}
