"""keep_freed_memory, and who calls it."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import iin_fast.allocator

PROBE = """
import resource, sys, torch, iin_fast.allocator
told = sys.argv[1] == "keep" and iin_fast.allocator.keep_freed_memory()
pages = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12, 2**20)  # 48 MiB, freed at once
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(told, max(pages[20:]))  # glibc needs up to ten calls to settle
"""


def probe(how: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", PROBE, how], capture_output=True, text=True, check=True)
    told, pages = done.stdout.split()
    return told, int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_stays_with_the_process() -> None:
    assert probe("keep") == ("True", pytest.approx(0, abs=100))
    assert probe("leave")[1] > 1000  # what it is good for: else 12288 pages of 4 KiB at every step


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert iin_fast.allocator.keep_freed_memory() is False


@pytest.mark.parametrize("command", ["train", "demo"])
def test_commands_that_train_keep_their_memory(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from iin_fast.cli import method, tools

    class Reached(Exception):
        pass

    def reach(*arguments: object, **options: object) -> None:
        assert calls == 1
        raise Reached

    calls = 0

    def keep() -> bool:
        nonlocal calls
        calls += 1
        return True

    module = method if command == "train" else tools
    monkeypatch.setattr(module, "keep_freed_memory", keep)
    monkeypatch.setattr("iin_fast.train.train" if command == "train" else "iin_fast.demo.run_demo", reach)
    with pytest.raises(Reached):
        if command == "train":
            np.savez(tmp_path / "latents.npz", z=np.eye(8, 4), labels=np.arange(8)[:, None] % 2, names=["a"])
            method.train(latents=tmp_path / "latents.npz", out=tmp_path / "run")
        else:
            tools.demo(tmp_path / "demo")
