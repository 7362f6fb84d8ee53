"""The choice of a backend, and the instruction set of the CPU loops."""

import os
import subprocess
import sys

import pytest
import torch

import iin_fast
from iin_fast import backends
from iin_fast._library import cpu_isa
from iin_fast.functional import affine_coupling

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
