"""Every source of the CPU library is right for the other compilers that docs/install.md names, and without a warning."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from test_configure import configure


@pytest.mark.parametrize("compiler", ["g++-11", "clang++"])
def test_a_compiler_has_nothing_to_say(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    done = configure(tmp_path, CXX=compiler)
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    for command in {each["file"]: each["command"] for each in commands}.values():  # of loops the last instruction set
        words = [*shlex.split(command), "-fsyntax-only", "-Werror"]
        said = subprocess.run(words, cwd=tmp_path / "build", capture_output=True, text=True)
        assert said.returncode == 0, said.stderr[-3000:]
