"""Every loop that its author marked `omp simd` is vector code: a compiler that gives one up says nothing."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from sanitizers import kept
from test_configure import ROOT, configure

MISSED = re.compile(r"^(?P<file>\S+):(?P<line>\d+):\d+: missed: couldn't vectorize loop$", re.MULTILINE)


def marked(place: tuple[str, int]) -> bool:
    """Whether the loop at that place is a marked one: GCC names the first statement of its body."""
    lines = Path(place[0]).read_text().splitlines()
    return any("omp simd" in line for line in lines[place[1] - 3 : place[1]])


def test_marked_loops_are_vector_code(tmp_path: Path) -> None:
    version = shutil.which("g++") and subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout
    if not version or int(version.split(".")[0]) != 12:
        pytest.skip("the loops were looked at with GCC 12")
    done = configure(tmp_path, CXX="g++")
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    loops = [each["command"] for each in commands if "loops_avx2.dir" in each["command"]]
    assert loops
    for command in loops:
        compiler, *words = shlex.split(command)
        del words[words.index("-o") : words.index("-o") + 2]
        report = kept(f"vectors-{Path(words[-1]).stem}", compiler, *words, "-fopt-info-vec-missed").with_suffix(".txt")
        found = {(str(ROOT / each["file"]), int(each["line"])) for each in MISSED.finditer(report.read_text())}
        assert not sorted(filter(marked, found))
