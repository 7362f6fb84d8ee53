"""What ops and modules return may be changed in place before backward, as what plain torch returns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iin_fast import IIN
from iin_fast.compat import iin as published_iin
from iin_fast.functional import affine_coupling
from iin_fast.nn import Flow

from .cases import CASES, DIM, Case, gradients, normal, same, seeded, tensors

READS_ITS_OUTPUT = {"affine_coupling inverse"}
SPLITS = {"compat.iin FactorTransformer"}  # torch.split, as published, whose views torch protects
cases = [case for case in CASES if case.name not in READS_ITS_OUTPUT | SPLITS]


@pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])
def test_outputs_may_change_in_place(case: Case) -> None:
    """Results and gradients are those of a change out of place."""
    module, inputs = case.module(), case.inputs(5)

    def in_place(*args: Any) -> list[Tensor]:
        results = tensors(module(*args))
        for result in results:
            result *= 1.5
            result += 0.25
        return results

    def out_of_place(*args: Any) -> list[Tensor]:
        return [result * 1.5 + 0.25 for result in tensors(module(*args))]

    same(gradients(in_place, module, inputs), gradients(out_of_place, module, inputs), rtol=0, atol=0)


def test_a_factor_may_be_zeroed() -> None:
    model = IIN(DIM, {"digit": 3}, 2, 8, 1, generator=seeded())
    model(normal(0, 20, DIM))
    z = normal(1, 5, DIM)

    def grads(zero: Callable[[Any], Tensor]) -> tuple[Tensor, ...]:
        factors, logdet = model(z)
        return torch.autograd.grad(zero(factors).square().sum() - logdet.sum(), list(model.parameters()))

    def in_place(factors: Any) -> Tensor:
        factors["digit"][:] = 0
        return factors.tensor

    same(grads(in_place), grads(lambda f: f.replace(digit=torch.zeros(5, 3)).tensor))


def test_the_log_det_of_the_published_actnorm_may_change_in_place() -> None:
    _, logdet = published_iin.VectorActNorm(DIM)(normal(1, 5, DIM))
    logdet += torch.arange(5)
    assert logdet.shape == (5,) and (logdet[1] - logdet[0]).item() == pytest.approx(1)


def test_an_inverted_flow_keeps_a_copy() -> None:
    flow = Flow(DIM, 2, 8, 1, memory="invert", generator=seeded())
    flow(normal(0, 20, DIM))
    for call in (flow, flow.inverse):
        same(changed(call), changed(lambda x, call=call: tuple(t.clone() for t in call(x))))


def changed(call: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
    """The gradient of x where y changes in place."""
    x = normal(1, 5, DIM).requires_grad_()
    y, logdet = call(x)
    y += 1
    (y.square().sum() + logdet.sum()).backward()
    return x.grad


def test_where_backward_reads_the_output_the_error_says_what_to_do() -> None:
    shift = normal(2, 5, DIM)
    with pytest.raises(RuntimeError, match="affine_coupling: backward needs .* change a copy"):
        changed(lambda x: affine_coupling(x, shift, shift, inverse=True))
