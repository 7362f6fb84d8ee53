"""Would the emulation tests notice a missing barrier? python tests/cuda_emulator/mutate.py [--only PATTERN] [--list]

Takes each barrier of the CUDA kernels away in turn (__syncthreads, the barrier over the grid, the commit of asynchronous
copies and the wait for them), in a copy of csrc and tests, and runs the emulation tests of the ops that the file belongs to,
under the race checker, until one fails. Prints which test noticed, or that none did; ends with 1 if that is so for a barrier that ACCEPTED doesn't
name. Each barrier costs a compilation and the tests up to the one that fails: about an hour in all, so not part of `make test`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from iin_fast.ops.registry import gpu_ops

ROOT = Path(__file__).resolve().parents[2]
BARRIER = re.compile(r"(__syncthreads\(\)|grid\.sync\(\)|wait_copies<[^;]*>\(\)|commit_copies\(\));")
SECONDS = 1800  # of one barrier; a kernel that waits for ever is noticed, too

# Barriers that may go unnoticed, by file and statement, and why.
ACCEPTED = {
    ("tile.cuh", "wait_copies<0>()"): "the last step has waited for its tiles, so only groups without a copy are left"
}


def belongs_to(path: Path) -> list[str]:
    """The ops whose kernels include a header of csrc."""

    def included(header: Path, seen: set[Path]) -> set[Path]:
        if header not in seen and header.exists():
            seen.add(header)
            for name in re.findall(r'#include "([^"]+)"', header.read_text()):
                included(ROOT / "csrc" / name, seen)
        return seen

    return [
        op for op in gpu_ops() if any(path in included(h, set()) for h in (ROOT / "csrc" / op).glob("*_kernels.cuh"))
    ]


def barriers() -> Iterator[tuple[Path, int, str]]:
    """Header, line and statement of every barrier in the kernels."""
    for path in sorted((ROOT / "csrc").rglob("*.cuh")):
        for number, line in enumerate(path.read_text().splitlines()):
            code = line.split("//")[0]
            for match in BARRIER.finditer(code):
                yield path, number, match[1]


def noticed(path: Path, number: int, statement: str, ops: list[str]) -> str | None:
    """The test that fails without this barrier; None if all pass."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        shutil.copytree(
            ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__", "golden", "fixtures")
        )
        shutil.copy(ROOT / "pyproject.toml", copy)
        files = [f"tests/ops/test_{op}_cuda.py" for op in ops]
        changed = copy / path.relative_to(ROOT)
        lines = changed.read_text().splitlines(keepends=True)
        lines[number] = lines[number].replace(f"{statement};", "(void)0;", 1)
        changed.write_text("".join(lines))
        # the package from the source tree, the emulator's from the copy
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(copy / "tests"), str(ROOT)])}
        environment["IIN_FAST_TEST_RACES"] = "1"
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *files]
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "tests that do not end"
    failed = re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+?::.*?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode and failed is None or "'g++'" in done.stdout:
        raise RuntimeError(f"the tests could not run:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return failed and failed[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="barriers whose file, line or statement matches")
    parser.add_argument("--list", action="store_true", help="name the barriers and run nothing")
    options = parser.parse_args(arguments)
    survivors = 0
    for path, number, statement in barriers():
        ops = belongs_to(path)
        where = f"{path.relative_to(ROOT / 'csrc')}:{number + 1} {statement}"
        if not ops or not re.search(options.only, where):
            continue
        if options.list:
            print(f"{where} ({', '.join(ops)})")
            continue
        found = noticed(path, number, statement, ops)
        reason = ACCEPTED.get((path.name, statement))
        survivors += found is None and reason is None
        outcome = f"noticed by {found}" if found else f"NOT NOTICED: {reason or 'which test would?'}"
        print(f"{where}: {outcome}", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
