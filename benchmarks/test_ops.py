"""pytest-benchmark of the small ops against their definition in plain torch: pytest benchmarks/test_ops.py"""

from contextlib import nullcontext

import pytest
import torch

import iin_fast
from iin_fast.functional import affine_coupling, pair_nll

ROWS = {"small": 256, "large": 65536}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("squash", ["tanh", "atan", "sigmoid"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_affine_coupling(benchmark, backend: str, rows: str, squash: str, gradient: bool) -> None:
    x, raw, shift = (t.requires_grad_(gradient) for t in torch.randn(3, ROWS[rows], 32).unbind(0))

    def call() -> None:
        with nullcontext() if gradient else torch.no_grad():
            y, logdet = affine_coupling(x, raw, shift, squash=squash)
        if gradient:
            torch.autograd.grad((y, logdet), (x, raw, shift), (y.detach(), logdet.detach()))

    with iin_fast.backend(backend):
        benchmark.pedantic(call, warmup_rounds=2, rounds=15)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("rows", ROWS)
def test_pair_nll(benchmark, backend: str, rows: str) -> None:
    za, zb = torch.randn(2, ROWS[rows], 64, requires_grad=True)
    logdet_a, logdet_b = torch.randn(2, ROWS[rows])
    shared = torch.rand(ROWS[rows], 3) < 0.5

    def call() -> None:
        loss = pair_nll(za, zb, logdet_a, logdet_b, shared, [22, 11, 31], 0.975)
        torch.autograd.grad(loss.mean(), (za, zb))

    with iin_fast.backend(backend):
        benchmark.pedantic(call, warmup_rounds=2, rounds=15)
