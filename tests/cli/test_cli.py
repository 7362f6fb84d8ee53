"""The command line."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from iin_fast import __version__
from iin_fast._library import cpu_isa
from iin_fast.cli import app
from iin_fast.testing import backends


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_info_names_what_is_installed() -> None:
    code, output = run("info")
    assert code == 0
    for expected in (
        __version__,
        torch.__version__,
        cpu_isa(),
        "reference, cpp",
        "GPU targets in this build",
        "commit",
    ):
        assert expected in output


def test_info_needs_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, output = run("info")
    assert code == 0 and __version__ in output


def test_check_compares_all_ops() -> None:
    code, output = run("check", "--device", "cpu")
    assert code == 0
    for op in backends.CASES:
        assert op in output
    assert " 0 differ" in output and "DIFFERS" not in output
    assert output.count("not run: ") <= 1  # one reason, for all ops together


def test_check_fails_where_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.TOLERANCES, torch.float32, 0.0)
    code, output = run("check", "--device", "cpu")
    assert code == 1 and "DIFFERS" in output
