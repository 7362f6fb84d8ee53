"""benchmarks/gpu.py, as far as a machine without a GPU can run it."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmark_scripts
import pytest
import torch

from iin_fast.backends import available
from iin_fast.ops.registry import gpu_ops

ROOT = Path(__file__).parents[2]


def run(out: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | variables)
    return done, json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the results of a dry run of all that measures."""
    folder = tmp_path_factory.mktemp("dry")
    done, result = run(folder, "--dry-run", "--stages", "environment,peaks,micro,ops,engine,flow", "--minutes", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, result


def test_a_dry_run_measures_every_op_and_the_flow(dry_run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = dry_run
    assert result["dry_run"] and {row["outcome"] for row in result["stages"].values()} == {"done"}
    assert result["environment"]["torch"] == torch.__version__
    for op in set(gpu_ops()) - {"flow"}:
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
        assert {"eager", "iin-fast"} <= set(case["systems"])
        assert case["floor"] > 0 and case["systems"]["eager"]["times_eager"] == 1
    flows = result["engine"]["cases"]
    assert {row["case"]["measure"] for row in flows.values()} == {"step", "sample"}
    for row in flows.values():
        assert not row["failed"], row["failed"]
        assert {"iin-fast", "iin-fast, layer by layer", "plain torch"} <= set(row["systems"])
        assert all(0 < system["warm"]["min"] <= system["warm"]["max"] for system in row["systems"].values())
    assert "dry run" in result["micro"]["skipped"]
    assert (folder / "flow.png").stat().st_size > 1000 and (folder / "ops.png").stat().st_size > 1000


def test_the_readme_has_a_table_of_a_gpu_once_there_is_one(
    dry_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a dry run's numbers, made to look like a GPU's."""
    readme = benchmark_scripts.load("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_table() == ""  # no file, no word

    result = copy.deepcopy(dry_run[1])
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="dry run"):
        readme.gpu_table()

    result["dry_run"] = False
    result["environment"] |= {"gpu": "Imagined 9000", "cuda": "13.0", "smi": {"driver_version": "580.1"}}
    result["tests"] = {"summary": "123 passed in 4.00s"}
    case = result["flow"]["cases"]["forward, batch 4, float32"]
    times = {"min": 0.9e-3, "median": 1e-3, "max": 1.1e-3}
    slower = {key: 3 * value for key, value in times.items()}
    case["systems"]["iin-fast"] |= {"warm": times}
    case["systems"]["eager"] |= {"warm": slower}
    case["systems"]["compile"] = {"warm": slower}
    case["systems"]["compile, max-autotune"] = {"warm": {key: 2 * value for key, value in times.items()}}
    case["systems"]["iin-fast, cpp, CUDA graph"] = {"warm": {key: value / 4 for key, value in times.items()}}
    case["floor"] = 0.5e-3
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    table = readme.gpu_table()
    assert "Imagined 9000" in table and "driver 580.1" in table and "123 passed" in table
    (row,) = (line for line in table.splitlines() if line.startswith("| forward, batch 4, float32 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    heads = [c.strip() for c in next(x for x in table.splitlines() if x.startswith("| case")).strip("|").split("|")]
    assert len(cells) == len(heads)
    found = dict(zip(heads, cells, strict=True))
    assert found["eager"] == "3" and found["torch.compile, best mode"] == "2" and found["**iin-fast**"] == "1"
    assert found["**iin-fast, CUDA graph**"] == "0.25"
    assert found["× eager (range)"] == "3.0 (2.5–3.7)" and found["× compile"] == "2.0" and found["× floor"] == "2.00"
    assert "| affine_coupling forward, float32 |" in table


LOG = """========= COMPUTE-SANITIZER
flow cpp torch.float32 [7, 5] 3 blocks of 17, save
========= Invalid __global__ read of size 4 bytes
=========     at flow_layer_kernel+0x1b0
=========     by thread (3,0,0) in block (1,0,0)
=========     Address 0x7f0a is out of bounds
=========         Host Frame: main [0x1]
=========
Traceback (most recent call last):
  File "tests/gpu/sanitizer_case.py", line 40, in main
torch.AcceleratorError: CUDA error: unspecified launch failure
frame #21: _PyEval_EvalFrameDefault + 0x4cbe (0x5db2ee in python3)
========= ERROR SUMMARY: 1 error
"""


def test_what_the_sanitizer_found_is_told_in_few_lines() -> None:
    gpu = benchmark_scripts.load("gpu")
    assert gpu.findings(LOG) == [
        "========= Invalid __global__ read of size 4 bytes",
        "=========     at flow_layer_kernel+0x1b0",
        "=========     by thread (3,0,0) in block (1,0,0)",
        "=========     Address 0x7f0a is out of bounds",
        "torch.AcceleratorError: CUDA error: unspecified launch failure",
        "========= ERROR SUMMARY: 1 error",
    ]
    assert gpu.findings("========= COMPUTE-SANITIZER\nall well\n========= ERROR SUMMARY: 0 errors\n") == [
        "========= ERROR SUMMARY: 0 errors"
    ]


def test_a_part_that_takes_too_long_is_recorded_and_the_next_one_runs(tmp_path: Path, monkeypatch: Any) -> None:
    common = benchmark_scripts.load("gpu_common")
    monkeypatch.setattr(common, "PARTS", tmp_path)
    run, failed = common.Run("stage", True, time.time() + 10), {}
    with run.recorded("slow", failed, 0.1):
        try:
            time.sleep(5)
        except Exception:  # as torch.compile does
            pytest.fail("caught inside")
    assert "took longer than" in failed["slow"] and run.left > 8
    with run.recorded("next"):
        raise RuntimeError("no") from None
    assert run.result["failed"]["next"].startswith("RuntimeError: no")
    assert json.loads((tmp_path / "stage.json").read_text()) == run.result


def test_make_gpu_takes_the_python_of_the_caller(tmp_path: Path) -> None:
    """Not that of the environment in .venv, whose torch is for the CPU."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder, name in ((tmp_path / ".venv" / "bin", "the environment's"), (tmp_path / "bin", "the caller's")):
        folder.mkdir(parents=True)
        (folder / "python3").write_text(f'#!/bin/sh\necho "{name} python3 runs $1"\n')
        (folder / "python3").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([make, "-s", "gpu"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "the caller's python3 runs benchmarks/gpu.py", done.stdout + done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_a_torch_without_cuda_is_refused_at_once(tmp_path: Path) -> None:
    done, result = run(tmp_path)
    assert done.returncode == 2 and not result
    assert f"{sys.executable} has torch {torch.__version__}, which is built without CUDA" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_stage_that_fails_or_hangs_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    # as a torch with CUDA on a machine that has no GPU
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = torch.version.cuda or '13.0'\n")
    done, result = run(tmp_path, "--stages", "environment,peaks,ops", "--minutes", "1", PYTHONPATH=str(tmp_path))
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
