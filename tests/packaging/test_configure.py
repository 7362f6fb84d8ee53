"""What CMake chooses before anything is compiled."""

import json
import os
import re
import shutil
import subprocess
import sys
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


def test_the_environment_chooses_gpus_and_instruction_sets(tmp_path: Path) -> None:
    told = tmp_path / "told"
    script(tmp_path / "cmake", f'printf "%s\\n" "$@" > {told}; exit 1')
    chosen = {"IIN_FAST_CUDA": "on", "IIN_FAST_CUDA_ARCHITECTURES": "80,90", "IIN_FAST_ISAS": "native"}
    environment = os.environ | chosen | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "building iin-fast failed" in done.stderr
    options = ("-DIIN_FAST_CUDA=on", "-DIIN_FAST_CUDA_ARCHITECTURES=80;90", "-DIIN_FAST_ISAS=native")
    assert set(options) <= set(told.read_text().splitlines())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_gpu_code_of_one_kind_is_named(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DIIN_FAST_CUDA=on", "-DIIN_FAST_CUDA_ARCHITECTURES=90")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "build" / "build.ninja").read_text()
    assert "sm_90 compute_90" in text
    assert set(re.findall(r"(?:sm|compute)_\d+", text)) == {"sm_90", "compute_90"}


def test_an_old_gcc_is_refused_in_one_sentence(tmp_path: Path) -> None:
    compiler = script(tmp_path / "g++-10", f'exec {shutil.which("g++")} -U__GNUC__ -D__GNUC__=10 "$@"')
    done = configure(tmp_path, CXX=compiler)
    assert done.returncode != 0 and "iin-fast needs GCC 11 or newer, found 10." in done.stderr
