"""Spline couplings against nflows, the same compiled, and zuko, in turn in one process:
python benchmarks/spline.py [OUT.json]

Ours twice: from packed raw values, as a network emits them, and through rational_quadratic_spline from three tensors of their
own. The floor of a case is what its bytes take at the bandwidth that the same run measures: raw values and x are read, y and
the log-det written; backward reads them and grad_y again and writes as many gradients as there were inputs. (256 x 32 may come
below: its 0.8 MB can stay in a cache.) The peak memory of one forward and backward is measured in a process of its own for
each system.
"""

import same_isa  # noqa: F401

# isort: split
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline
from torch import Tensor
from zuko.transforms import MonotonicRQSTransform

from iin_fast.bench.memory import peak_above
from iin_fast.bench.run import machine_peaks
from iin_fast.bench.timing import in_turn
from iin_fast.functional import rational_quadratic_spline, spline_coupling
from iin_fast.info import collect, versions

BINS, BOUND = 8, 3.0
PARTS = [BINS, BINS, BINS - 1]
CASES = ("forward", "inverse", "forward + backward")
# Rows, features, repeats, calls in a row. Small calls in bursts, as a training loop makes them; one by one, the others' data has
# taken the cache in between.
SIZES = ((65536, 32, 5, 1), (256, 32, 40, 10), (256, 32, 40, 1))


def inputs(rows: int, features: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=random).requires_grad_()
    return x, torch.randn(rows, features, sum(PARTS), generator=random).requires_grad_()


def systems(x: Tensor, raw: Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    """For every system and direction a call that gives y and the log-det per row, from the same raw parameters."""
    apart = [part.detach().clone().requires_grad_() for part in raw.split(PARTS, -1)]

    def ours(inverse: bool):
        return spline_coupling(x, raw, bins=BINS, tail_bound=BOUND, inverse=inverse)

    def three(inverse: bool):
        y, log = rational_quadratic_spline(x, *apart, tail_bound=BOUND, inverse=inverse)
        return y, log.sum(1)

    def nflows(inverse: bool, spline: Callable = unconstrained_rational_quadratic_spline):
        y, log = spline(x, *raw.split(PARTS, -1), inverse=inverse, tail_bound=BOUND)
        return y, log.sum(1)

    compiled = torch.compile(unconstrained_rational_quadratic_spline)

    def zuko(inverse: bool):
        spline = MonotonicRQSTransform(*raw.split(PARTS, -1), bound=BOUND)
        y, log = spline.inv.call_and_ladj(x) if inverse else spline.call_and_ladj(x)
        return y, log.sum(1)

    def calls(run: Callable, *parameters: Tensor) -> dict[str, Callable[[], object]]:
        def without_gradients(inverse: bool) -> None:
            with torch.no_grad():
                run(inverse)

        def training() -> object:
            y, log = run(False)
            return torch.autograd.grad([y, log], [x, *parameters], [torch.ones_like(y), torch.ones_like(log)])

        found = partial(without_gradients, False), partial(without_gradients, True), training
        return dict(zip(CASES, found, strict=True))

    found = {
        "iin-fast": calls(ours, raw),
        "iin-fast, three tensors": calls(three, *apart),
        "nflows": calls(nflows, raw),
        "nflows, torch.compile": calls(partial(nflows, spline=compiled), raw),
        "zuko": calls(zuko, raw),
    }
    if os.environ.get("IIN_FAST_CPU") == "avx2":  # compiled for AVX2, torch 2.13's code fails an assertion of nflows
        del found["nflows, torch.compile"]
    return found


def floor(case: str, rows: int, features: int, peaks: dict[str, float]) -> float:
    """Seconds; what is written takes the bandwidth of a copy, as a cache line is read before it is written."""
    elements, log, values = rows * features, rows, sum(PARTS) + 1
    read, written = values * elements, elements + log
    if case == "forward + backward":
        read += (values + 1) * elements + log
        written += values * elements
    return 4 * (read / peaks["read_gbytes"] + written / peaks["copy_gbytes"]) / 1e9


def memory(name: str, rows: int, features: int) -> float:
    """MiB of one forward and backward above its inputs, the gradients included."""
    # memory goes back to the system at once, so that a first call, which compiles and loads, leaves nothing for the second
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, __file__, "--memory", name, str(rows), str(features)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout)


def measure_memory(name: str, rows: int, features: int) -> None:
    step = systems(*inputs(rows, features))[name]["forward + backward"]
    step()
    print(peak_above(step))


def main(out: Path) -> None:
    results: dict = {
        "machine": collect(),
        "peers": versions("nflows", "zuko"),
        "bins": BINS,
        "peaks": machine_peaks(quick=False),
        "cases": {},
        "floors": {},
    }
    for rows, features, repeats, burst in SIZES:
        table = systems(*inputs(rows, features))
        for case in CASES:
            # two to warm up: torch.compile may need both
            taken = in_turn({name: calls[case] for name, calls in table.items()}, repeats, warm_up=2, burst=burst)
            medians = {name: row["median"] for name, row in taken.items()}
            label = f"{case}, {rows} x {features}" + (f", {burst} calls in a row" if burst > 1 else "")
            results["floors"][label] = least = floor(case, rows, features, results["peaks"])
            results["cases"][label] = {
                name: {**row, "ours": row["median"] / medians["iin-fast"], "times_floor": row["median"] / least}
                for name, row in taken.items()
            }
            print(label, {n: f"{1e3 * m:.2f} ms, {m / medians['iin-fast']:.1f}x" for n, m in medians.items()})
    rows, features = SIZES[0][:2]
    found = {name: memory(name, rows, features) for name in systems(*inputs(1, 1))}
    results["memory"] = {"rows": rows, "features": features, "mib": found}
    print("memory, MiB:", {name: round(mib) for name, mib in found.items()})
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "spline_cpu.json")
