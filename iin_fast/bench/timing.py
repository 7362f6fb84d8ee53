"""How long calls take, measured in turn."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["in_turn", "noise_in", "spread", "time_of"]

NOISE = 2.0  # max over min from which a timing says more of the machine than of the call


def time_of(call: Callable[[], object], times: int = 1) -> float:
    """Seconds of one call among ``times`` in a row."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def noise_in(rows: Mapping[str, Mapping[str, float]]) -> str | None:
    """A sentence that names the timings whose ``max`` is over twice their ``min``; None where there are none."""
    noisy = [name for name, row in rows.items() if row["max"] > NOISE * row["min"]]
    return f"noise, not a result (slowest over {NOISE:g} × fastest): {', '.join(noisy)}" if noisy else None


def in_turn(
    calls: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: int = 2, burst: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds of each call: ``min``, ``median`` and ``max`` of ``repeats``.

    Every repeat makes each call once, or ``burst`` times in a row, so that what disturbs the machine disturbs all of them.
    The first ``warm_up`` repeats do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for repeat in range(warm_up + repeats):
            for name, call in calls.items():
                taken = time_of(call, burst)
                if repeat >= warm_up:
                    seconds[name].append(taken)
    finally:
        gc.enable()
    return {name: spread(taken) for name, taken in seconds.items()}
