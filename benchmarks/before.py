"""The IIN's flow of this version beside that of an older one, in turn: python benchmarks/before.py FOLDER [--out OUT.json]

FOLDER is a git work tree of the older version, with its library compiled for this torch. A process of each version
runs the workloads of ``iin_fast.bench``, one waiting while the other works. Where memory lies differs from process to process, and
which of two started first counts, so several of each are started, each version first in half of them.
"""

import same_isa  # noqa: F401

# isort: split
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from iin_fast.bench import WORKLOADS
from iin_fast.bench.systems import build
from iin_fast.info import collect

HERE = Path(__file__).resolve()


def serve() -> None:
    """Answer requests for times of a workload, with the package that this process has loaded."""
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name, times = request["name"], []
        if name not in calls:
            torch.manual_seed(0)
            calls = {name: WORKLOADS[name].prepare(build("iin-fast", WORKLOADS[name].size))}
        end = time.perf_counter() + request["seconds"]
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            calls[name]()
            times.append(time.perf_counter() - start)
        print(statistics.median(times), flush=True)


class Version:
    """A process with one version of the package."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), "--serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(folder.resolve())},
        )

    def seconds(self, name: str, seconds: float) -> float:
        """The median of calls for that long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"name": name, "seconds": seconds}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process with a version of the package ended; its message stands above")
        return float(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "before_cpu.json")
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name begins with one of these")
    parser.add_argument("--processes", type=int, default=4, help="of each version")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each turn")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()
    folders = {"before": arguments.folder, "now": HERE.parents[1]}
    names = [name for name in WORKLOADS if name.startswith(tuple(arguments.only))]
    cases: dict[str, dict[str, list[float]]] = {name: {"before": [], "now": [], "ratios": []} for name in names}
    for process in range(arguments.processes):
        order = list(folders)[:: -1 if process % 2 else 1]
        versions = {name: Version(folders[name]) for name in order}
        for case, found in cases.items():
            turns: dict[str, list[float]] = {name: [] for name in versions}
            for turn in range(arguments.turns + 1):
                for name, version in versions.items():
                    took = version.seconds(case, arguments.seconds)
                    if turn:
                        turns[name].append(took)
            medians = {name: statistics.median(times) for name, times in turns.items()}
            for name, median in medians.items():
                found[name].append(median)
            found["ratios"].append(medians["before"] / medians["now"])
            print(f"{case:42} {found['ratios'][-1]:5.2f}", flush=True)
        for version in versions.values():
            version.close()
    result = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": collect(),
        "before": subprocess.check_output(["git", "-C", str(arguments.folder), "rev-parse", "HEAD"], text=True).strip(),
        "cases": cases,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
