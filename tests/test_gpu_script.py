"""benchmarks/gpu.py, as far as a machine without a GPU can run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iin_fast.backends import available

ROOT = Path(__file__).parents[1]


def run(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done, json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {}


def test_a_dry_run_measures_every_op_and_the_flow(tmp_path: Path) -> None:
    done, result = run(tmp_path, "--dry-run", "--stages", "environment,peaks,ops,flow", "--minutes", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["dry_run"] and {row["outcome"] for row in result["stages"].values()} == {"done"}
    assert result["environment"]["torch"] == torch.__version__
    for op in ("affine_coupling", "pair_nll", "spline_coupling"):
        for case in ("forward", "backward"):
            for dtype in ("float32", "bfloat16"):
                rows = result["ops"]["cases"][f"{op} {case}, {dtype}"]
                assert set(rows) == set(available(op, "cpu"))
                assert all(row["gbytes"] > 0 and row["min"] <= row["median"] <= row["max"] for row in rows.values())
    # bytes of a spline of 8 bins: 23 parameters and x read, y written; backward as many gradients, and grad_y
    moved = {name: next(iter(rows.values()))["bytes"] for name, rows in result["ops"]["cases"].items()}
    assert moved["spline_coupling forward, float32"] == 4 * 64 * 8 * 25
    assert moved["spline_coupling backward, bfloat16"] == 2 * 64 * 8 * 49
    cases = result["flow"]["cases"]
    assert set(cases) == {"forward, batch 4, float32", "step, 2 pairs, float32"}
    for case in cases.values():
        assert not case["failed"], case["failed"]
        assert {"eager", "iin-fast", "iin-fast, cpp"} <= set(case["systems"])
        assert case["floor"] > 0 and case["systems"]["eager"]["times_eager"] == 1
    assert (tmp_path / "flow.png").stat().st_size > 1000 and (tmp_path / "ops.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_stage_that_fails_or_hangs_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    done, result = run(tmp_path, "--stages", "environment,peaks,ops", "--minutes", "1")
    assert done.returncode == 1
    assert [row["outcome"] for row in result["stages"].values()] == ["failed"] * 3
    assert "GPU" in result["environment"]["failed"] and result["environment"]["torch"] == torch.__version__
    assert "peaks" in result["peaks"]["failed"]

    done, result = run(tmp_path / "late", "--dry-run", "--stages", "flow", "--minutes", "0.01")
    assert result["stages"]["flow"]["outcome"] in ("out of time", "done")
    if result["stages"]["flow"]["outcome"] == "done":
        assert result["flow"]["left_out"]


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done, result = run(tmp_path, "--stages", "peaks,paint")
    assert done.returncode == 2 and "unknown stage paint" in done.stderr and not result


def test_the_tests_for_a_gpu_run_on_the_cpu_as_far_as_they_go() -> None:
    """So that they are known to work when a GPU is at hand."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    environment = os.environ | {"IIN_FAST_TEST_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1].strip("=")) >= 8, summary
