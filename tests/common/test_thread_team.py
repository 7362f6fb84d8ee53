"""csrc/common/thread_team.h: every part of every step is done once, without a data race, whoever joins when."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sanitizer", ["", "-fsanitize=thread"], ids=["plain", "thread sanitizer"])
def test_steps_are_shared_without_races(tmp_path: Path, sanitizer: str) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "thread_team"
    flags = ["-O1", "-g", "-std=c++17", "-pthread", *([sanitizer] if sanitizer else [])]
    source = ROOT / "tests" / "common" / "thread_team.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is not one that ThreadSanitizer knows")
    assert (done.returncode, done.stdout) == (0, "right"), done.stderr[-3000:]
