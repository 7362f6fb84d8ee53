"""What CMake chooses before anything is compiled."""

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

for tool in ("cmake", "ninja", "g++"):
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}", allow_module_level=True)


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    torch = find_spec("torch")
    assert torch is not None and torch.submodule_search_locations
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", "-DIIN_FAST_CUDA=off", *options]
    command += [f"-DIIN_FAST_TORCH={torch.submodule_search_locations[0]}"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("name", ["ccache", "sccache"])
def test_a_compiler_cache_is_used(tmp_path: Path, name: str) -> None:
    cache = script(tmp_path / name, 'exec "$@"')
    done = configure(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert f"LAUNCHER = {cache} " in (tmp_path / "build" / "build.ninja").read_text()


def test_a_build_for_this_machine_has_one_instruction_set(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DIIN_FAST_ISAS=native")
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    files = [command["file"] for command in commands]
    assert len(set(files)) == len(files)  # each once
    assert any("IIN_FAST_ONE_ISA=" in command["command"] for command in commands) or os.uname().machine != "x86_64"


def test_an_old_gcc_is_refused_in_one_sentence(tmp_path: Path) -> None:
    compiler = script(tmp_path / "g++-10", f'exec {shutil.which("g++")} -U__GNUC__ -D__GNUC__=10 "$@"')
    done = configure(tmp_path, CXX=compiler)
    assert done.returncode != 0 and "iin-fast needs GCC 11 or newer, found 10." in done.stderr
