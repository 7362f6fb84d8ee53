"""torch.library.opcheck, all utilities, of every op that the cases run, forward and backward, as they call it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iin_fast import functional as F
from iin_fast.ops.flow import flow as flow_op
from iin_fast.ops.registry import OPS as REGISTERED

from .cases import DIM, OPS, Call, Case, flow, gradients, normal, pair


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "iin_fast":
            self.calls.append((func, tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in args)))
        return func(*args, **(kwargs or {}))


def recorded(case: Case, batch: int = 3, dtype: torch.dtype = torch.float32) -> list[tuple[Any, tuple[Any, ...]]]:
    module = case.module().to(dtype)
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in case.inputs(batch))
    with Recorder() as recorder:
        gradients(module, module, inputs)
    return recorder.calls


def check(calls: list[tuple[Any, tuple[Any, ...]]]) -> None:
    assert [func._opname.endswith("_backward") for func, _ in calls] == [False, True]
    for func, args in calls:
        if not func._opname.endswith("_backward"):
            args = tuple(t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args)
        results = torch.library.opcheck(func, args)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("case", OPS, ids=[case.name for case in OPS])
def test_opcheck(case: Case):
    check(recorded(case))


def coupling(n: int) -> tuple[Tensor, ...]:
    return tuple(normal(3, 3, n, DIM))


def spline(count: int) -> Any:
    return lambda n: (normal(1, n, DIM), normal(2, n, DIM, count))


def context(n: int) -> tuple[Tensor, ...]:
    """Two blocks under one context each."""
    names = "loc scale weight_in bias_in weight_hidden bias_hidden weight_out bias_out permutation".split()
    module = flow(context_dim=2)
    return normal(1, n, DIM), normal(2, 2, n, 2), *(getattr(module, name).detach() for name in names)


OPTIONS = [
    Case("affine_coupling identity", lambda: Call(F.affine_coupling, squash="identity"), coupling),
    Case("affine_coupling atan", lambda: Call(F.affine_coupling, squash="atan", clamp=1.5, inverse=True), coupling),
    Case("affine_coupling sigmoid", lambda: Call(F.affine_coupling, squash="sigmoid", inverse=True), coupling),
    Case("spline_coupling no tails", lambda: Call(F.spline_coupling, bins=4, tails=None), spline(13)),
    Case("spline_coupling circular", lambda: Call(F.spline_coupling, bins=4, tails="circular", inverse=True), spline(12)),
    Case("spline_coupling zuko", lambda: Call(F.spline_coupling, bins=4, parameterization="zuko"), spline(11)),
    Case("spline_coupling box", lambda: Call(F.spline_coupling, bins=4, tails=None, box=(0, 2, -1, 3), inverse=True), spline(13)),
    Case("pair_nll normalized", lambda: Call(F.pair_nll, sizes=[3, 2, 1], rho=0.9, normalized=True), pair),
    Case("flow context", lambda: Call(flow_op, activation_slope=0.9, exact_logdet=True), context),
    Case("flow context inverse", lambda: Call(flow_op, inverse=True), context),
    Case("flow context checkpoint", lambda: Call(flow_op, memory="checkpoint"), context),
    Case("flow context invert", lambda: Call(flow_op, memory="invert"), context),
]  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS, ids=[case.name for case in OPTIONS])
def test_options_in_float64(case: Case):
    check(recorded(case, dtype=torch.float64))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", REGISTERED)
def test_tiny_batches(name: str, batch: int):
    check(recorded(next(case for case in OPS if case.name == name), batch))


def test_every_op_of_the_library_is_checked():
    checked = {func._opname for case in OPS for func, _ in recorded(case)}
    kernels = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("iin_fast::"))
    names = {name.split("::")[1] for name in ops if kernels(name, "CPU")}
    # What measures the machine and names its instruction set is not called in models.
    assert checked == {name for name in names if f"{name}_backward" in names or name.endswith("_backward")}
