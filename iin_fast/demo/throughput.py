"""How fast a flow of the published size runs here: the published layer-by-layer composition against ours."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import iin_fast
import iin_fast.testing

__all__ = ["MEASUREMENTS", "PUBLISHED_BATCH", "PUBLISHED_SIZE", "measure_throughput"]

MEASUREMENTS = ("forward", "inverse", "training_step")
PUBLISHED_SIZE = {"dim": 64, "n_flows": 12, "hidden_dim": 512, "hidden_depth": 2}
PUBLISHED_BATCH = 25


def measure_throughput(*, repeats: int) -> Iterator[tuple[str, dict]]:
    """Times forward, inverse and a training step of both, with the same weights, taking turns in the same run.

    A training step is forward, maximum-likelihood loss, backward and Adam: torch's default Adam for the published
    composition, which is what the published training uses, and the fused one for ours, whose parameters are few and
    large. One call of each warms up and is not counted.

    Args:
        repeats: how many timed calls of each measurement.

    Yields:
        the name of a measurement and ``{"published_eager": {...}, "iin_fast": {...}, "speedup": ...}`` with minimum,
        median and maximum in milliseconds; speedup is the ratio of the medians.
    """
    size = PUBLISHED_SIZE
    ours = iin_fast.IIN(size["dim"], None, size["n_flows"], size["hidden_dim"], size["hidden_depth"])
    z = torch.randn(PUBLISHED_BATCH, size["dim"])
    with torch.no_grad():
        ours(z)  # the data-dependent start
    assert isinstance(ours.flow, iin_fast.nn.Flow)
    eager = iin_fast.testing.eager_flow(ours.flow)

    with torch.no_grad():
        code, _ = eager(z)
        factors = ours.encode(z)
        yield "forward", _alternate(lambda: eager(z), lambda: ours(z), repeats)
        yield "inverse", _alternate(lambda: eager.reverse(code), lambda: ours.decode(factors), repeats)

    eager_step = _training_step(eager, lambda: _nll(*eager(z)), torch.optim.Adam(eager.parameters(), lr=1e-5))
    our_adam = torch.optim.Adam(ours.parameters(), lr=1e-5, fused=True)
    our_step = _training_step(ours, lambda: -ours.log_prob(z).mean(), our_adam)
    yield "training_step", _alternate(eager_step, our_step, repeats)


def _nll(code: Tensor, logdet: Tensor) -> Tensor:
    return (0.5 * code.flatten(1).square().sum(1) - logdet).mean()


def _training_step(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _alternate(eager: Callable[[], object], ours: Callable[[], object], repeats: int) -> dict[str, dict]:
    milliseconds: dict[str, list[float]] = {"published_eager": [], "iin_fast": []}
    for repeat in range(repeats + 1):
        for name, call in (("published_eager", eager), ("iin_fast", ours)):
            start = time.perf_counter()
            call()
            if repeat > 0:
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    result: dict[str, dict] = {
        name: {"min_ms": min(times), "median_ms": statistics.median(times), "max_ms": max(times), "repeats": repeats}
        for name, times in milliseconds.items()
    }
    result["speedup"] = result["published_eager"]["median_ms"] / result["iin_fast"]["median_ms"]
    return result
