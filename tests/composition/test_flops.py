"""torch's flop counter counts what the same model in plain torch takes."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import iin_fast
from iin_fast.functional import affine_coupling, flow_program, pair_nll, spline_coupling
from iin_fast.nn import Flow
from iin_fast.testing.eager import eager_flow

SHAPES = [(6, 2, 16, 2, 0), (7, 3, 70, 0, 0), (5, 1, 8, 1, 3)]


def flops(call: Callable[[], Tensor], backward: bool = True) -> tuple[int, int]:
    """Of the call, and of its backward."""
    with FlopCounterMode(display=False) as forward:
        result = call()
    if not backward:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as back:
        result.sum().backward()
    return forward.get_total_flops(), back.get_total_flops()


def make(dim: int, n: int, hidden: int, depth: int, width: int, memory: str = "auto") -> tuple[Flow, list[Tensor]]:
    flow = Flow(dim, n, hidden, depth, context_dim=width, memory=memory)
    inputs = [torch.randn(9, dim, requires_grad=True), *([torch.randn(9, width)] if width else [])]
    flow(*inputs)  # the start of ActNorm
    return flow, inputs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flow_forward_and_backward(shape: tuple[int, ...]) -> None:
    flow, inputs = make(*shape)
    eager = eager_flow(flow)
    expected = flops(lambda: sum(t.sum() for t in eager(*inputs)))
    assert expected[0] > 0 and expected[1] == 2 * expected[0]
    assert flops(lambda: sum(t.sum() for t in flow(*inputs))) == expected
    with iin_fast.backend("reference"):
        assert flops(lambda: sum(t.sum() for t in flow(*inputs))) == expected
    inverse = flops(lambda: flow.inverse(*inputs)[0].sum(), backward=False)
    assert inverse == flops(lambda: eager.reverse(*inputs).sum(), backward=False) == (expected[0], 0)
    with torch.no_grad():  # another way from Python to the op
        assert flops(lambda: flow(*inputs)[0].sum(), backward=False) == (expected[0], 0)


@pytest.mark.parametrize("memory", ["checkpoint", "invert"])
def test_what_memory_changes(memory: str) -> None:
    flow, inputs = make(*SHAPES[0], memory=memory)
    forward, backward = flops(lambda: sum(t.sum() for t in flow(*inputs)))
    assert backward == 3 * forward  # the map again


def test_what_frozen_weights_change() -> None:
    flow, inputs = make(*SHAPES[0])
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(not name.startswith(("weight", "bias")))
    eager = eager_flow(flow)
    for name, parameter in eager.named_parameters():
        parameter.requires_grad_(".norm." in name)
    assert flops(lambda: sum(t.sum() for t in flow(*inputs))) == flops(lambda: sum(t.sum() for t in eager(*inputs)))


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_flow_program(memory: str) -> None:
    """A spline flow with LU layers, its definition in plain torch beside it."""
    flow = iin_fast.nn.NeuralSplineFlow(5, 2, n_flows=2, bins=4, hidden_dim=8)
    x, context = torch.randn(9, 5, requires_grad=True), torch.randn(9, 2, requires_grad=True)
    flow(x, context)  # the start of ActNorm
    program, parameters = flow.program(), list(flow.parameters())

    def call(inverse: bool = False) -> Tensor:
        return sum(t.sum() for t in flow_program(x, context, parameters, program, inverse=inverse, memory=memory))

    with iin_fast.backend("reference"):
        expected, inverse = flops(call), flops(lambda: call(True), backward=False)
    assert expected[0] > inverse[0] > 0
    again = expected[0] if memory == "recompute" else 0
    assert flops(call) == (expected[0], expected[1] + again)
    assert flops(lambda: call(True), backward=False) == inverse


def test_ops_without_products_count_nothing() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    shared = torch.ones(4, 1, dtype=torch.bool)
    zeros = torch.zeros(4)
    for call in (
        lambda: affine_coupling(x, x, x)[0],
        lambda: pair_nll(x, x, zeros, zeros, shared, [6], 0.9),
        lambda: spline_coupling(x, torch.zeros(4, 6 * 11), bins=4)[0],
    ):
        assert flops(call) == (0, 0)


@pytest.mark.parametrize("order", ["iin_fast, torch.utils.flop_counter", "torch.utils.flop_counter, iin_fast"])
def test_formulas_are_there_whoever_is_imported_first(order: str) -> None:
    code = f"import {order}\nassert torch.ops.iin_fast.flow in torch.utils.flop_counter.flop_registry"
    subprocess.run([sys.executable, "-c", f"import torch\n{code}"], check=True)
