"""The definition of flow programs: its inverse, its log-determinant, and its gradients."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flow.programs import KINDS, Drawn, programs, tame
from iin_fast.flow import FlowProgram, ProgramBuilder, Weights, mlp, spline
from iin_fast.ops.flow_program.reference import flow_program

SETTINGS = settings(max_examples=60, deadline=None)


def run(drawn: Drawn, x: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    return flow_program(x, drawn.context, drawn.parameters, drawn.program, **options)


@SETTINGS
@given(programs(wraps=False))
def test_inverse_undoes_forward(drawn: Drawn) -> None:
    y, logdet = run(drawn, drawn.x)
    assume(tame(y, logdet))
    back, back_logdet = run(drawn, y, inverse=True)
    assert y.shape == drawn.x.shape and logdet.shape == drawn.x.shape[:1]
    torch.testing.assert_close(back, drawn.x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back_logdet, -logdet, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [1, 3])
def test_a_wrapped_spline_turns_a_circle_by_half(features: int) -> None:
    bound, builder = 3.0, ProgramBuilder(features + 1)
    transformer = spline(5, tail_bound=bound, wrap=True)
    weight = builder.ref(torch.zeros(features * transformer.count, 1, dtype=torch.float64))
    layer = mlp([Weights(features * transformer.count, weight)])
    builder.coupling([features], range(features), layer, transformer)
    x = torch.linspace(-9.0, 9.0, 40, dtype=torch.float64)[:, None].repeat(1, features + 1)
    drawn = Drawn(builder.build(), builder.tensors, x, None)
    turned, _ = run(drawn, x)
    inside, _ = run(drawn, x + bound)
    whole, _ = run(drawn, x + 2 * bound)
    torch.testing.assert_close(whole[:, :-1], turned[:, :-1])
    assert bool((turned[:, :-1].abs() <= bound).all())
    assert not torch.allclose(inside[:, :-1], turned[:, :-1])
    with torch.no_grad():
        builder.tensors[0].normal_()
    within = x[x[:, 0].abs() < bound - 0.1]
    there, logdet = run(drawn, within)
    back, back_logdet = run(drawn, there, inverse=True)
    torch.testing.assert_close(back, within)
    torch.testing.assert_close(back_logdet, -logdet)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_logdet_is_that_of_the_jacobian(kind: str, data: st.DataObject) -> None:
    drawn = data.draw(programs(kinds=(kind,), dims=(1, 6), batches=(1, 3), layers=(1, 2)))
    for inverse in (False, True):
        y, logdet = run(drawn, drawn.x, inverse=inverse)
        assume(tame(y, logdet))
        jacobian = torch.autograd.functional.jacobian(lambda x: run(drawn, x, inverse=inverse)[0].sum(0), drawn.x)  # noqa: B023
        torch.testing.assert_close(logdet, jacobian.transpose(0, 1).det().abs().log(), rtol=1e-7, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(programs(dims=(1, 4), batches=(1, 2), layers=(1, 3)))
def test_gradients(drawn: Drawn) -> None:
    inputs = drawn.inputs()

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(zip(map(id, inputs), given, strict=True))
        x, context = values[id(drawn.x)], None if drawn.context is None else values[id(drawn.context)]
        parameters = [values.get(id(p), p) for p in drawn.parameters]
        return flow_program(x, context, parameters, drawn.program, base=True)

    outputs = call(*inputs)
    first = torch.autograd.grad(sum(t.sum() for t in outputs), inputs, create_graph=True, allow_unused=True)
    second = torch.autograd.grad(sum(g.sum() for g in first if g is not None), inputs, allow_unused=True)
    assume(tame(*outputs, *(g for g in (*first, *second) if g is not None), most=100))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, atol=1e-4, eps=1e-7)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, atol=1e-3, eps=1e-7)


@SETTINGS
@given(programs(batches=(0, 9)))
def test_base_is_a_standard_normal_of_the_result(drawn: Drawn) -> None:
    y, logdet = run(drawn, drawn.x)
    same, total = run(drawn, drawn.x, base=True)
    density = -0.5 * (y * y).sum(1) - 0.5 * drawn.program.dim * math.log(2 * math.pi)
    assert torch.equal(y, same)
    torch.testing.assert_close(total - logdet, density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation(dtype: torch.dtype) -> None:
    """With the slope in the precision of x, not in that of a Python number's default type."""
    program = FlowProgram.parse("flow 1 3 0 0 1 activation 0.1 1")
    x = torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -1.0, 1.0]], dtype=dtype)
    slope = torch.tensor(0.1, dtype=dtype)
    y, logdet = flow_program(x, None, [], program)
    assert torch.equal(y, torch.where(x < 0, slope * x, x)) and y.dtype == dtype
    torch.testing.assert_close(
        logdet, slope.log() * torch.tensor([1, 2]), rtol=1e-7 if dtype == torch.float32 else 1e-15, atol=0
    )
    uncounted = FlowProgram.parse("flow 1 3 0 0 1 activation 0.1 0")
    assert torch.equal(flow_program(x, None, [], uncounted)[1], torch.zeros(2, dtype=dtype))
