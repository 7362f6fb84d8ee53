"""tests/faults/cpp_coverage.py counts the lines of csrc that ran."""

import shutil
import subprocess
from pathlib import Path

import pytest
from sanitizers import ROOT

from faults.cpp_coverage import counted


def test_lines_that_ran_and_lines_that_did_not(tmp_path: Path) -> None:
    if shutil.which("g++") is None or shutil.which("gcov") is None:
        pytest.skip("no g++ with gcov")
    (tmp_path / "half.cpp").write_text(
        '#include "common/half.h"\n'
        '#include "flow_program/flow_program_plan.h"\n'  # gcov names it, and no line of it
        "static iin_fast::Plan plan;\n"
        "int main(int count, char **) { return count > 1 ? iin_fast::half_of(1.0f).bits : iin_fast::float_of(iin_fast::Half{0}) != 0; }\n"
    )
    command = ["g++", "-std=c++17", "-O0", "-g1", "--coverage", f"-I{ROOT / 'csrc'}", "half.cpp", "-o", "half"]
    subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "half"], cwd=tmp_path, check=True)
    files = counted(tmp_path)
    assert all(files.values())
    lines = files["csrc/common/half.h"]
    assert any(lines.values()) and not all(lines.values())
    text = (ROOT / "csrc/common/half.h").read_text().splitlines()
    ran = {text[at - 1].strip() for at, count in lines.items() if count}
    assert any("half.bits & 0x7fffu" in line for line in ran)  # of float_of
    assert not any("const uint32_t nan =" in line for line in ran)  # of half_of
