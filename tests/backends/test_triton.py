"""The Triton kernels: in the interpreter (tests/interpreted), and compiled for a GPU that need not be here."""

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import flow_inputs
from torch.utils._python_dispatch import TorchDispatchMode

import iin_fast
from iin_fast.backends import BackendUnavailable

pytest.importorskip("triton")
from iin_fast.ops import triton_common  # noqa: E402  (needs Triton)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

COMPILE = """
import importlib, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from iin_fast.ops.registry import gpu_ops
from iin_fast.ops.triton_common import compile_case

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def spills(case):
    cubin = compile_case(case, GPUTarget("cuda", 90, 32)).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"STACK:(\\d+).*?LOCAL:(\\d+)", usage).groups()))


seen, spilled = set(), []
for op in gpu_ops():
    for case in importlib.import_module(f"iin_fast.ops.{op}.triton").compile_cases():
        assert re.match(op, case.name) and set(case.signature) == set(case.kernel.arg_names)
        # one of a kernel, its tile and its types; what is left out differs in flags
        types = tuple(sorted(t for t in case.signature.values() if t[:1] == "*"))
        key = case.kernel, case.name.split(" #")[0], case.name.rpartition("#")[2][:1], types
        # the narrow ops compute in float32 whatever they load
        hot = "float32" in case.name or "bfloat16" in case.name and op in ("flow", "spline_coupling")
        if key in seen or not hot or "tanh" not in case.name and op == "affine_coupling":
            continue
        if "16384" not in case.name and op == "flow" or "bins 8 nflows" not in case.name and op == "spline_coupling":
            continue
        if "inverse" in case.name:
            continue
        seen.add(key)
        stack, local = spills(case)
        if 0 < stack <= 8 and local == 0:  # put aside to fit one more block on a multiprocessor, not for want of registers
            warps = case.options["num_warps"]
            case = case._replace(options={**case.options, "maxnreg": min(255, 65536 // (32 * warps))})
            stack, local = spills(case)
        if stack or local:
            spilled.append((case.name, stack, local))
print(len(seen), "kernels;", "spilled:", spilled)
"""


# CDNA 3, 64 KiB of shared memory ("LDS"). A kernel of a kind, with its first tile, in float32 and, of the flow, bfloat16.
COMPILE_FOR_AMD = """
import importlib
import torch
torch.version.hip = "6.4"  # as a ROCm build of torch has it
from triton.backends.compiler import GPUTarget
from iin_fast.ops.registry import gpu_ops
from iin_fast.ops.triton_common import compile_case

seen = set()
for op in gpu_ops():
    for case in importlib.import_module(f"iin_fast.ops.{op}.triton").compile_cases():
        dtype = next(t for t in ("bfloat16", "float64", "float32") if t in case.name)
        key = case.kernel, dtype
        if key in seen or dtype == "float64" or dtype == "bfloat16" and op != "flow":
            continue
        seen.add(key)
        assert case.constexprs.get("PRECISION", "ieee") == "ieee", case.name
        compiled = compile_case(case, GPUTarget("hip", "gfx942", 64))
        assert compiled.asm["hsaco"][:4] == b"\\x7fELF"
        assert compiled.metadata.shared <= 65536, (case.name, compiled.metadata.shared)
print(len(seen), "kernels")
"""


NO_WARNING = "-W", "error:TRITON_DEFAULT_FP_FUSION"


def run(command: list[str], **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_kernels_in_the_interpreter() -> None:
    command = [
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-m",
        "triton",
        "tests/ops",
        "tests/interpreted",
    ]
    out = run(command, TRITON_INTERPRET="1", IIN_FAST_BACKEND="triton")
    assert " passed" in out and "skipped" not in out


def test_hot_kernels_compile_for_a_gpu_without_spills() -> None:
    out = run([*NO_WARNING, "-c", COMPILE])
    assert "spilled: []" in out and int(out.split()[0]) >= 30, out


def test_kernels_compile_for_an_amd_gpu() -> None:
    from triton.backends import backends

    if "amd" not in backends:
        pytest.skip("this Triton has no code generator for AMD GPUs")
    out = run([*NO_WARNING, "-c", COMPILE_FOR_AMD])
    assert int(out.split()[0]) >= 20, out


def test_amd_gpus_multiply_in_plain_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from iin_fast.ops.flow.triton import _precision

    nvidia = [_precision(torch.float32, False), _precision(torch.float32, True), _precision(torch.bfloat16, True)]
    assert nvidia == ["tf32x3", "tf32", "ieee"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert {_precision(torch.float32, tf32) for tf32 in (False, True)} == {"ieee"}


class CopiesAreSeen(TorchDispatchMode):
    """Every operation on tensors but the views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(INTERPRETED, reason="kernels run")
def test_a_new_division_into_factors_copies_nothing_to_the_device() -> None:
    """A copy would wait for the device and could not be captured in a graph."""
    from iin_fast.ops.pair_nll.triton import pair_nll, pair_nll_backward

    for sizes in ([5, 4, 3], [1] * 150, [7]):
        z, shared = torch.empty(6, sum(sizes), device="meta"), torch.empty(6, len(sizes), dtype=bool, device="meta")
        calls = [partial(pair_nll, z, z, z[:, 0], z[:, 0], shared, sizes, 0.9, True)]
        calls += [partial(pair_nll_backward, z[:, 0], z, z, shared, sizes, 0.9)]
        with CopiesAreSeen() as mode:
            launched = triton_common.recorded({str(i): call for i, call in enumerate(calls)})
        assert mode.seen <= {"empty", "new_empty"}, mode.seen
        ends = [case.signature["ends"] for case in launched if "ends" in case.signature]
        assert ends and max(map(len, ends)) == min(len(sizes), 64)


@pytest.mark.parametrize(("hidden", "layers"), [(64, 2), (65, 5)])  # a narrow net is one launch, and its last layer
@pytest.mark.parametrize("inverse", [False, True])
def test_launches_of_a_flow(hidden: int, layers: int, inverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As iin_fast/ops/flow/triton.py counts them, for a depth of 3."""
    from iin_fast.ops.flow import triton as module

    launched = []
    monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    given = [None if t is None else t.to("meta") for t in flow_inputs((20, 6, 4, hidden, 3), torch.float32)]
    x, _, *parameters = given
    y, logdet, saved = module.flow(*given, 0.01, 1.0, False, inverse, 2)
    assert len(launched) == 8 * layers + (2 if inverse else 3)
    launched.clear()
    rest = (0.01, 1.0, inverse, 2, False, True)
    module.flow_backward(y, logdet, x, saved, None, *parameters, *rest)
    assert len(launched) == 8 * layers + 3 + (3 if inverse else 2)
    launched.clear()
    module.flow_backward(y, logdet, x, saved[:0], None, *parameters, *rest)
    assert len(launched) == 16 * layers + 8 * 3 + (4 if inverse else 3)


@pytest.mark.parametrize("op", ["affine_coupling", "pair_nll", "spline_coupling"])
def test_rows_of_any_length_fit_the_grid(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes 65535 programs on the second and third axis of a grid."""
    module = importlib.import_module(f"iin_fast.ops.{op}.triton")
    grids = []

    def note(kernel: Any, grid: Any, **_: Any) -> None:
        grids.append(grid({"TILE": 512}) if callable(grid) else grid)

    monkeypatch.setattr(module, "launch", note)
    monkeypatch.setattr(triton_common, "launch", note)
    width = 2**27 + 3
    x, rows = torch.empty(2, width, device="meta"), torch.empty(2, device="meta")
    if op == "affine_coupling":
        module.affine_coupling(x, x, x, 1, 1.0, False)
        module.affine_coupling_backward(x, rows, x, x, 1, 1.0, False)
    elif op == "pair_nll":
        shared = torch.empty(2, 2, dtype=torch.bool, device="meta")
        module.pair_nll(x, x, rows, rows, shared, [width - 5, 5], 0.9, False)
        module.pair_nll_backward(rows, x, x, shared, [width - 5, 5], 0.9)
    else:
        raw = torch.empty(2, width, 5, device="meta")
        options = (None, None, 2, 0, 0, -1.0, 1.0, -1.0, 1.0, 1e-3, 1e-3, 1e-3, False)
        module.spline_coupling(x, raw, *options)
        module.spline_coupling_backward(x, rows, x, raw, *options)
    assert len(grids) >= 2 and grids[-1][0] > 2**18
    assert all(size <= 65535 for grid in grids for size in grid[1:]), grids


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
