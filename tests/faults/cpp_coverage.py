"""Which lines of C++ the tests of the ops run on this machine: python -m tests.faults.cpp_coverage (a part of make coverage).

The CPU library is compiled anew with gcov's counters, for the best instruction set of this machine alone.
"""

import json
import subprocess
from collections import defaultdict
from pathlib import Path

from .sanitize import ROOT, library, run_tests

BUILD = ROOT / "build" / "coverage-cpp"


def counted(build: Path) -> dict[str, dict[int, int]]:
    """How often each line of each file of csrc ran."""
    files: dict[str, dict[int, int]] = defaultdict(dict)
    for counters in sorted(build.rglob("*.gcda")):
        told = subprocess.run(
            ["gcov", "--json-format", "--stdout", counters], capture_output=True, text=True, check=True
        )
        for file in json.loads(told.stdout)["files"]:
            name = Path(file["file"])
            if name.is_relative_to(ROOT / "csrc"):
                for line in file["lines"]:  # a header may have none
                    lines, at = files[str(name.relative_to(ROOT))], line["line_number"]
                    lines[at] = max(lines.get(at, 0), line["count"])
    return files


def main() -> None:
    tree = library(BUILD, "-O1 -g1 --coverage -fprofile-update=atomic", "native")
    for old in BUILD.rglob("*.gcda"):
        old.unlink()
    run_tests(tree, ["-m", "not slow", "tests/ops", "tests/flow", "tests/common"])
    found = counted(BUILD)
    assert found, "the library has no counters"
    lines = ran = 0
    for name, counts in sorted(found.items()):
        covered = sum(count > 0 for count in counts.values())
        missed = [str(at) for at, count in sorted(counts.items()) if not count]
        print(f"{name:55} {covered:5} of {len(counts):5} lines, {covered / len(counts):4.0%}  {' '.join(missed[:12])}")
        lines, ran = lines + len(counts), ran + covered
    print(f"C++: {ran} of {lines} lines, {ran / lines:.1%}")


if __name__ == "__main__":
    main()
