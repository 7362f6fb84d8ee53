"""The package imported a second time in one process, as notebooks and test runners do."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import iin_fast

PACKAGE = Path(iin_fast.__file__).parent
MODULES = "[name for name in list(sys.modules) if name.split('.')[0] == 'iin_fast']"
USE = "iin_fast.IIN(6)(torch.randn(4, 6))[1].sum().backward()"


def run(code: str) -> subprocess.CompletedProcess[str]:
    code = f"import importlib, sys, torch, iin_fast\n{USE}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize(
    "again",
    [
        f"for name in {MODULES}: del sys.modules[name]\nimport iin_fast",
        f"for name in {MODULES}: importlib.reload(sys.modules[name])",
    ],
    ids=["purged", "reloaded"],
)
def test_it_works_again(again: str) -> None:
    checked = f"{USE}\nwith iin_fast.backend('reference'): {USE}\ntorch.compile(iin_fast.IIN(6), backend='eager')"
    done = run(f"{again}\n{checked}(torch.randn(4, 6))")
    assert done.returncode == 0, done.stderr


def test_another_copy_is_refused_and_both_are_named(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "iin_fast", ignore=shutil.ignore_patterns("__pycache__"))
    done = run(f"for name in {MODULES}: del sys.modules[name]\nsys.path.insert(0, {str(tmp_path)!r})\nimport iin_fast")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: iin_fast: ") and str(PACKAGE) in last and str(tmp_path / "iin_fast") in last
