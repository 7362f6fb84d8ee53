"""Spline couplings against nflows, the same compiled, and zuko, in turn in one process:
python benchmarks/spline.py [OUT.json]"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline
from zuko.transforms import MonotonicRQSTransform

from iin_fast.functional import spline_coupling
from iin_fast.info import collect

BINS, BOUND = 8, 3.0


def systems(x: torch.Tensor, raw: torch.Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    """For every system and direction a call that gives y and the log-det per row, from the same packed parameters."""

    def ours(inverse: bool):
        return spline_coupling(x, raw, bins=BINS, tail_bound=BOUND, inverse=inverse)

    def nflows(inverse: bool, spline: Callable = unconstrained_rational_quadratic_spline):
        parts = raw.split([BINS, BINS, BINS - 1], -1)
        y, log = spline(x, *parts, inverse=inverse, tail_bound=BOUND)
        return y, log.sum(1)

    compiled = torch.compile(unconstrained_rational_quadratic_spline)

    def zuko(inverse: bool):
        spline = MonotonicRQSTransform(*raw.split([BINS, BINS, BINS - 1], -1), bound=BOUND)
        y, log = spline.inv.call_and_ladj(x) if inverse else spline.call_and_ladj(x)
        return y, log.sum(1)

    def calls(run: Callable) -> dict[str, Callable[[], object]]:
        def without_gradients(inverse: bool) -> None:
            with torch.no_grad():
                run(inverse)

        def training() -> None:
            y, log = run(False)
            torch.autograd.grad([y, log], [x, raw], [torch.ones_like(y), torch.ones_like(log)])

        return {
            "forward": lambda: without_gradients(False),
            "inverse": lambda: without_gradients(True),
            "forward + backward": training,
        }

    return {
        "iin-fast": calls(ours),
        "nflows": calls(nflows),
        "nflows, torch.compile": calls(partial(nflows, spline=compiled)),
        "zuko": calls(zuko),
    }


def main(out: Path) -> None:
    random = torch.Generator().manual_seed(0)
    results: dict = {
        "machine": collect(),
        "peers": {n: version(n) for n in ("nflows", "zuko")},
        "bins": BINS,
        "cases": {},
    }
    # Small calls in bursts, as a training loop makes them; one by one, the others' data has taken the cache in between.
    for rows, features, repeats, burst in ((65536, 32, 5, 1), (256, 32, 40, 10), (256, 32, 40, 1)):
        x = torch.randn(rows, features, generator=random).requires_grad_()
        raw = torch.randn(rows, features, 3 * BINS - 1, generator=random).requires_grad_()
        table = systems(x, raw)
        for case in ("forward", "inverse", "forward + backward"):
            seconds: dict[str, list[float]] = {name: [] for name in table}
            for turn in range(repeats + 2):
                for name, calls in table.items():
                    start = time.perf_counter()
                    for _ in range(burst):
                        calls[case]()
                    if turn >= 2:  # the first two are warm-up: torch.compile may need both
                        seconds[name].append((time.perf_counter() - start) / burst)
            medians = {name: statistics.median(s) for name, s in seconds.items()}
            label = f"{case}, {rows} x {features}" + (f", {burst} calls in a row" if burst > 1 else "")
            results["cases"][label] = {
                name: {
                    "min": min(s),
                    "median": medians[name],
                    "max": max(s),
                    "ours": medians[name] / medians["iin-fast"],
                }
                for name, s in seconds.items()
            }
            print(label, {n: f"{1e3 * m:.2f} ms, {m / medians['iin-fast']:.1f}x" for n, m in medians.items()})
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "spline_cpu.json")
