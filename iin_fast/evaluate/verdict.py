"""Whether an IIN was worth training: its swaps against the best of what needs no training, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RIVALS", "swap_verdict"]

RIVALS = {"mean_shift": "mean shift", "linear_iin": "the linear IIN"}
DRAWS = 4000
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
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.025, 0.975]).tolist()
    verdict = "better" if low > 0 else "worse" if high < 0 else "equal"
    difference = (won - lost) / n
    text = (
        f"{concept}: the IIN {WORDS[verdict]} {RIVALS[rival]}; {ours.mean():.2f} and {theirs.mean():.2f} of {n} swaps change "
        f"it and keep all else, a difference of {difference:+.2f} (95 % interval {low:+.2f} to {high:+.2f})"
    )
    numbers = {"difference": difference, "low": low, "high": high}
    return {"verdict": verdict, "rival": rival, **numbers, "text": text}
