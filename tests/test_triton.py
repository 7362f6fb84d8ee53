"""The Triton kernels: in the interpreter (tests/interpreted), and compiled for a GPU that need not be here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import iin_fast
from iin_fast.backends import BackendUnavailable

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

COMPILE = """
import importlib, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from iin_fast.ops.triton_common import compile_case

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
seen, spilled = set(), []
for op in ("affine_coupling", "pair_nll", "flow", "spline_coupling"):
    for case in importlib.import_module(f"iin_fast.ops.{op}.triton").compile_cases():
        assert re.match(op, case.name) and set(case.signature) == set(case.kernel.arg_names)
        # one of a kernel, its tile and its types; what is left out differs in flags
        types = tuple(sorted(t for t in case.signature.values() if t.startswith("*")))
        key = case.kernel, case.name.split(" #")[0], case.name.rpartition("#")[2][:1], types
        hot = "float32" in case.name or "bfloat16" in case.name
        if key in seen or not hot or "tanh" not in case.name and op == "affine_coupling":
            continue
        if "16384" not in case.name and op == "flow" or "bins 8 nflows" not in case.name and op == "spline_coupling":
            continue
        if "inverse" in case.name:
            continue
        seen.add(key)
        cubin = compile_case(case, GPUTarget("cuda", 90, 32)).asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(cubin)
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        stack, local = re.search(r"STACK:(\\d+).*?LOCAL:(\\d+)", usage).groups()
        if int(stack) or int(local):
            spilled.append((case.name, stack, local))
print(len(seen), "kernels;", "spilled:", spilled)
"""


def run(command: list[str], **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_kernels_in_the_interpreter() -> None:
    out = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted"], TRITON_INTERPRET="1")
    assert " passed" in out and "skipped" not in out


def test_hot_kernels_compile_for_a_gpu_without_spills() -> None:
    out = run(["-c", COMPILE], TRITON_DEFAULT_FP_FUSION="1")
    assert "spilled: []" in out and int(out.split()[0]) >= 30, out


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_told_how_to_be_interpreted() -> None:
    x = torch.randn(2, 3)
    with iin_fast.backend("triton"), pytest.raises(BackendUnavailable, match="set TRITON_INTERPRET=1"):
        iin_fast.functional.affine_coupling(x, x, x)


def test_importing_the_package_does_not_import_triton() -> None:
    assert run(
        ["-c", "import sys, torch; had = 'triton' in sys.modules\nimport iin_fast\nprint('triton' in sys.modules, had)"]
    ) in (
        "False False\n",
        "True True\n",
    )
