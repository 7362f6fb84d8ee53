"""Times of calls that run in turn, so that what else the machine does meets them all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["in_turn", "spread", "time_of"]


def time_of(call: Callable[[], object], times: int = 1) -> float:
    """Seconds of one call among ``times``."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, times: int = 1, warm_up: int = 0
) -> dict[str, list[float]]:
    """Seconds of each call in each round, in which it runs ``times``; the first ``warm_up`` rounds don't count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            taken = time_of(call, times)
            if turn >= warm_up:
                found[name].append(taken)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
