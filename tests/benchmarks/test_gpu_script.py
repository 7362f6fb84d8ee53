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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | variables)
    return done, json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the results of a dry run of all that measures."""
    folder = tmp_path_factory.mktemp("dry")
    done, result = run(folder, "--dry-run", "--stages", "environment,peaks,micro,ops,engine,flow", "--minutes", "9")
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
    assert readme.gpu_summary() == "" and "never run on a GPU" in " ".join(readme.gpu_state().split())
    assert "no figures yet" in readme.gpu_tables() and "Not measured yet" in readme.gpu_micro_table()

    result = copy.deepcopy(dry_run[1])
    committed = tmp_path / "gpu_h100.json"
    committed.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="dry run"):
        readme.gpu_tables()

    result["dry_run"] = False
    result["environment"] |= {"gpu": "Imagined 9000", "cuda": "13.0", "smi": {"driver_version": "580.1"}}
    result["tests"] = {"summary": "123 passed in 4.00s"}
    times = {"min": 0.9e-3, "median": 1e-3, "max": 1.1e-3}

    def row(factor: float) -> dict[str, dict[str, float]]:
        return {"warm": {key: factor * value for key, value in times.items()}}

    case = result["flow"]["cases"]["forward, batch 4, float32"]
    case["systems"] = {
        "iin-fast": row(1),
        "iin-fast, CUDA graph": row(0.25),
        "eager": row(3),
        "compile": row(3) | {"beside": {"iin-fast": row(0.5)}},
        "compile, max-autotune": row(2) | {"beside": {"iin-fast": row(0.8)}},
    }
    case["floor"] = 0.5e-3
    result["flow"]["cases"]["forward, batch 25, float32"] = case
    result["flow"]["cases"]["step, 25 pairs, float32"] = {"failed": {"iin-fast": "no"}}  # a case without times
    flow = result["engine"]["cases"]["NSF, step, batch 256"]
    flow["systems"] = {"nflows": row(20), "iin-fast": row(1), "iin-fast, CUDA graph": row(0.5), "flowjax": row(3)}
    result["micro"] = {
        "barrier_us": {"64": {"min": 1.0, "median": 1.5, "max": 2.0}},
        "fence_cycles": {"0 copies": {"min": 100, "median": 200, "max": 300}},
        "product_error": {"signed": {"32": {"Tf32x3, leaving it": 1.25e-7, "Tf32": None}}},
        "tile_l2_gbytes": {"4096": times},
        "fma_tflops": times,
        "copy_gbytes": times,
    }
    committed.write_text(json.dumps(result))

    def cells(table: str, case: str) -> dict[str, str]:
        lines = table.splitlines()
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"| {case} |"))
        head = next(line for line in reversed(lines[:at]) if line.startswith("| case"))
        heads, found = ([c.strip() for c in line.strip("|").split("|")] for line in (head, lines[at]))
        return dict(zip(heads, found, strict=True))

    table = readme.gpu_tables()
    assert "Imagined 9000" in table and "driver 580.1" in table and "123 passed" in table
    found = cells(table, "forward, batch 4, float32")
    assert found["eager"] == "3" and found["torch.compile, best mode"] == "2" and found["**iin-fast**"] == "1"
    assert found["**iin-fast, CUDA graph**"] == "0.25"
    assert found["× eager (range)"] == "3.0 (2.5–3.7)" and found["× floor"] == "2.00"
    assert found["× compile"] == "2.5"  # of our time in the same turn
    found = cells(table, "NSF, step, batch 256")
    assert found["**iin-fast**"] == "1" and found["nflows"] == "20 (20.0 ×)"
    assert "| affine_coupling forward, float32 |" in table and "25 pairs" not in table

    summary = readme.gpu_summary()
    found = cells(summary, "neural spline flow, training step, 256 rows")
    assert found["the library's own code"] == "nflows: 20.0 ×" and found["fastest other side"] == "flowjax: 6.0 ×"
    found = cells(summary, "IIN of the published size, forward, 25 rows")
    assert found["the library's own code"] == "published code: 3.0 ×"
    assert found["fastest other side"] == "compile, max-autotune: 8.0 ×"
    assert "one Imagined 9000" in readme.gpu_state()
    assert "| barrier of 64 blocks, µs | 1.5 (1 to 2) |" in readme.gpu_micro_table()
    assert "| signed, 32 | 1.2e-07 |  |" in readme.gpu_micro_table()


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


@pytest.mark.parametrize(("script", "error"), [("exec sleep 60", TimeoutError), ("exit 1", RuntimeError)])
def test_a_jax_that_ends_or_does_not_answer_is_left(
    script: str, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_engine = benchmark_scripts.load("gpu_engine")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu_engine.sys, "executable", str(python))
    monkeypatch.setattr(gpu_engine, "PARTS", tmp_path)
    jax = gpu_engine.Jax()
    with pytest.raises(error):
        jax.time(0.1, gpu_engine.case_of("NSF", "step", 256), 0.5)
    assert jax._process is None  # the next case gets a new one


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
    done, result = run(tmp_path, "--limits", "peaks=soon")
    assert done.returncode == 2 and "expected a stage and seconds" in done.stderr and not result


def test_the_tests_for_a_gpu_run_on_the_cpu_as_far_as_they_go() -> None:
    """So that they are known to work when a GPU is at hand."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    environment = os.environ | {"IIN_FAST_TEST_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1].strip("=")) >= 8, summary
