"""The building blocks: each is walked through the same properties."""

import copy

import pytest
import torch
from torch import nn

from iin_fast.nn import ActNorm, AffineCoupling, LULinear, NeuralSplineFlow, Permutation, SplineCoupling


def actnorm() -> ActNorm:
    block = ActNorm(5, dtype=torch.float64)
    block(3 * torch.randn(20, 5, dtype=torch.float64) + 1)
    return block


def coupling(dim: int = 5, **kwargs) -> AffineCoupling:
    size = dim // 2
    outputs = size if kwargs.get("squash") == "none" else 2 * size
    return AffineCoupling(dim, nn.Linear(dim - size, outputs, dtype=torch.float64), **kwargs)


def spline(**kwargs) -> SplineCoupling:
    outputs = SplineCoupling.outputs(5, bins=4, tails=kwargs.get("tails", "linear"))
    return SplineCoupling(5, nn.Linear(3, outputs, dtype=torch.float64), bins=4, tail_bound=1.5, **kwargs)


def lu() -> LULinear:
    block = LULinear(5, dtype=torch.float64)
    with torch.no_grad():
        block.weight.normal_()
        block.bias.normal_()
    return block


def spline_flow(**kwargs) -> NeuralSplineFlow:
    """One that has started ActNorm, and is not the identity."""
    flow = NeuralSplineFlow(5, n_flows=2, bins=4, hidden_dim=8, dtype=torch.float64, **kwargs)
    flow(2 * torch.randn(50, 5, dtype=torch.float64) + 1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow


BLOCKS = {
    "actnorm": actnorm,
    "permutation": lambda: Permutation(5, torch.tensor([1, 2, 0, 4, 3])),
    "tanh": coupling,
    "tanh, clamped": lambda: coupling(clamp=0.5),
    "atan": lambda: coupling(squash="atan"),
    "sigmoid": lambda: coupling(squash="sigmoid"),
    "identity": lambda: coupling(squash="identity"),
    "additive": lambda: coupling(squash="none"),
    "swapped": lambda: coupling(swap=True),
    "spline": spline,
    "spline, swapped": lambda: spline(swap=True),
    "spline, no tails": lambda: spline(tails=None),
    "spline, zuko": lambda: spline(parameterization="zuko"),
    "lu": lu,
    "spline flow": spline_flow,
    "spline flow, permuted": lambda: spline_flow(mixing="permutation"),
}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS.keys())
def block(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_inverse_undoes_forward(block, x):
    y, logdet = block(x)
    x_again, inverse_logdet = block.inverse(y)
    assert not torch.equal(y, x)
    torch.testing.assert_close(x_again, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-12, atol=1e-12)


def test_logdet_is_that_of_the_jacobian(block, x):
    _, logdet = block(x)
    assert logdet.shape == (7,)
    for i, row in enumerate(x):
        jacobian = torch.autograd.functional.jacobian(lambda row: block(row[None])[0][0], row)
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-10)


def test_gradients_reach_input_and_parameters(block, x):
    y, logdet = block(x.requires_grad_())
    (y.square().sum() + logdet.sum()).backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_state_dict_round_trip(block, x):
    other = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(block.state_dict(), strict=True)
    torch.testing.assert_close(other(x), block(x))


def test_empty_batch(block):
    y, logdet = block(torch.zeros(0, 5, dtype=torch.float64))
    assert y.shape == (0, 5) and logdet.shape == (0,)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.zeros(5), ValueError),
        (torch.zeros(2, 4), ValueError),
        (torch.zeros(2, 5, dtype=torch.int64), TypeError),
        (torch.zeros(2, 5, dtype=torch.complex64), TypeError),
    ],
)
def test_bad_input(block, direction, bad, error):
    with pytest.raises(error, match=type(block).__name__ + ": [xz] has"):
        getattr(block, direction)(bad)


def test_actnorm_starts_from_its_first_batch():
    norm = ActNorm(4)
    x = 3 * torch.randn(50, 4) + 2
    y, _ = norm(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std(0), torch.ones(4), rtol=0, atol=1e-5)
    assert norm.initialized.item() == 1
    loc = norm.loc.clone()
    norm(x + 7)
    other = ActNorm(4)
    other.load_state_dict(norm.state_dict())
    other(x + 7)
    assert torch.equal(norm.loc, loc) and torch.equal(other.loc, loc)


def test_actnorm_starts_from_one_row_but_not_from_none():
    norm = ActNorm(4)
    norm(torch.zeros(0, 4))
    assert norm.initialized.item() == 0
    y, logdet = norm(torch.full((1, 4), 3.0))
    assert torch.equal(y, torch.zeros(1, 4)) and torch.equal(logdet, torch.zeros(1))


def test_coupling_reads_context():
    block = AffineCoupling(4, nn.Linear(2 + 3, 4))
    x, context = torch.randn(6, 4), torch.randn(6, 3)
    y, _ = block(x, context)
    assert not torch.allclose(block(x, context + 1)[0], y)
    torch.testing.assert_close(block.inverse(y, context)[0], x, rtol=1e-5, atol=1e-5)


def test_coupling_keeps_the_conditioning_half(x):
    torch.manual_seed(0)
    assert torch.equal(coupling()(x)[0][:, :3], x[:, :3])
    assert torch.equal(coupling(swap=True)(x)[0][:, 2:], x[:, 2:])


def test_coupling_refuses_a_conditioner_of_another_size():
    with pytest.raises(ValueError, match=r"conditioner returned shape \[2, 5\], expected \[2, 4\]"):
        AffineCoupling(5, nn.Linear(3, 5))(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="dim is 1, expected an integer of at least 2"):
        AffineCoupling(1, nn.Identity())


def test_permutation_is_drawn_or_given():
    drawn = Permutation(20, generator=torch.Generator().manual_seed(3))
    again = Permutation(20, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn.permutation, again.permutation)
    assert sorted(drawn.permutation.tolist()) == list(range(20))
    with pytest.raises(ValueError, match=r"permutation is \[0, 0, 1\], expected each of 0 … 2 exactly once"):
        Permutation(3, torch.tensor([0, 0, 1]))
