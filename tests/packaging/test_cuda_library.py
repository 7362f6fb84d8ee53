"""The CUDA library of the wheel, on a machine without a GPU and with a torch that may have no CUDA."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from iin_fast._library import cuda_versions, libraries
from iin_fast.backends import available
from iin_fast.info import collect
from iin_fast.ops.registry import gpu_ops

if "cuda" not in libraries:
    pytest.skip("the build had no nvcc, so there is no CUDA library", allow_module_level=True)

OPS = [op + end for op in gpu_ops() for end in ("", "_backward")]


@pytest.mark.parametrize("op", OPS)
def test_ops_have_cuda_kernels(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"iin_fast::{op}", "CUDA")


def test_the_backend_is_offered() -> None:
    for op in gpu_ops():
        assert "cpp" in available(op, "cuda")


def test_it_names_the_cuda_it_was_built_with_and_the_driver() -> None:
    driver, runtime = cuda_versions()
    assert runtime == torch.ops.iin_fast.cuda_compiler() >= 12000
    assert driver == 0 or driver > 9000
    assert driver > 0 or not torch.cuda.is_available()
    assert f"needs a driver for CUDA {runtime // 1000} or later" in collect()["GPU driver"]


def test_targets_are_the_code_in_the_library() -> None:
    targets = torch.ops.iin_fast.cuda_targets().split()
    assert targets[-1].startswith("compute_") and all(re.fullmatch(r"sm_\d+", t) for t in targets[:-1])
    cuobjdump = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if cuobjdump is None and triton is not None and triton.origin:  # the triton package brings one
        cuobjdump = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    if cuobjdump is None:
        pytest.skip("no cuobjdump to read the library with")
    found = subprocess.run(
        [cuobjdump, "--list-elf", "--list-ptx", libraries["cuda"]], capture_output=True, text=True, check=True
    ).stdout
    assert {f"sm_{n}" for n in re.findall(r"\.sm_(\d+)\.cubin", found)} == set(targets[:-1])
    assert {f"compute_{n}" for n in re.findall(r"\.sm_(\d+)\.ptx", found)} == {targets[-1]}


def test_it_needs_no_symbol_that_only_a_cuda_torch_has() -> None:
    """It has loaded here; this names what would break elsewhere, as functions are looked up at their first call only."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA here")

    def symbols(path: Path, kind: str) -> set[str]:
        listing = subprocess.run(["nm", "-D", kind, path], capture_output=True, text=True, check=True).stdout
        return {line.split()[-1].split("@")[0] for line in listing.splitlines()}

    needed = {s for s in symbols(libraries["cuda"], "--undefined-only") if s.startswith(("aoti_", "torch_", "cu"))}
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert "torch_call_dispatcher" in needed
    assert needed <= symbols(torch_cpu, "--defined-only")


def test_it_needs_no_other_library_of_cuda() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    listing = subprocess.run(["readelf", "-d", libraries["cuda"]], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", listing))
    assert needed <= {
        "libtorch_cpu",
        "libc10",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libdl",
        "libpthread",
        "librt",
    } | {name for name in needed if name.startswith("ld-linux")}


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_a_torch_without_cuda_is_named() -> None:
    """The CUDA kernels, reached past the dispatcher with tensors of the CPU."""
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    x, rows = torch.randn(2, 3), torch.randn(2)
    shared = torch.ones(2, 1, dtype=torch.bool)
    net = [torch.ones(1, 3), torch.ones(1, 3), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 4)]
    net += [torch.randn(1, 2, 2, 0, 16), torch.randn(1, 2, 2, 0, 4), torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 1)]
    net.append(torch.arange(3)[None])
    raw, spline = torch.randn(2, 3, 5), (2, 0, 0, -1.0, 1.0, -1.0, 1.0, 1e-3, 1e-3, 1e-3, False)
    calls = {
        "flow": (x, None, *net, 0.01, 1.0, False, False, 2, False),
        "flow_backward": (x, rows, x, x[:0], None, *net, 0.01, 1.0, False, 2, True, False),
        "affine_coupling": (x, x, x, 1, 1.0, False),
        "affine_coupling_backward": (x, rows, x, x, 1, 1.0, False),
        "pair_nll": (x, x, rows, rows, shared, [3], 0.9, False),
        "pair_nll_backward": (rows, x, x, shared, [3], 0.9),
        "spline_coupling": (x, raw, None, None, *spline),
        "spline_coupling_backward": (x, rows, x, raw, None, None, *spline),
    }
    for op, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"{op}: the torch in this process is built without CUDA"):
            getattr(torch.ops.iin_fast, op).default.redispatch(on_cuda, *arguments)


def test_messages_carry_no_path_of_the_machine_that_built_it() -> None:
    assert b"/csrc/common/cuda.h" not in libraries["cuda"].read_bytes()
