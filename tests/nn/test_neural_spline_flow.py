"""NeuralSplineFlow: density, samples, context, start."""

import pytest
import torch

from iin_fast.nn import LULinear, NeuralSplineFlow, ResidualNet, SplineCoupling


def make(dim: int = 3, dtype: torch.dtype = torch.float64, **options) -> NeuralSplineFlow:
    generator = torch.Generator().manual_seed(0)
    options = {"n_flows": 2, "bins": 5, "hidden_dim": 16, **options}
    flow = NeuralSplineFlow(dim, generator=generator, dtype=dtype, **options)
    context = torch.randn(200, flow.context, generator=generator, dtype=dtype) if flow.context else None
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
    for layer in flow.layers[3::4]:
        order = order[layer.permutation]
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
    flow = make(3, context=2)
    x, context = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    normal = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    for row, c, value in zip(x, context, flow.log_prob(x, context), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r, c=c: flow(r[None], c[None])[0][0], row)
        expected = normal.log_prob(flow(row[None], c[None])[0][0]) + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_samples_score_like_their_noise():
    flow = make(3, context=2)
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
    (gradient,) = torch.autograd.grad(x.square().sum(), flow.layers[-1].bias)
    torch.manual_seed(0)
    noise = torch.randn(3, 2, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            flow.layers[-1].bias[0] += sign * step
            values.append(flow.inverse(noise)[0].square().sum())
            flow.layers[-1].bias[0] -= sign * step
    torch.testing.assert_close(gradient[0], (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-5)


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
        (dict(dim=3, context=-1), ValueError, "NeuralSplineFlow: context is -1"),
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
    flow = make(3, context=2)
    x = torch.zeros(4, 3).double()
    for context in (None, torch.zeros(4, 3).double(), torch.zeros(3, 2).double()):
        with pytest.raises(ValueError, match="NeuralSplineFlow: context is"):
            flow(x, context)
    with pytest.raises(ValueError, match=r"context is \[4, 2\], expected None"):
        make(3)(x, torch.zeros(4, 2).double())


def test_bad_dtype():
    flow = make(3, context=2, dtype=torch.float32)
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
