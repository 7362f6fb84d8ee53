"""How well a number per sample, a continuous concept, can be read from factors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays import to_numpy
from ._data import checked_factors

__all__ = ["value_correlation"]

RIDGE = 1e-3  # times the number of samples, for standardised dimensions


def value_correlation(
    factors: Mapping[str, Tensor | ArrayLike],
    values: Mapping[str, Tensor | ArrayLike],
    train_factors: Mapping[str, Tensor | ArrayLike],
    train_values: Mapping[str, Tensor | ArrayLike],
) -> dict[str, dict[str, float]]:
    """Takes the correlation of a continuous concept with what a ridge regression reads of it from each factor.

    The regression learns on other samples than it is scored on. Range: about 0 (the factor says nothing that is linear) to 1 (it
    tells the value). A concept's own factor should be high, all others near 0.

    Args:
        factors: name to ``[n, size]``, scored on.
        values: concept to numbers ``[n]``, NaN where unknown.
        train_factors, train_values: what the regression learns on.

    Returns:
        factor to concept to correlation; 0 where fewer than 3 samples are known, or nothing varies.

    Raises:
        TypeError, ValueError: factors or values that don't fit.

    Example:
        >>> z, w = np.random.default_rng(0).standard_normal((2, 200, 3))
        >>> found = value_correlation({"size": z}, {"age": z.sum(1)}, {"size": w}, {"age": w.sum(1)})
        >>> round(found["size"]["age"], 2)
        1.0
    """
    where = "value_correlation"
    scored, learned = checked_factors(where, factors), checked_factors(where, train_factors)
    found: dict[str, dict[str, float]] = {}
    for factor, part in scored.items():
        mean, spread = learned[factor].mean(0), learned[factor].std(0)
        spread = np.where(spread > 0, spread, 1.0)
        row = found[factor] = {}
        for concept in values:
            y, train_y = (to_numpy(of[concept]).astype(np.float64) for of in (values, train_values))
            if len(y) != len(part) or len(train_y) != len(learned[factor]):
                raise ValueError(
                    f"{where}: values of {concept!r} have {len(y)} rows, expected {len(part)} like factors"
                )
            known, train_known = ~np.isnan(y), ~np.isnan(train_y)
            x = (learned[factor][train_known] - mean) / spread
            truth = train_y[train_known]
            row[concept] = 0.0
            if len(truth) < 3 or known.sum() < 3:
                continue
            weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ (truth - truth.mean()))
            read = ((part[known] - mean) / spread) @ weights
            if read.std() > 0 and y[known].std() > 0:
                row[concept] = float(np.corrcoef(read, y[known])[0, 1])
    return found
