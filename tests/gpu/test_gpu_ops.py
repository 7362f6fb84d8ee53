"""Every op on every backend that a GPU has, in every type, against its definition in float64."""

import pytest
import torch
from torch import Tensor

from iin_fast.backends import NAMES, available, backend
from iin_fast.testing.backends import CASES, _run

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


def norm_error(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, relative to the norm: a single kink of a LeakyReLU does not decide it."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    assert bool((got.isfinite() == want.isfinite()).all())
    largest = torch.linalg.vector_norm(want)
    return float(torch.linalg.vector_norm(got - want) / largest) if float(largest) > 0 else float(got.abs().sum())


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("op", CASES)
def test_equals_the_definition_in_float64(op: str, name: str, device: str) -> None:
    if name not in available(op, device):
        pytest.skip(f"{op} has no backend {name} on {device}")
    cases, dtypes, slack = CASES[op]
    worst: dict[str, float] = {}
    for dtype in dtypes:
        for label, call, inputs in cases(dtype, device):
            exact = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
            with backend("reference"):
                want = _run(call, exact, {})
            with backend(name):
                got = _run(call, inputs, {})
            assert want.keys() <= got.keys() and not any(got[key].numel() for key in got.keys() - want.keys())
            for key in want:
                # through many layers a kink that falls on the other side changes a gradient by a finite step
                kinks = 50 if op == "flow" and key.startswith("grad") and dtype != torch.float64 else 1
                error = norm_error(got[key], want[key]) / (TOLERANCES[dtype] * slack * kinks)
                where = f"{str(dtype).removeprefix('torch.')} {label} {key}"
                worst[where] = max(worst.get(where, 0.0), error)
    wrong = {where: f"{error:.2g} x tolerance" for where, error in worst.items() if not error <= 1}
    assert not wrong, wrong
