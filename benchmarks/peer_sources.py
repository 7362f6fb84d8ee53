"""tests/dropin on the published code and on FrEIA's repository, which the usual test run has no access to.

    python benchmarks/peer_sources.py FOLDER [--out benchmarks/results/peer_sources.json]

FOLDER holds clones (benchmarks/peers.py). Every case of their classes: outputs, log-dets, inverses, gradients and second
derivatives before and after ``accelerate``, in float64 and float32, and under ``patch``. The result names the commits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from peer_suites import outcomes
from peers import MODULES, commits, paths

from iin_fast.info import collect

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path) -> dict[str, dict[str, object]]:
    """For each clone: how its tests ended."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        path = os.pathsep.join([*paths(folder, scratch), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path}
        here = commits(folder)
        for clone in here:  # an installed copy must not stand in for it
            code = f"import importlib; print(importlib.import_module({MODULES[clone]!r}).__file__)"
            command = [sys.executable, "-c", code]
            file = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            if not Path(file.strip()).is_relative_to((folder / clone).resolve()):
                raise RuntimeError(f"{MODULES[clone]} comes from {file.strip()}, not from {folder / clone}")
        results = scratch / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
        command += [f"--junit-xml={results}", str(ROOT / "tests" / "dropin" / "test_dropin_equal.py")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not results.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        ended = outcomes(results)
    found: dict[str, dict[str, object]] = {}
    for clone, at in here.items():
        own = {test: how for test, how in ended.items() if test.split("[")[-1].startswith((f"{clone} ", f"{clone}."))}
        tests = Counter(test.split("[")[0].split("::")[-1] for test, how in own.items() if how == "passed")
        bad = sorted(test for test, how in own.items() if how in ("failure", "error"))
        skipped = sum(how == "skipped" for how in own.values())
        found[clone] = {"commit": at, "passed": dict(tests), "skipped": skipped, "failed": bad}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sources = run(arguments.folder)
    print(json.dumps(sources, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": collect(), "sources": sources}, indent=1) + "\n")
    bad = [clone for clone, found in sources.items() if found["failed"] or not found["passed"]]
    if bad:
        sys.exit(f"tests failed or were not run: {', '.join(bad)}")


if __name__ == "__main__":
    main()
