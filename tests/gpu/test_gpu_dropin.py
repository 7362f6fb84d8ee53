"""Other libraries' flows on a GPU after ``accelerate``: their own numbers, in a few launches."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import iin_fast

pytest.importorskip("nflows")
from nflows import distributions, flows, transforms
from nflows.nn import nets


def maf() -> flows.Flow:
    layers = [
        layer
        for _ in range(3)
        for layer in (
            transforms.MaskedAffineAutoregressiveTransform(6, hidden_features=32, context_features=3),
            transforms.ReversePermutation(6),
        )
    ]
    return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([6]))


def splines() -> flows.Flow:
    def net(inputs: int, outputs: int) -> nn.Module:
        return nets.ResidualNet(inputs, outputs, hidden_features=32, context_features=3)

    layers = []
    for turn in range(3):
        mask = (torch.arange(6) + turn) % 2
        coupling = transforms.PiecewiseRationalQuadraticCouplingTransform(mask, net, tails="linear", tail_bound=3.0)
        layers += [coupling, transforms.LULinear(6)]
    return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([6]))


def scores(flow: flows.Flow, x: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
    log_prob = flow.log_prob(x, context)
    return [log_prob.detach(), *torch.autograd.grad(log_prob.sum(), [*flow.parameters()])]


@pytest.mark.parametrize("make", [maf, splines])
def test_accelerate_gives_the_librarys_numbers(make: Callable[[], flows.Flow], device: str) -> None:
    torch.manual_seed(0)
    plain = make().to(device)
    fast = copy.deepcopy(plain)
    iin_fast.accelerate(fast)
    x, context = torch.randn(200, 6, device=device), torch.randn(200, 3, device=device)
    for found, want in zip(scores(fast, x, context), scores(plain, x, context), strict=True):
        assert float((found - want).abs().max()) <= 1e-3 * max(1.0, float(want.abs().max()))
    with torch.no_grad():
        noise = plain._transform(x, context)[0]
        back = fast._transform.inverse(noise, context)[0]
    assert float((back - x).abs().max()) < 1e-2


@pytest.mark.needs_cuda
@pytest.mark.parametrize("make", [maf, splines])
def test_accelerate_takes_one_walk(make: Callable[[], flows.Flow], device: str) -> None:
    flow = make().to(device)
    iin_fast.accelerate(flow)
    x, context = torch.randn(200, 6, device=device), torch.randn(200, 3, device=device)
    scores(flow, x, context)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        scores(flow, x, context)
        torch.cuda.synchronize()
    launched = [event.name for event in profiler.events()]
    assert sum("program_forward_kernel" in name for name in launched) == 1
    assert sum("program_backward_kernel" in name for name in launched) == 1
