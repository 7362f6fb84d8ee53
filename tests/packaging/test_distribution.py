"""The sdist builds, and its wheel works in an environment that has never seen the source tree."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source]
    # one instruction set, no code for GPUs and no optimization: make build compiles the rest of the same files, and optimizes
    sooner = {"IIN_FAST_ISAS": "native", "IIN_FAST_CUDA": "off", "CMAKE_BUILD_TYPE": "None", "CXXFLAGS": "-O0"}
    run(*command, cwd=folder, **sooner)
    (found,) = folder.glob("*")
    return found


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel. Of this one it sees the packages, but not the editable install."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    here = run(
        sys.executable, "-c", "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])", cwd=folder
    )
    Path(site, "borrowed.pth").write_text(here)
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


def test_sdist_holds_what_a_build_needs(source: Path) -> None:
    for name in ("CMakeLists.txt", "pyproject.toml", "LICENSE", "csrc/library.cpp", "csrc/common/math.h", "tests"):
        assert (source / name).exists(), name
    assert not list(source.rglob("*.so"))

    def sources(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in (root / "csrc").rglob("*.*")}

    assert sources(source) == sources(ROOT)
    commit = re.search(r'COMMIT = "(.+)"', (source / "iin_fast" / "_build_info.py").read_text())
    assert commit and commit[1] != "unknown"


def test_wheel_is_one_for_all_pythons(wheel: Path) -> None:
    assert re.fullmatch(r"iin_fast-[\d.]+-cp310-abi3-manylinux[\w.]+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "iin_fast/lib/libiin_fast_cpu.so" in names
    assert not [name for name in names if "libtorch" in name or name.startswith(("torch/", "tests/", "csrc/"))]
    assert "iin_fast/ops/flow/reference.py" in names
    assert "iin_fast/report/templates/page.html" in names


def test_wheel_works_away_from_the_source_tree(clean_python: Path, tmp_path: Path) -> None:
    code = """
import torch, iin_fast, pathlib
assert "site-packages" in iin_fast.__file__, iin_fast.__file__
model = iin_fast.IIN(8, {"color": 3}, n_flows=2, hidden_dim=16)
z = torch.randn(10, 8)
model(z)
assert (model.decode(model.encode(z)) - z).abs().max() < 1e-4
print("works", pathlib.Path(iin_fast.__file__).parent)
"""
    assert run(clean_python, "-c", code, cwd=tmp_path).startswith("works")
    command = clean_python.parent / "iin-fast"
    assert "commit" in run(command, "info", cwd=tmp_path)


def test_import_needs_torch_and_numpy_alone(clean_python: Path, tmp_path: Path) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"typer", "rich", "matplotlib", "sklearn", "safetensors", "scipy", "triton"}:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Refuse())
import torch
before = set(sys.modules)
import iin_fast
new = {name.split(".")[0] for name in set(sys.modules) - before}
allowed = {"iin_fast", "torch", "numpy", "cython_runtime"} | set(sys.stdlib_module_names)
assert not {name for name in new - allowed if not name.startswith("_")}, new - allowed
print("alone")
"""
    assert run(clean_python, "-c", code, cwd=tmp_path) == "alone\n"


def test_missing_library_is_named(clean_python: Path, tmp_path: Path) -> None:
    copy = tmp_path / "iin_fast"
    shutil.copytree(ROOT / "iin_fast", copy, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    done = subprocess.run([str(clean_python), "-c", "import iin_fast"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "the compiled library libiin_fast_cpu.so is missing" in done.stderr
