"""A user's own code that mypy checks strictly finds the types of the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import iin_fast

CODE = """
import torch
from torch import Tensor

import iin_fast
from iin_fast import functional, nn


def density(flow: nn.NeuralSplineFlow, x: Tensor) -> Tensor:
    return flow.log_prob(x)


def swapped(model: iin_fast.IIN, z: Tensor) -> Tensor:
    digit: Tensor = model.encode(z)["digit"]
    assert digit.shape[1] == 2
    return model.swap(z, z.flip(0), "digit")


y, logdet = functional.affine_coupling(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
total: Tensor = y.sum() + logdet.sum() + density(nn.NeuralSplineFlow(3), y).sum()
model = iin_fast.IIN(4, {"digit": 2}, n_flows=1, hidden_dim=8)
print(swapped(model, torch.randn(5, 4)), iin_fast.accelerate(model))
"""


def test_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(CODE)
    (tmp_path / "wrong.py").write_text(CODE.replace('"digit")', "3)"))
    assert (Path(iin_fast.__file__).parent / "py.typed").exists()
    cache = Path(__file__).parents[2] / "build" / "mypy_strict"  # of torch's types, for the next time
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        f"--cache-dir={cache}",
        "right.py",
        "wrong.py",
    ]
    environment = {**os.environ, "MYPYPATH": str(Path(iin_fast.__file__).parents[1])}  # an editable install has no path
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    found = [line for line in done.stdout.splitlines() if ": error:" in line and line.startswith(("right", "wrong"))]
    assert len(found) == 1 and found[0].startswith("wrong.py") and "[arg-type]" in found[0], done.stdout + done.stderr
