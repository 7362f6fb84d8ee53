"""NeuralSplineFlow: density, samples, context, start."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iin_fast.nn import ActNorm, LULinear, NeuralSplineFlow, Permutation, ResidualNet, SplineCoupling


def make(dim: int = 3, dtype: torch.dtype = torch.float64, **options) -> NeuralSplineFlow:
    generator = torch.Generator().manual_seed(0)
    options = {"n_flows": 2, "bins": 5, "hidden_dim": 16, **options}
    flow = NeuralSplineFlow(dim, generator=generator, dtype=dtype, **options)
    context = torch.randn(200, flow.context_dim, generator=generator, dtype=dtype) if flow.context_dim else None
    flow.initialize(2 * torch.randn(200, dim, generator=generator, dtype=dtype) + 1, context)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return flow


def test_fresh_flow_is_the_identity_after_its_start():
    flow = NeuralSplineFlow(
        4, n_flows=3, hidden_dim=8, mixing="permutation", generator=torch.Generator().manual_seed(0)
    )
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    z, logdet = flow(x)
    standard = (x - x.mean(0)) / x.std(0)
    order = torch.arange(4)
    for permutation in flow.permutation:
        order = order[permutation]
    torch.testing.assert_close(z, standard[:, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logdet, -x.std(0).log().sum().expand(400), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixing", ["lu", "permutation"])
def test_density_integrates_to_one(mixing):
    flow = make(2, mixing=mixing)
    with torch.no_grad():
        samples = flow.sample(4000)
        low, high = samples.amin(0) - 3, samples.amax(0) + 3
        axes = [torch.linspace(a, b, 700, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
        total = flow.log_prob(torch.cartesian_prod(*axes)).exp().sum()
        total = total * (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert abs(total - 1) < 2e-3


def test_log_prob_is_change_of_variables_under_a_context():
    flow = make(3, context_dim=2)
    x, context = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    normal = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    for row, c, value in zip(x, context, flow.log_prob(x, context), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r, c=c: flow(r[None], c[None])[0][0], row)
        expected = normal.log_prob(flow(row[None], c[None])[0][0]) + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_samples_score_like_their_noise():
    flow = make(3, context_dim=2)
    context = torch.randn(5, 2).double()
    x, log_prob = flow.distribution(context).rsample_and_log_prob((7,))
    assert x.shape == (7, 5, 3)
    torch.testing.assert_close(flow.log_prob(x, context), log_prob, rtol=1e-8, atol=1e-8)
    torch.manual_seed(3)
    first = flow.sample((7,), context)
    torch.manual_seed(3)
    again = flow.rsample((7,), context)
    assert not first.requires_grad and again.requires_grad
    torch.testing.assert_close(first, again.detach())
    assert flow.sample(context=context).shape == (5, 3)


def test_rsample_has_the_gradient_of_the_inverse():
    flow = make(2)
    torch.manual_seed(0)
    x = flow.rsample(3)
    (gradient,) = torch.autograd.grad(x.square().sum(), flow.lu_bias)
    torch.manual_seed(0)
    noise = torch.randn(3, 2, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            flow.lu_bias[-1, 0] += sign * step
            values.append(flow.inverse(noise)[0].square().sum())
            flow.lu_bias[-1, 0] -= sign * step
    torch.testing.assert_close(gradient[-1, 0], (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-5)


def test_training_finds_two_modes():
    """Two well separated normals: their density is known, and a flow of few blocks comes within 0.1 nats of it."""
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(0, 2, (4096, 1), generator=generator) * 4.0 - 2
    x = torch.cat([side, torch.zeros_like(side)], 1) + 0.5 * torch.randn(4096, 2, generator=generator)
    flow = NeuralSplineFlow(2, n_flows=2, hidden_dim=32, generator=generator)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for step in range(200):
        batch = x[512 * (step % 8) : 512 * (step % 8 + 1)]
        loss = -flow.log_prob(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parts = [
        torch.distributions.Normal(torch.tensor([m, 0.0]), 0.5).log_prob(x).sum(1) - torch.tensor(2.0).log()
        for m in (-2.0, 2.0)
    ]
    truth = torch.logaddexp(*parts).mean()
    with torch.no_grad():
        assert truth - flow.log_prob(x).mean() < 0.1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(dim=1), ValueError, "NeuralSplineFlow: dim is 1, expected an integer of at least 2"),
        (dict(dim="3"), TypeError, "NeuralSplineFlow: dim is '3', expected an integer"),
        (dict(dim=3, context_dim=-1), ValueError, "NeuralSplineFlow: context_dim is -1"),
        (dict(dim=3, n_flows=0), ValueError, "NeuralSplineFlow: n_flows is 0"),
        (dict(dim=3, bins=0), ValueError, "NeuralSplineFlow: bins is 0"),
        (dict(dim=3, bins=8.0), TypeError, "NeuralSplineFlow: bins is 8.0, expected a positive integer"),
        (dict(dim=3, mixing="none"), ValueError, "mixing is 'none', expected one of 'lu', 'permutation'"),
        (dict(dim=3, dropout=1.0), ValueError, "dropout is 1.0"),
        (dict(dim=3, hidden_dim=0), ValueError, "NeuralSplineFlow: hidden_dim is 0"),
        (dict(dim=3, hidden_dim=16.0), TypeError, "NeuralSplineFlow: hidden_dim is 16.0"),
        (dict(dim=3, hidden_depth=-1), ValueError, "NeuralSplineFlow: hidden_depth is -1"),
        (dict(dim=3, tail_bound=float("nan")), ValueError, "tail_bound is nan, expected a finite number"),
        (dict(dim=3, bins=1001), ValueError, "min_bin_width is 0.001"),
    ],
)
def test_bad_construction(arguments, kind, message):
    with pytest.raises(kind, match=message):
        NeuralSplineFlow(**arguments)


def test_bad_context():
    flow = make(3, context_dim=2)
    x = torch.zeros(4, 3).double()
    for context in (None, torch.zeros(4, 3).double(), torch.zeros(3, 2).double()):
        with pytest.raises(ValueError, match="NeuralSplineFlow: context is"):
            flow(x, context)
    with pytest.raises(ValueError, match=r"context is \[4, 2\], expected None"):
        make(3)(x, torch.zeros(4, 2).double())


def test_bad_dtype():
    flow = make(3, context_dim=2, dtype=torch.float32)
    x, context = torch.zeros(4, 3), torch.zeros(4, 2)
    with pytest.raises(TypeError, match="NeuralSplineFlow: x has dtype float64, expected float32 like the parameters"):
        flow(x.double(), context)
    with pytest.raises(TypeError, match="NeuralSplineFlow: context has dtype float64, expected float32"):
        flow.inverse(x, context.double())
    with torch.autocast("cpu", torch.bfloat16):  # casts by itself
        assert flow(x.bfloat16(), context)[1].isfinite().all()


def test_lu_linear_is_its_matrix():
    torch.manual_seed(0)
    linear = LULinear(4, dtype=torch.float64)
    assert torch.allclose(linear(torch.eye(4).double())[0], torch.eye(4).double(), atol=1e-12)
    with torch.no_grad():
        linear.weight.normal_()
    lower, upper = linear.factors()
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(linear(x)[0], x @ (lower @ upper).T + linear.bias)
    for bad in (dict(dim=0), dict(dim=2, min_diagonal=1.0)):
        with pytest.raises(ValueError, match="LULinear: "):
            LULinear(**bad)


def test_residual_net_is_what_its_formula_says():
    torch.manual_seed(0)
    net = ResidualNet(3, 2, hidden_dim=4, hidden_depth=1)
    x = torch.randn(5, 3)
    h = net.first(x)
    inner, outer = net.blocks[0]
    h = h + outer(torch.relu(inner(torch.relu(h))))
    torch.testing.assert_close(net(x), net.last(torch.relu(h)))
    always, never = ResidualNet(3, 2, 64, dropout=0.5), ResidualNet(3, 2, 64)
    assert not torch.equal(always(x), always(x)) and torch.equal(never(x), never(x))
    assert torch.equal(always.eval()(x), always(x))


def test_spline_coupling_refuses_a_conditioner_of_another_size():
    coupling = SplineCoupling(5, torch.nn.Linear(3, 21), bins=4)
    with pytest.raises(ValueError, match=r"SplineCoupling: conditioner returned shape \[2, 21\], expected \[2, 22\]"):
        coupling(torch.zeros(2, 5))


def layers_of(dim: int, context_dim: int, n_flows: int, mixing: str, seed: int) -> torch.nn.ModuleList:
    """The same flow of modules of this package, drawn in the order that a seed has always meant."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[torch.nn.Module] = []
    for _ in range(n_flows):
        layers.append(ActNorm(dim, dtype=torch.float64))
        for swap in (False, True):
            inputs, outputs = dim - dim // 2 + context_dim, SplineCoupling.outputs(dim, bins=4)
            net = ResidualNet(inputs, outputs, 16, generator=generator, dtype=torch.float64)
            layers.append(SplineCoupling(dim, net, bins=4, swap=swap))
            with torch.no_grad():  # the flow starts as the identity
                net.last.weight.zero_()
                raw = net.last.bias.zero_().view(-1, 11)
                raw[:, 8:] = math.log(math.expm1(1 - 1e-3))
        layers.append(Permutation(dim, generator=generator))
        layers += [LULinear(dim, dtype=torch.float64)] * (mixing == "lu")
    return torch.nn.ModuleList(layers)


def run(layers: torch.nn.ModuleList, x: torch.Tensor, context: torch.Tensor | None):
    total = torch.zeros(len(x), dtype=x.dtype)
    for layer in layers:
        x, logdet = layer(x, context) if isinstance(layer, SplineCoupling) else layer(x)
        total = total + logdet
    return x, total


def divided(layers: torch.nn.ModuleList) -> torch.nn.ModuleList:
    """Raw widths and heights of every spline divided by 4, the square root of the conditioner's width."""
    layers = copy.deepcopy(layers)
    for layer in layers:
        if isinstance(layer, SplineCoupling):
            for parameter in layer.conditioner.last.parameters():
                parameter.data.view(-1, 11, *parameter.shape[1:])[:, :8] /= 4
    return layers


@pytest.mark.parametrize("mixing", ["lu", "permutation"])
@pytest.mark.parametrize(("dim", "context_dim"), [(5, 0), (4, 2)])
def test_it_is_the_stack_of_its_layers_and_reads_files_of_them(dim, context_dim, mixing):
    sizes = dict(n_flows=2, bins=4, hidden_dim=16, mixing=mixing, dtype=torch.float64)
    flow = NeuralSplineFlow(dim, context_dim, generator=torch.Generator().manual_seed(3), **sizes)
    layers = layers_of(dim, context_dim, 2, mixing, seed=3)
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(50, dim, generator=generator, dtype=torch.float64) + 1
    context = torch.randn(50, context_dim, generator=generator, dtype=torch.float64) if context_dim else None
    torch.testing.assert_close(flow(x, context), run(layers, x, context), rtol=1e-9, atol=1e-9)
    for parameter in layers.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    state = {f"flow.layers.{key}": value for key, value in layers.state_dict().items()}
    holder = torch.nn.ModuleDict({"flow": flow})
    holder.load_state_dict(state)
    torch.testing.assert_close(flow(x, context), run(divided(layers), x, context), rtol=1e-9, atol=1e-9)
    twin = NeuralSplineFlow(dim, context_dim, **sizes)
    twin.load_state_dict(flow.state_dict())
    for found, wanted in zip(twin(x, context), flow(x, context), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match="flow.layers.1.conditioner.last.bias"):
        holder.load_state_dict({k: v for k, v in state.items() if k != "flow.layers.1.conditioner.last.bias"})
    with pytest.raises(RuntimeError, match="Unexpected.*flow.layers.99.loc"):
        holder.load_state_dict(state | {"flow.layers.99.loc": torch.zeros(dim)})


def test_a_file_of_layers_without_flags_keeps_its_start():
    layers = layers_of(4, 0, 2, "lu", seed=0)
    x = 2 * torch.randn(50, 4, dtype=torch.float64) + 1
    run(layers, x, None)
    state = {f"layers.{k}": v for k, v in layers.state_dict().items() if not k.endswith("initialized")}
    flow = NeuralSplineFlow(4, n_flows=2, bins=4, hidden_dim=16, dtype=torch.float64)
    missing, _ = flow.load_state_dict(state, strict=False)
    assert missing == ["layers.0.initialized", "layers.5.initialized"]
    torch.testing.assert_close(flow(x + 5), run(layers, x + 5, None), rtol=1e-9, atol=1e-9)


def test_permutations_may_change():
    """Written in place, replaced, or swapped in for one call."""
    flow, x = make(4), torch.randn(6, 4, dtype=torch.float64)
    first = flow(x)[0]
    turned = flow.permutation.roll(1, -1)
    while turned._version < flow.permutation._version:  # written as often
        turned.add_(0)
    wanted = make(4)
    wanted.load_state_dict(flow.state_dict() | {"permutation": turned})
    wanted = wanted(x)[0]
    assert not torch.equal(first, wanted)
    assert torch.equal(torch.func.functional_call(flow, {"permutation": turned}, (x,))[0], wanted)
    assert torch.equal(flow(x)[0], first)
    kept = flow.permutation.clone()
    flow.permutation.copy_(turned)
    assert torch.equal(flow(x)[0], wanted)
    flow.permutation = kept
    assert torch.equal(flow(x)[0], first)
    with torch.inference_mode():
        flow.permutation = turned.clone()
        assert torch.equal(flow(x)[0], wanted)
        flow.permutation.copy_(kept)
        assert torch.equal(flow(x)[0], first)
    with pytest.raises(ValueError, match="permutation is not a permutation of 0 … 3"):
        flow.load_state_dict(flow.state_dict() | {"permutation": torch.zeros(2, 4, dtype=torch.int64)})


def test_an_ensemble_with_permutations_of_its_own():
    models = [
        NeuralSplineFlow(4, n_flows=2, hidden_dim=8, generator=torch.Generator().manual_seed(s)) for s in range(3)
    ]
    x = torch.randn(50, 4)
    for model in models:
        model.initialize(x)
    state = torch.func.stack_module_state(models)
    assert not torch.equal(models[0].permutation, models[1].permutation)
    found = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(*state)[1]
    torch.testing.assert_close(found, torch.stack([model(x)[1] for model in models]))


def test_dropout_runs_layer_by_layer_while_it_trains():
    flow, plain = make(4, dropout=0.5), make(4)
    x = torch.randn(6, 4, dtype=torch.float64)
    assert not torch.equal(flow(x)[0], flow(x)[0])
    torch.testing.assert_close(flow.eval()(x), plain(x))
    flow.train().dropout = 1e-300  # drops nothing, layer by layer
    torch.testing.assert_close(flow(x), plain(x))
    torch.testing.assert_close(flow.inverse(x), plain.inverse(x))
    torch.testing.assert_close(flow.log_prob(x), plain.log_prob(x))
    wanted = torch.autograd.grad(plain.log_prob(x).sum(), plain.parameters())
    torch.testing.assert_close(torch.autograd.grad(flow.log_prob(x).sum(), flow.parameters()), wanted)


class Count(TorchDispatchMode):
    """Counts calls of ops of this package."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace == "iin_fast"
        return func(*args, **(kwargs or {}))


def test_a_call_is_one_op():
    flow, context = make(3, context_dim=2), torch.randn(4, 2, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    for call in (flow, flow.inverse, flow.log_prob, lambda _, c: flow.sample(5, c)):
        with Count() as counted:
            call(x, context)
        assert counted.calls == 1
    assert str(flow.program()).startswith("flow of 3 features, context 2, 10 layers, 10 tensors")


def test_log_prob_broadcasts():
    flow = make(3, context_dim=2)
    x, context = torch.randn(5, 1, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    found = flow.log_prob(x, context)
    assert found.shape == (5, 4)
    torch.testing.assert_close(found[3], flow.log_prob(x[3].expand(4, 3), context))
    torch.testing.assert_close(flow.log_prob(x[2, 0], context[1]), found[2, 1])
    assert flow.log_prob(x[:0], context).shape == (0, 4) and flow.sample((0,), context).shape == (0, 4, 3)
