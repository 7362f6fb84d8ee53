"""The eager baseline computes what the flow computes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iin_fast.nn import Flow
from iin_fast.testing import eager_flow, published_grads

CONFIGS = {
    "even": dict(dim=6),
    "odd": dict(dim=7),
    "wide": dict(dim=6, hidden_dim=70),
    "context": dict(dim=5, context_dim=3),
    "activation": dict(dim=6, activation_slope=0.9),
    "exact": dict(dim=6, activation_slope=0.9, exact_logdet=True),
    "no actnorm": dict(dim=6, actnorm=False),
    "no permutation": dict(dim=6, permute=False),
    "steep": dict(dim=6, leaky_slope=0.3),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def flow(request: pytest.FixtureRequest) -> Flow:
    torch.manual_seed(0)
    config = dict(n_flows=3, hidden_dim=16, hidden_depth=1) | request.param
    return Flow(**config, dtype=torch.float64)


def inputs(flow: Flow) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x = 2 * torch.randn(5, flow.dim, dtype=torch.float64) + 1
    return (x, torch.randn(3, 5, flow.context_dim, dtype=torch.float64)) if flow.context_dim else (x,)


def test_values_start_gradients_and_reverse(flow):
    x, *context = inputs(flow)
    eager = eager_flow(flow)  # before the start: both make their own
    z, logdet = flow(x, *context)
    z_eager, logdet_eager = eager(x, *context)
    torch.testing.assert_close((z_eager, logdet_eager), (z, logdet), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(eager.reverse(z, *context), x, rtol=1e-9, atol=1e-9)
    (z.square().sum() - logdet.sum()).backward()
    (z_eager.square().sum() - logdet_eager.sum()).backward()
    ours = published_grads(flow)
    for block, net, half in ((0, 0, 0), (2, 1, 1), (1, 0, 1)):
        layers = (eager.blocks[block].coupling.s, eager.blocks[block].coupling.t)[net][half].main
        torch.testing.assert_close(layers[0].weight.grad, ours["weight_in"][block, half, net])
        torch.testing.assert_close(layers[4].bias.grad, ours["bias_out"][block, half, net])


def test_copy_of_a_started_flow(flow):
    x, *context = inputs(flow)
    flow(x, *context)
    eager = eager_flow(flow)
    torch.testing.assert_close(eager(x + 1, *context), flow(x + 1, *context), rtol=1e-11, atol=1e-11)


def test_one_context_for_all_blocks():
    flow = Flow(6, n_flows=2, hidden_dim=16, context_dim=3)
    x, context = torch.randn(4, 6), torch.randn(4, 3)
    torch.testing.assert_close(eager_flow(flow)(x, context), flow(x, context), rtol=1e-5, atol=1e-5)


def test_it_has_the_published_parameters_and_costs():
    flow = Flow(6, n_flows=3, hidden_dim=16)
    eager = eager_flow(flow)
    assert sum(p.numel() for p in eager.parameters()) == sum(p.numel() for p in flow.parameters())
    assert len(list(eager.parameters())) == 3 * (2 + 4 * 2 * 4)
    reads = []

    class CountReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(func)
            return func(*args, **(kwargs or {}))

    with CountReads():
        eager(torch.randn(4, 6))
    assert len(reads) == 3  # ActNorm asks the device once a block


@pytest.mark.parametrize("reads_flag", [True, False])
def test_without_the_flag_nothing_goes_between_devices(reads_flag):
    """Else no CUDA graph could hold it."""
    flow = Flow(6, n_flows=2, hidden_dim=16)
    flow(torch.randn(20, 6))
    eager = eager_flow(flow, reads_flag=reads_flag).to("meta")
    for block in eager.blocks:
        block.norm.initialized = torch.tensor(1)  # a meta tensor has no value to read
    crossings = []

    class Crossings(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            if len({t.device for t in tensors}) > 1:
                crossings.append(func)
            return result

    with Crossings():
        z, logdet = eager(torch.randn(5, 6, device="meta"))
        (z.sum() + logdet.sum()).backward()
        eager.reverse(z)
    assert crossings == ([torch.ops.aten._to_copy.default] * 2 if reads_flag else [])
