"""The choice of a backend, and the instruction set of the CPU loops."""

import _thread
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import iin_fast
from iin_fast import backends
from iin_fast._library import cpu_isa, libraries
from iin_fast.functional import affine_coupling
from iin_fast.ops.registry import OPS, gpu_ops

PROBE = """
import torch, iin_fast
from iin_fast._library import cpu_isa
from iin_fast.testing import check_ops
print(cpu_isa())
comparison = check_ops(device="cpu")
print("ok" if comparison.ok and len(comparison.rows) > 1000 else comparison)
"""


def test_context_manager_forces_and_restores() -> None:
    x = torch.randn(2, 3)
    assert backends.chosen("affine_coupling", x) == "cpp"
    with iin_fast.backend("reference"):
        assert backends.chosen("affine_coupling", x) == "reference"
        with iin_fast.backend("cpp"):
            assert backends.chosen("affine_coupling", x) == "cpp"
        assert backends.chosen("affine_coupling", x) == "reference"
    assert backends.chosen("affine_coupling", x) == "cpp"
    with pytest.raises(RuntimeError, match="inside"), iin_fast.backend("reference"):
        raise RuntimeError("inside")
    assert backends.chosen("affine_coupling", x) == "cpp"


def now() -> str:
    return backends.chosen("affine_coupling", torch.zeros(1))


def in_threads(*functions: Callable[[], None]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_that_overlap_choose_for_themselves() -> None:
    a_in, b_in, a_out = (threading.Event() for _ in range(3))
    seen = {}

    def a() -> None:
        with iin_fast.backend("reference"):
            a_in.set()
            b_in.wait(30)
            seen["a, beside b"] = now()
        seen["a, after"] = now()
        a_out.set()

    def b() -> None:
        a_in.wait(30)
        seen["b, before"] = now()
        with iin_fast.backend("cpp"), iin_fast.backend("reference"), iin_fast.backend("cpp"):
            b_in.set()
            a_out.wait(30)
            seen["b, after a"] = now()

    in_threads(a, b)
    assert seen == {"a, beside b": "reference", "b, before": "cpp", "b, after a": "cpp", "a, after": "cpp"}
    assert now() == "cpp" and backends._of_all_threads == []


def test_contexts_close_in_any_order() -> None:
    def generator(name: str) -> Iterator[None]:
        with iin_fast.backend(name):
            yield

    first, second, third = (generator(name) for name in ("reference", "cpp", "reference"))
    for one in (first, second, third):
        next(one)
    first.close()
    assert now() == "reference"
    third.close()
    with iin_fast.backend("reference"):
        second.close()
        assert now() == "reference"
    assert now() == "cpp"
    fourth = generator("reference")
    next(fourth)
    in_threads(fourth.close)  # in another thread, as a garbage collector may
    assert now() == "cpp" and backends._of_all_threads == []


def test_a_thread_of_autograd_follows_the_process() -> None:
    """Threads that Python did not start run backward on a GPU, with the modules that checkpoints call again."""
    seen: list[str] = []
    done = threading.Event()

    def look() -> None:
        seen.append(now())
        with iin_fast.backend("cpp"):
            seen.append(now())
        seen.append(now())
        done.set()

    with iin_fast.backend("reference"):
        _thread.start_new_thread(look, ())
        assert done.wait(30)
    assert seen == ["reference", "cpp", "reference"]


def test_a_compiled_call_takes_the_backend_of_its_thread() -> None:
    """One compiled function: each thread runs the graph of its own choice, in one graph."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(
        lambda x: x - 1 if backends.chosen("affine_coupling", x) == "reference" else x + 1,
        fullgraph=True,
        backend="eager",
    )
    x, seen = torch.zeros(1), []
    assert compiled(x) == 1
    with iin_fast.backend("reference"):
        assert compiled(x) == -1
        in_threads(lambda: seen.append(compiled(x).item()))
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert compiled(x) == -1
    assert seen == [1] and compiled(x) == 1


def test_backward_runs_where_forward_ran() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    y, _ = affine_coupling(x, x, x)
    with torch.profiler.profile() as profile, iin_fast.backend("reference"):
        y.sum().backward()
    assert any("iin_fast::affine_coupling_backward" in event.key for event in profile.key_averages())


def test_unknown_and_missing_backends_say_so() -> None:
    with (
        pytest.raises(ValueError, match="got 'cuda', expected one of reference, cpp, triton"),
        iin_fast.backend("cuda"),
    ):
        pass
    x = torch.randn(2, 3)
    backends.register("an op with two backends", "cpp", "cpu")
    with iin_fast.backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' is forced, but on cpu only"):
        backends.chosen("an op with two backends", x)


def test_reference_runs_no_compiled_op() -> None:
    x = torch.randn(2, 3)
    with torch.profiler.profile() as profile, iin_fast.backend("reference"):
        affine_coupling(x, x, x)
    assert not any("iin_fast" in event.key for event in profile.key_averages())
    with torch.profiler.profile() as profile:
        affine_coupling(x, x, x)
    assert any("iin_fast::affine_coupling" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("wanted", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(wanted: str) -> None:
    """IIN_FAST_CPU forces an instruction set; all ops hold their tolerances on each."""
    order = ["baseline", "avx2", "avx512"]
    if cpu_isa() not in order[order.index(wanted) :]:
        pytest.skip(f"this CPU has no {wanted}")
    environment = {**os.environ, "IIN_FAST_CPU": wanted}
    out = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == [wanted, "ok"], out.stdout + out.stderr


def test_environment_variable_selects_the_backend() -> None:
    code = "import torch, iin_fast.backends as b; print(b.chosen('affine_coupling', torch.ones(1)))"
    environment = {**os.environ, "IIN_FAST_BACKEND": "reference"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "reference"
    environment["IIN_FAST_BACKEND"] = "fastest"
    failed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert failed.returncode != 0 and "IIN_FAST_BACKEND: got 'fastest'" in failed.stderr


ON_CUDA: Any = SimpleNamespace(device=torch.device("cuda"))
needs_cuda_library = pytest.mark.skipif("cuda" not in libraries, reason="the build had no nvcc")


@needs_cuda_library
@pytest.mark.parametrize(
    ("driver", "runtime", "serves"), [(12080, 13000, False), (13000, 13010, True), (0, 13000, True)]
)
def test_a_driver_older_than_the_library_leaves_the_work_to_triton(
    driver: int, runtime: int, serves: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """A torch of CUDA 12 runs on drivers that a library of CUDA 13 refuses. 0 is a machine without a driver."""
    monkeypatch.setattr(backends, "cuda_versions", lambda: (driver, runtime))
    monkeypatch.setattr(backends, "_unfit", {})
    other = "triton" if find_spec("triton") else "reference"
    for op in gpu_ops():
        assert backends.chosen(op, ON_CUDA) == ("cpp" if serves else other)
        assert ("cpp" in backends.available(op, "cuda")) == serves
        assert "cpp" in backends.available(op, "cpu")
    assert len(recwarn) == (0 if serves else 1)
    if not serves:
        assert "the driver serves CUDA 12.8" in str(recwarn[0].message)
        message = "needs a driver for CUDA 13 or later .580 or later."
        with iin_fast.backend("cpp"), pytest.raises(backends.BackendUnavailable, match=message):
            backends.chosen("flow", ON_CUDA)


def test_a_gpu_older_than_the_kernels_runs_the_definition(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(backends, "cuda_versions", lambda: (13000, 13000))
    monkeypatch.setattr(backends, "_unfit", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (8, 0))[index])
    old: Any = SimpleNamespace(device=torch.device("cuda", 0))
    for op in gpu_ops():
        assert backends.chosen(op, old) == "reference"
        assert backends.available(op, "cuda", 0) == ["reference"]
        assert backends.available(op, "cuda") == backends.available(op, "cuda", 1) != ["reference"]
    reason = "cuda:0 has compute capability 7.5, the GPU kernels need 8.0 or later"
    assert [str(warning.message) for warning in recwarn] == [f"iin_fast: {reason}; other backends run instead"]
    for name in ("cpp", "triton"):
        with iin_fast.backend(name), pytest.raises(backends.BackendUnavailable, match=reason):
            backends.chosen("flow", old)


def test_compile_takes_the_look_at_the_driver_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cuda_versions", lambda: (13000, 13000))
    monkeypatch.setattr(backends, "_unfit", {})
    compiled: Any = torch.compile(
        lambda x: x + 1 if backends._runs_on("cpp", 0) else x - 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))


def test_rocm_has_no_compiled_library() -> None:
    """torch calls an AMD GPU "cuda", too; the library has no code for it."""
    code = """
import torch
torch.version.hip = "6.4"
from iin_fast import backend, backends
from iin_fast.ops.registry import gpu_ops
from types import SimpleNamespace
x = SimpleNamespace(device=torch.device("cuda"))
for op in gpu_ops():
    assert "cpp" in backends.available(op, "cpu") and "cpp" not in backends.available(op, "cuda")
    print(backends.chosen(op, x))
try:
    with backend("cpp"):
        backends.chosen(op, x)
except backends.BackendUnavailable as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert set(out[:-2]) == {"triton" if find_spec("triton") else "reference"}
    assert "backend 'cpp' is forced, but on cuda only" in out[-2]
    assert ("no code for AMD GPUs" in out[-2]) == ("cuda" in libraries)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_autocast_is_registered_wherever_an_op_may_run(device: str) -> None:
    for op in OPS.values():
        for backend in op.backends:
            name = f"{backends.ops(backend).name}::{op.name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, f"Autocast{device.upper()}")
