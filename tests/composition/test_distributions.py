"""Flows as torch.distributions: Transform, TransformedDistribution, broadcasting of contexts, passes through the flow."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    ComposeTransform,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

from iin_fast.nn import (
    ActNorm,
    AffineCoupling,
    Flow,
    FlowTransform,
    LULinear,
    NeuralSplineFlow,
    Permutation,
    SplineCoupling,
)

DIM = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(context_dim: int = 0) -> Flow:
    """A started flow, away from the identity."""
    flow = Flow(
        DIM, n_flows=2, hidden_dim=8, hidden_depth=1, context_dim=context_dim, generator=seeded(), dtype=torch.float64
    )
    x = 2 * torch.randn(16, DIM, generator=seeded(1), dtype=torch.float64) + 1
    flow.initialize(x, torch.randn(16, context_dim, generator=seeded(2), dtype=torch.float64) if context_dim else None)
    return flow


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def standard() -> Distribution:
    return Independent(Normal(torch.zeros(DIM, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64)), 1)


def couple() -> AffineCoupling:
    torch.manual_seed(0)
    return AffineCoupling(DIM, nn.Linear(2, 4)).double()


def norm() -> ActNorm:
    module = ActNorm(DIM, dtype=torch.float64)
    module.initialize(2 * normal(16, DIM, seed=1) + 1)
    return module


def spline() -> SplineCoupling:
    torch.manual_seed(0)
    return SplineCoupling(DIM, nn.Linear(2, SplineCoupling.outputs(DIM, bins=4)), bins=4).double()


def linear() -> LULinear:
    torch.manual_seed(0)
    module = LULinear(DIM).double()
    with torch.no_grad():  # it starts as the identity
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def spline_flow(context_dim: int = 0) -> NeuralSplineFlow:
    """Away from the identity, as ``make``."""
    module = NeuralSplineFlow(
        DIM, context_dim, n_flows=2, bins=4, hidden_dim=8, hidden_depth=1, generator=seeded()
    ).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    module(2 * normal(16, DIM, seed=1) + 1, *([normal(16, context_dim, seed=2)] if context_dim else []))
    return module


MODULES = {
    "Flow": make,
    "ActNorm": norm,
    "AffineCoupling": couple,
    "Permutation": lambda: Permutation(DIM, generator=seeded()),
    "SplineCoupling": spline,
    "LULinear": linear,
    "NeuralSplineFlow": spline_flow,
}


class Counting(Flow):
    """Counts its runs."""

    runs: int = 0

    def _transform(self, *args, **kwargs):
        type(self).runs += 1
        return super()._transform(*args, **kwargs)


@pytest.fixture
def counting() -> Flow:
    flow = make()
    flow.__class__ = Counting
    Counting.runs = 0
    return flow


# The transform


@pytest.mark.parametrize("name", MODULES)
def test_transform_is_the_module(name):
    module = MODULES[name]()
    transform = FlowTransform(module)
    x = normal(2, 5, DIM)
    y = transform(x)
    assert transform.bijective and transform.event_dim == 1 and transform.inv.inv is transform
    assert transform.domain.check(x).all() and transform.codomain.check(y).all()
    wanted, logdet = module(x.reshape(10, DIM))
    torch.testing.assert_close(y, wanted.reshape(2, 5, DIM))
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), logdet.reshape(2, 5))
    torch.testing.assert_close(transform.inv(y.clone()), x)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x), -logdet.reshape(2, 5))
    torch.testing.assert_close(transform(x[0, 0]), y[0, 0])
    assert (y - x).abs().max() > 0.1


def test_neural_spline_flow_under_contexts():
    module, context, x = spline_flow(2), normal(5, 2), normal(3, 5, DIM)
    transform = FlowTransform(module, context)
    y = transform(x)
    for i in range(3):
        wanted, logdet = module(x[i], context)
        torch.testing.assert_close(y[i], wanted)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y)[i], logdet)
    torch.testing.assert_close(transform.inv(y.clone()), x)
    torch.testing.assert_close(
        TransformedDistribution(standard(), transform.inv).log_prob(x[0]), module.log_prob(x[0], context)
    )


def test_logdet_is_that_of_the_jacobian():
    transform = make().transform()
    x = normal(DIM)
    jacobian = torch.autograd.functional.jacobian(transform, x)
    logdet = transform.log_abs_det_jacobian(x, transform(x))
    torch.testing.assert_close(logdet, torch.linalg.slogdet(jacobian).logabsdet)


def test_logdet_of_another_pair_is_not_the_last_one(counting):
    transform = counting.transform()
    x, other = normal(5, DIM), normal(5, DIM, seed=9)
    y = transform(x)
    wanted = counting(other)[1]
    torch.testing.assert_close(transform.log_abs_det_jacobian(other, y), wanted)
    torch.testing.assert_close(transform.log_abs_det_jacobian(other, transform(other)), wanted)


def test_nothing_of_an_earlier_step_comes_back(counting):
    """A transform, and a density, that outlive a step of training follow the parameters."""
    density, transform, x = counting.distribution(), counting.transform(), normal(5, DIM)
    before, y = density.log_prob(x), transform(x)
    with torch.no_grad():
        counting.scale *= 2
    assert (density.log_prob(x) - before).abs().min() > 1
    assert not torch.allclose(transform(x), y)
    for _ in range(2):
        density.log_prob(x).sum().backward()


def test_cache_gives_the_input_back(counting):
    transform = counting.transform().with_cache()
    y = normal(5, DIM)
    x = transform.inv(y)
    assert transform(x) is y and Counting.runs == 1
    assert transform.with_cache(1) is transform and transform.with_cache(0)(x) is not y


def test_copies(counting):
    transform = make(2).transform(normal(5, 2)).with_cache()
    x = normal(5, DIM)
    y = transform(x)
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert twin.module is not transform.module
        torch.testing.assert_close(twin(x), y, rtol=0, atol=0)
        torch.testing.assert_close(twin.log_abs_det_jacobian(x, twin(x)), transform.log_abs_det_jacobian(x, y))


def test_composes_with_transforms_of_torch():
    scale = AffineTransform(torch.ones(DIM, dtype=torch.float64), 3.0, event_dim=1)
    both = ComposeTransform([make().transform(), scale])
    x = normal(5, DIM)
    y = both(x)
    wanted = make()(x)
    torch.testing.assert_close(y, 1 + 3 * wanted[0])
    torch.testing.assert_close(both.log_abs_det_jacobian(x, y), wanted[1] + DIM * math.log(3))
    torch.testing.assert_close(both.inv(y), x)


def test_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match="FlowTransform: module is a Linear, expected a torch.nn.Module with inverse"):
        FlowTransform(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"context has shape \[\], expected \[..., context_dim\]"):
        make(2).transform(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"a sample has shape \[5, 3\], expected \[..., 4\]"):
        make().transform()(normal(5, 3))
    with pytest.raises(ValueError, match=r"Flow: context is None, expected \[5, 2\]"):
        make(2).transform()(normal(5, DIM))
    with pytest.raises(ValueError, match=r"base has event shape \[\], expected \[4\]"):
        make().distribution(base=Normal(torch.zeros(DIM), 1.0))
    with pytest.raises(ValueError, match="within the support"):
        make().distribution(validate_args=True).log_prob(torch.full((5, DIM), math.nan, dtype=torch.float64))


# The density


def test_log_prob_is_the_change_of_variables(counting):
    x = normal(7, DIM).requires_grad_()
    density = counting.distribution()
    log_prob = density.log_prob(x)
    assert Counting.runs == 1
    z, logdet = counting(x)
    wanted = logdet - 0.5 * z.square().sum(1) - 0.5 * DIM * math.log(2 * math.pi)
    torch.testing.assert_close(log_prob, wanted)
    wanted_grad = torch.autograd.grad(wanted.sum(), [x, counting.weight_in])
    torch.testing.assert_close(torch.autograd.grad(log_prob.sum(), [x, counting.weight_in]), wanted_grad)
    assert density.batch_shape == () and density.event_shape == (DIM,) and density.has_rsample


def test_density_integrates_to_one():
    flow = Flow(2, n_flows=2, hidden_dim=8, generator=seeded(), dtype=torch.float64)
    flow.initialize(normal(64, 2))
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    with torch.no_grad():
        log_prob = flow.distribution().log_prob(torch.cartesian_prod(axis, axis))
    assert abs(log_prob.exp().sum().item() * (axis[1] - axis[0]).item() ** 2 - 1) < 1e-3


def test_samples_follow_the_flow_and_rsample_its_gradient(counting):
    density = counting.distribution()
    torch.manual_seed(0)
    x = density.rsample((3, 2))
    torch.manual_seed(0)
    z = standard().sample((3, 2))
    torch.testing.assert_close(counting(x.reshape(6, DIM))[0].reshape(3, 2, DIM), z)
    x.sum().backward()
    assert counting.weight_in.grad.abs().sum() > 0
    assert not density.sample((3,)).requires_grad


def test_rsample_and_log_prob_take_one_pass(counting):
    density = counting.distribution()
    x, log_prob = density.rsample_and_log_prob((3, 2))
    assert Counting.runs == 1 and x.shape == (3, 2, DIM) and log_prob.shape == (3, 2)
    torch.testing.assert_close(log_prob, density.log_prob(x.detach()))
    log_prob.sum().backward()
    assert counting.weight_in.grad.abs().sum() > 0


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("make", [make, lambda context_dim: NeuralSplineFlow(DIM, context_dim, 1, hidden_dim=8)])
def test_no_rows_have_no_densities(make, context_dim):
    """As many values as rows, and gradients of 0, not an error."""
    flow = make(context_dim)
    dtype = next(flow.parameters()).dtype
    for rows in ((0,), (2, 0)):
        x = torch.zeros(*rows, DIM, dtype=dtype, requires_grad=True)
        contexts = [torch.zeros(shape, dtype=dtype) for shape in ((*rows, 2), (2,))] if context_dim else [None]
        for context in contexts:
            log_prob = flow.log_prob(x, context)
            assert log_prob.shape == rows and log_prob.dtype == dtype
            assert torch.autograd.grad(log_prob.sum(), x)[0].shape == x.shape
            drawn, score = flow.distribution(context).rsample_and_log_prob(rows if context is None else ())
            assert drawn.shape[:-1] == score.shape
    if context_dim:  # no contexts for one row
        assert flow.log_prob(x.new_zeros(DIM), x.new_zeros(0, 2)).shape == (0,)


def test_inside_a_transformed_distribution_of_torch():
    flow = make()
    scale = AffineTransform(torch.ones(DIM, dtype=torch.float64), 3.0, event_dim=1)
    density = TransformedDistribution(standard(), [flow.transform().inv, scale])
    x = normal(5, DIM)
    wanted = flow.distribution().log_prob((x - 1) / 3) - DIM * math.log(3)
    torch.testing.assert_close(density.log_prob(x), wanted)
    assert density.rsample((2, 3)).shape == (2, 3, DIM)


def test_base_of_the_users_choice():
    flow, x = make(), normal(5, DIM)
    base = MultivariateNormal(torch.ones(DIM, dtype=torch.float64), 2 * torch.eye(DIM, dtype=torch.float64))
    z, logdet = flow(x)
    torch.testing.assert_close(flow.distribution(base=base).log_prob(x), base.log_prob(z) + logdet)


def test_a_context_is_the_batch_shape():
    flow, context, x = make(2), normal(5, 2), normal(5, DIM)
    density = flow.distribution(context)
    assert density.batch_shape == (5,)
    z, logdet = flow(x, context)
    torch.testing.assert_close(density.log_prob(x), standard().log_prob(z) + logdet)
    one = density.log_prob(x[0])  # one sample under every context
    torch.testing.assert_close(one, flow.distribution(context).log_prob(x[:1].expand(5, DIM)))
    many = normal(3, 5, DIM)
    wanted = torch.stack([density.log_prob(rows) for rows in many])
    torch.testing.assert_close(density.log_prob(many), wanted)
    assert density.sample((3, 2)).shape == (3, 2, 5, DIM)
    shared = context[2].expand(5, 2)
    torch.testing.assert_close(
        flow.distribution(context[2]).log_prob(x), standard().log_prob(flow(x, shared)[0]) + flow(x, shared)[1]
    )


def test_expand_and_mixture():
    density = make().distribution()
    assert density.expand((3,)).sample((2,)).shape == (2, 3, DIM)
    mixture = MixtureSameFamily(Categorical(torch.ones(5).double()), make(2).distribution(normal(5, 2)))
    x = normal(7, DIM)
    wanted = make(2).distribution(normal(5, 2)).log_prob(x[:, None]).logsumexp(1) - math.log(5)
    torch.testing.assert_close(mixture.log_prob(x), wanted)
    assert mixture.sample((6,)).shape == (6, DIM)


def test_default_base_follows_the_module():
    base = Flow(DIM, n_flows=1, hidden_dim=4, dtype=torch.float64).distribution().base_dist
    assert base.sample().dtype == torch.float64
    assert FlowTransform(Permutation(DIM)).forward_shape((2, DIM)) == (2, DIM)
