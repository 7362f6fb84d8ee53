"""Whether an IIN was worth training: its swaps against the best of what needs no training, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RIVALS", "pair_verdict", "swap_verdict"]

RIVALS = {"mean_shift": "mean shift", "linear_iin": "the linear IIN"}
DRAWS, PAIR_DRAWS = 4000, 500
TINY = 1e-300
WORDS = {"better": "is better than", "equal": "does as well as", "worse": "is worse than"}


def swap_verdict(
    concept: str,
    both: Mapping[str, NDArray[np.bool_]],  # system to [n]
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the swaps of the IIN with those of mean shift or of the linear IIN, whichever is better.

    The 95 % interval of the difference is that of a bootstrap over the rows that keep the rest; both systems have the same
    rows and donors. ``better`` and ``worse``: the interval lies above, or below 0. ``equal``: these rows show no difference.

    Args:
        concept: what was swapped.
        both: of ``"iin"``, ``"mean_shift"`` and ``"linear_iin"``: whether each swap gave the concept and kept all others.
        seed: of the bootstrap.

    Returns:
        ``verdict``; ``rival``, the better one; ``difference``, IIN less rival, and its interval ``low``, ``high``; ``text``.

    References:
        Efron, Tibshirani, An Introduction to the Bootstrap, 1993, Sec. 13.3.
    """
    ours = both["iin"]
    rival = max((who for who in RIVALS if who in both), key=lambda who: both[who].mean())
    theirs = both[rival]
    n = len(ours)
    # Rows drawn with replacement are counts of the three values that a row's difference can have.
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    drawn = np.random.default_rng(seed).multinomial(n, [won / n, lost / n, (n - won - lost) / n], size=DRAWS)
    what = f"{ours.mean():.2f} and {theirs.mean():.2f} of {n} swaps change it and keep all else"
    return _verdict(concept, rival, (won - lost) / n, (drawn[:, 0] - drawn[:, 1]) / n, what)


def pair_verdict(
    concept: str,
    factors: Mapping[str, NDArray[np.float64]],  # system to [2 × pairs, size]
    shared: NDArray[np.bool_],  # [pairs]
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the IIN's factor of a concept with that of the linear IIN, on ready pairs of which no label is known.

    The measure is how much more the factor correlates over pairs that share the concept than over the others
    (:func:`shared_correlation`); 95 % interval by bootstrap over pairs of either kind.

    Args:
        concept: what pairs share or not.
        factors: of ``"iin"`` and ``"linear_iin"``: the concept's factor of the first samples, then of the second ones.
        shared: whether pair i shares it; some pairs do and some do not.
        seed: of the bootstrap.

    Returns:
        as :func:`swap_verdict`.
    """
    random = np.random.default_rng(seed)
    kinds = [np.flatnonzero(shared == share) for share in (True, False)]
    scores = dict.fromkeys(factors, 0.0)
    draws = {who: np.zeros(PAIR_DRAWS) for who in factors}
    for sign, rows in zip((1, -1), kinds, strict=True):
        sums = {}  # product and variance of each pair, [rows, 2]
        for who, part in factors.items():
            x, y = np.split(part - part.mean(0), 2)
            sums[who] = np.stack([(x * y).sum(1), 0.5 * (x * x + y * y).sum(1)], 1)[rows]
            product, variance = sums[who].sum(0)
            scores[who] += sign * float(product / (variance + TINY))
        for k in range(PAIR_DRAWS):
            drawn = random.integers(len(rows), size=len(rows))
            for who, each in sums.items():
                product, variance = each[drawn].sum(0)
                draws[who][k] += sign * product / (variance + TINY)
    what = (
        f"its factor correlates {scores['iin']:.2f} and {scores['linear_iin']:.2f} more over {len(kinds[0])} pairs that share "
        f"{concept} than over {len(kinds[1])} others"
    )
    difference = scores["iin"] - scores["linear_iin"]
    return _verdict(concept, "linear_iin", difference, draws["iin"] - draws["linear_iin"], what)


def _verdict(concept: str, rival: str, difference: float, draws: NDArray[np.float64], what: str) -> dict[str, Any]:
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    verdict = "better" if low > 0 else "worse" if high < 0 else "equal"
    text = (
        f"{concept}: the IIN {WORDS[verdict]} {RIVALS[rival]}; {what}, a difference of {difference:+.2f} "
        f"(95 % interval {low:+.2f} to {high:+.2f})"
    )
    numbers = {"difference": difference, "low": low, "high": high}
    return {"verdict": verdict, "rival": rival, **numbers, "text": text}
