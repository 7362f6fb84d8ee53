"""torch.library.opcheck, all utilities, of every op that the cases run, forward and backward, as they call it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import OPS, Case, gradients


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "iin_fast":
            self.calls.append((func, tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in args)))
        return func(*args, **(kwargs or {}))


def recorded(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    module, inputs = case.module(), case.inputs(3)
    with Recorder() as recorder:
        gradients(module, module, inputs)
    return recorder.calls


@pytest.mark.parametrize("case", OPS, ids=[case.name for case in OPS])
def test_opcheck(case: Case):
    calls = recorded(case)
    assert [func._opname.endswith("_backward") for func, _ in calls] == [False, True]
    for func, args in calls:
        if not func._opname.endswith("_backward"):
            args = tuple(t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args)
        results = torch.library.opcheck(func, args)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_every_op_of_the_library_is_checked():
    checked = {func._opname for case in OPS for func, _ in recorded(case)}
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("iin_fast::")}
    # What measures the machine and names its instruction set is not called in models.
    assert checked == {name for name in names if f"{name}_backward" in names or name.endswith("_backward")}
