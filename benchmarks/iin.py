"""The flow of an IIN of the published size against its rivals, all in turn in one run:
python benchmarks/iin.py --jax PYTHON [--out OUT.json] [--only NAME …] [--no-compile]

PYTHON is that of an environment with jax and optax. Rivals: the published composition in eager torch, the same under
torch.compile (first call: half a minute), and the same flow in plain JAX under jax.jit (iin_jax.py). Every side but the published
composition takes a fused Adam (optax's is compiled into the step), and both samples of a pair as one batch.
"""

import same_isa  # noqa: F401

# isort: split
import argparse
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from engine import Jax, timed

from iin_fast.bench import PUBLISHED, WORKLOADS, Workload
from iin_fast.bench.run import machine_peaks
from iin_fast.bench.systems import build
from iin_fast.bench.timing import spread, time_of
from iin_fast.info import collect, versions

CASES = [workload for workload in WORKLOADS.values() if workload.size == PUBLISHED]


def run_case(case: Workload, sides: list[str], jax: Jax | None, rounds: int, seconds: float) -> dict[str, Any]:
    calls = {side: case.prepare(build(side, case.size)) for side in sides}
    first = {side: time_of(call) for side, call in calls.items()}
    found: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        timed(call, seconds / 4)
    request = {
        "name": case.name,
        "kind": case.kind,
        "batch": case.batch,
        "dim": case.size.dim,
        "n_flows": case.size.n_flows,
        "hidden": case.size.hidden_dim,
        "depth": case.size.hidden_depth,
    }
    if jax is not None:
        first["JAX"] = jax.measure(request, seconds / 4)["first_call"]
        found["JAX"] = []
    for _ in range(rounds):
        for side, call in calls.items():
            found[side].append(statistics.median(timed(call, seconds)))
        if jax is not None:
            found["JAX"].append(statistics.median(jax.measure(request, seconds)["times"]))
    rows = {side: {"first_call": first[side], **spread(times)} for side, times in found.items()}
    print(case.name, flush=True)
    for side, row in rows.items():
        ratio = row["median"] / rows["iin-fast"]["median"]
        print(
            f"  {side:10} {row['median'] * 1e3:9.2f} ms  {ratio:6.2f} x  (first {row['first_call']:.2f} s)", flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jax", help="the python of an environment with jax and optax")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/iin_cpu.json"))
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name begins with one of these")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each side in a round")
    arguments = parser.parse_args()
    sides = ["eager", *([] if arguments.no_compile else ["compile"]), "iin-fast"]
    peaks = machine_peaks(False)
    jax = Jax(arguments.jax, "iin_jax.py") if arguments.jax else None
    result: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": collect(),
        "versions": versions("torch") | (jax.versions() if jax else {}),
        "peaks": peaks,
        "cases": {},
    }
    for case in CASES:
        if case.name.startswith(tuple(arguments.only)):
            floor = case.floor(*(peaks[key] * 1e9 for key in ("gflops", "read_gbytes", "copy_gbytes")))
            result["cases"][case.name] = {
                "floor": floor,
                "sides": run_case(case, sides, jax, arguments.rounds, arguments.seconds),
            }
    if jax is not None:
        jax.close()
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
