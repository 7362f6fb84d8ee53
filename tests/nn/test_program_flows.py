"""RealNVP and MaskedAutoregressiveFlow: what they share with every flow of one program, and what is their own."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import iin_fast
from iin_fast.nn import MaskedAutoregressiveFlow, NeuralSplineFlow, RealNVP
from iin_fast.nn.mlp_flow import ACTIVATIONS
from iin_fast.nn.program_flow import ProgramFlow
from iin_fast.ops.flow_program.reference import flow_program as definition

Make = Callable[..., ProgramFlow]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def maker(kind: type, **options) -> Make:
    options = dict(n_flows=3, hidden_dim=9) | options
    return lambda dim=5, context_dim=0, **more: kind(
        dim, context_dim, **(options | dict(generator=seeded(), dtype=torch.float64) | more)
    )


MAF = MaskedAutoregressiveFlow
FLOWS: dict[str, Make] = {
    "nvp": maker(RealNVP),
    "nvp, deep": maker(RealNVP, hidden_depth=3, activation="silu"),
    "nvp, shallow": maker(RealNVP, hidden_depth=0, actnorm=False),
    "nvp, additive": maker(RealNVP, squash="none"),
    "nvp, atan": maker(RealNVP, squash="atan", clamp=3.0),
    "maf": maker(MAF),
    "maf, random": maker(MAF, order="random", activation="tanh"),
    "maf, shallow": maker(MAF, hidden_depth=0, actnorm=False),
    "maf, spline": maker(MAF, transformer="spline", bins=4, hidden_depth=1),
    "maf, narrow": maker(MAF, hidden_dim=2),
    "nsf": maker(NeuralSplineFlow, bins=4),
}
every = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
mafs = pytest.mark.parametrize(
    "make", [m for n, m in FLOWS.items() if "maf" in n], ids=[n for n in FLOWS if "maf" in n]
)
nvps = pytest.mark.parametrize(
    "make", [m for n, m in FLOWS.items() if "nvp" in n], ids=[n for n in FLOWS if "nvp" in n]
)


def data(dim: int, context_dim: int = 0, n: int = 40) -> tuple[Tensor, ...]:
    return (2 * normal(1, n, dim) + 1, *([normal(2, n, context_dim)] if context_dim else []))


def used(make: Make, dim: int = 5, context_dim: int = 0, **options) -> ProgramFlow:
    """After its start, and away from the identity."""
    flow = make(dim, context_dim, **options)
    flow(*data(dim, context_dim))
    with torch.no_grad():
        for i, parameter in enumerate(flow.parameters()):
            parameter += 0.2 * normal(10 + i, *parameter.shape).to(parameter)
    return flow


sizes = pytest.mark.parametrize(("dim", "context_dim"), [(2, 0), (3, 2), (4, 1), (5, 0)])


@every
@sizes
def test_inverse_and_logdet(make, dim, context_dim):
    flow, (x, *context) = used(make, dim, context_dim), data(dim, context_dim, 6)
    z, logdet = flow(x, *context)
    back, inverse_logdet = flow.inverse(z, *context)
    assert z.shape == x.shape and logdet.shape == (6,) and (z != x).all()
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-9, atol=1e-9)
    for i in range(6):
        rest = [c[i : i + 1] for c in context]
        jacobian = torch.autograd.functional.jacobian(lambda r, rest=rest: flow(r[None], *rest)[0][0], x[i])
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)
    density = -0.5 * z.square().sum(1) - dim / 2 * math.log(2 * math.pi) + logdet
    torch.testing.assert_close(flow.log_prob(x, *context), density, rtol=1e-10, atol=1e-10)


@every
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(make, inverse):
    """Of x, context and all parameters, against the definition, and by differences."""
    flow, (x, context) = used(make, 3, 2), data(3, 2, 4)
    parameters = list(flow.parameters())
    x, context = 0.7 * x.requires_grad_(), context.requires_grad_()

    def score(results: tuple[Tensor, Tensor]) -> Tensor:
        return sum((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in results)

    run = flow.inverse if inverse else flow
    found = torch.autograd.grad(score(run(x, context)), [x, context, *parameters])
    wanted = definition(x, context, flow._tensors(), flow.program(), inverse)
    wanted = torch.autograd.grad(score(wanted), [x, context, *parameters])
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    assert all((g != 0).any() for g in found)
    assert torch.autograd.gradcheck(
        lambda x, c: run(x, c), (x.detach().requires_grad_(), context.detach().requires_grad_())
    )


@every
def test_backends_agree(make):
    found = iin_fast.testing.compare_backends(used(make, 5, 2), *data(5, 2, 7))
    assert found.rows and found.ok, found


@every
def test_seeds_and_resets(make):
    flow, (x, *_) = make(), data(5)
    torch.testing.assert_close(list(flow.state_dict().values()), list(make().state_dict().values()), rtol=0, atol=0)
    other = make(generator=seeded(1))
    assert not torch.equal(flow.weight_in, other.weight_in)
    flow(x)
    flow.reset_parameters(seeded())
    torch.testing.assert_close(list(flow.state_dict().values()), list(make().state_dict().values()), rtol=0, atol=0)
    for copied in (copy.deepcopy(flow), make(generator=seeded(2))):
        copied.load_state_dict(flow.state_dict())
        torch.testing.assert_close(copied(x), flow(x), rtol=0, atol=0)


@every
@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_new_flow_standardises(make, context_dim):
    """After its start a new flow is ActNorm, and a permutation in some."""
    flow, given = make(4, context_dim), data(4, context_dim)
    x = given[0]
    if flow._started:
        flow.initialize(*given)
    z, logdet = flow(*given)
    standard = (x - x.mean(0)) / (x.std(0) + 1e-6) if flow._started else x
    wanted = -(x.std(0) + 1e-6).log().sum() if flow._started else torch.zeros(())
    orders = itertools.permutations(range(4))
    assert any(torch.allclose(z, standard[:, list(order)], rtol=1e-4, atol=1e-4) for order in orders)
    torch.testing.assert_close(logdet, wanted.to(logdet).expand(40), rtol=1e-4, atol=1e-4)


@every
def test_every_actnorm_starts_from_what_it_sees(make):
    flow, (x,) = make(), data(5)
    with torch.no_grad():
        flow.weight_out += 0.3 * normal(3, *flow.weight_out.shape)
    if not flow._started:
        pytest.skip("no ActNorm")
    flow.log_prob(x)
    assert flow.initialized.all() and all(flow._started)
    seen = x
    for part in range(len(flow._parts)):
        if part:
            seen = definition(seen, None, flow._tensors(), flow._parts[part - 1])[0].detach()
        out = flow.scale[part] * (seen + flow.loc[part])
        torch.testing.assert_close(out.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(out.std(0), torch.ones(5).double(), rtol=1e-5, atol=0)
    before = flow.scale.clone()
    flow(x + 3)
    assert torch.equal(flow.scale, before)


@every
def test_samples_have_the_density(make):
    flow, (_, context) = used(make, 2, 1), data(2, 1, 3)
    torch.manual_seed(0)
    x = flow.rsample(4, context)
    torch.manual_seed(0)
    noise = torch.randn(4, 3, 2, dtype=torch.float64)
    assert x.shape == (4, 3, 2) and x.requires_grad and not flow.sample((4,), context).requires_grad
    again, log_prob = flow.distribution(context).log_prob(x), flow.log_prob(x, context)
    torch.testing.assert_close(log_prob, again)
    latent = flow(x.reshape(-1, 2), context.repeat(4, 1))[0]
    torch.testing.assert_close(latent, noise.reshape(-1, 2), rtol=1e-7, atol=1e-7)


@every
def test_density_integrates_to_one(make):
    flow = used(make, 2)
    with torch.no_grad():
        samples = flow.sample(2000)
        low, high = samples.amin(0) - 4, samples.amax(0) + 4
        axes = [torch.linspace(a, b, 500, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
        total = flow.log_prob(torch.cartesian_prod(*axes)).exp().sum()
        total = total * (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert abs(total - 1) < 5e-3


def jacobian_of(flow: ProgramFlow, dim: int, *context: Tensor) -> Tensor:
    """What can depend on what: summed over some rows, ``[out, in]``."""
    x = normal(5, 6, dim)
    parts = [torch.autograd.functional.jacobian(lambda r: flow(r[None], *context)[0][0], row) for row in x]
    return torch.stack(parts).abs().sum(0)


@mafs
@pytest.mark.parametrize("dim", [2, 5, 8])
def test_one_layer_is_autoregressive(make, dim):
    """It reads what comes before, all of it where the net is wide enough, and nothing else."""
    flow = used(make, dim, n_flows=1, activation="tanh")
    depends = jacobian_of(flow, dim) != 0
    assert not depends.triu(1).any() and depends.diagonal().all()
    if flow.hidden_dim >= dim:
        assert torch.equal(depends, torch.ones(dim, dim, dtype=torch.bool).tril())


@mafs
@pytest.mark.parametrize("hidden_dim", [9, 2])
def test_every_feature_reads_the_context(make, hidden_dim):
    flow, x = used(make, 4, 2, n_flows=1, hidden_dim=hidden_dim, activation="tanh"), normal(5, 1, 4)
    jacobian = torch.autograd.functional.jacobian(lambda c: flow(x, c)[0][0], normal(6, 1, 2))[:, 0]
    assert (jacobian != 0).any(1).all()


@mafs
@pytest.mark.parametrize("context_dim", [0, 2])
def test_one_feature(make, context_dim):
    flow, given = used(make, 1, context_dim), data(1, context_dim, 6)
    z, logdet = flow(*given)
    torch.testing.assert_close(flow.inverse(z, *given[1:])[0], given[0])
    for i, row in enumerate(given[0]):
        rest = [c[i : i + 1] for c in given[1:]]
        slope = torch.autograd.functional.jacobian(lambda r, rest=rest: flow(r[None], *rest)[0], row)
        torch.testing.assert_close(logdet[i], slope.abs().log().squeeze())
    if context_dim:
        assert (torch.autograd.grad(flow.log_prob(*given[:1], given[1].requires_grad_()).sum(), given[1])[0] != 0).all()


@nvps
@pytest.mark.parametrize("dim", [2, 3, 5, 6])
def test_every_feature_is_transformed_and_conditions(make, dim):
    """In three couplings of an odd number of features, in two of an even one, and each by half of them."""
    flow = make(dim, n_flows=2 + dim % 2)
    couplings = [layer for layer in flow.program().layers if hasattr(layer, "transformed")]
    assert {j for c in couplings for j in c.transformed} == set(range(dim))
    assert {j for c in couplings for j in c.conditioning} == set(range(dim))
    assert all(len(c.transformed) == dim // 2 and len(c.conditioning) == dim - dim // 2 for c in couplings)
    if dim % 2 == 0:
        assert [c.transformed[0] for c in couplings] == [dim // 2, 0]


@pytest.mark.parametrize("kind", [RealNVP, MAF])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kind, activation):
    """The first layer is what torch's activation makes of it."""
    flow = kind(3, n_flows=1, hidden_dim=6, hidden_depth=0, activation=activation, actnorm=False, dtype=torch.float64)
    with torch.no_grad():
        flow.bias_out.copy_(normal(1, *flow.bias_out.shape))
        flow.weight_out.copy_(normal(2, *flow.weight_out.shape))
    x = normal(3, 7, 3)
    weight_in, weight_out = flow.weight_in[0], flow.weight_out[0]
    if kind is MAF:
        weight_in, weight_out = weight_in * flow.mask_in, weight_out * flow.mask_out
    read = x[:, :2] if kind is RealNVP else x
    hidden = getattr(torch.nn.functional, activation)(read @ weight_in.T + flow.bias_in[0])
    raw, shift = (hidden @ weight_out.T + flow.bias_out[0]).chunk(2, 1)
    if kind is RealNVP:
        wanted = torch.cat([x[:, :2], x[:, 2:] * raw.tanh().exp() + shift], 1)
    else:
        wanted = x * (raw / (1 + raw.abs() / math.log(1000))).exp() + shift
    torch.testing.assert_close(flow(x)[0], wanted)


@pytest.mark.parametrize("kind", [RealNVP, MAF])
def test_training_finds_a_dependence(kind):
    """Of two correlated normals, whose density is known, within 0.05 nats."""
    x = torch.randn(4096, 2, generator=seeded())
    x[:, 1] = 0.9 * x[:, 0] + 0.19**0.5 * x[:, 1]
    flow = kind(2, n_flows=4, hidden_dim=16, generator=seeded())
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for step in range(150):
        loss = -flow.log_prob(x[512 * (step % 8) : 512 * (step % 8 + 1)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    truth = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    with torch.no_grad():
        assert (truth.log_prob(x) - flow.log_prob(x)).mean() < 0.05


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (RealNVP, dict(dim=1), ValueError, "RealNVP: dim is 1, expected an integer of at least 2"),
        (RealNVP, dict(dim=3, squash="exp"), ValueError, "RealNVP: squash is 'exp', expected one of"),
        (RealNVP, dict(dim=3, squash="identity", clamp=1.0), ValueError, "RealNVP: clamp is 1.0, expected None"),
        (RealNVP, dict(dim=3, activation="none"), ValueError, "RealNVP: activation is 'none', expected one of 'relu'"),
        (MAF, dict(dim=0), ValueError, "MaskedAutoregressiveFlow: dim is 0, expected a positive integer"),
        (
            MAF,
            dict(dim=3, transformer="cubic"),
            ValueError,
            "transformer is 'cubic', expected one of 'affine', 'spline'",
        ),
        (MAF, dict(dim=3, order=[2, 1, 0]), ValueError, r"order is \[2, 1, 0\], expected one of 'reversed', 'random'"),
        (
            MAF,
            dict(dim=3, clamp=0),
            ValueError,
            "MaskedAutoregressiveFlow: clamp is 0, expected a finite number above 0",
        ),
        (MAF, dict(dim=3, hidden_depth=-1), ValueError, "MaskedAutoregressiveFlow: hidden_depth is -1"),
        (MAF, dict(dim=3, actnorm=1), TypeError, "MaskedAutoregressiveFlow: actnorm is 1, expected True or False"),
    ],
)
def test_bad_construction(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)


@every
def test_bad_calls(make):
    flow, plain, name = used(make, 3, 2), used(make, 3), type(make()).__name__
    x, context = data(3, 2, 4)
    for call in (flow, flow.inverse, flow.log_prob):
        with pytest.raises(ValueError, match=rf"{name}: context is None, expected \[4, 2\]"):
            call(x)
        with pytest.raises(TypeError, match=f"{name}: . has dtype float32, expected float64 like the parameters"):
            call(x.float(), context)
        with pytest.raises(TypeError, match=f"{name}: context has dtype float32, expected float64"):
            call(x, context.float())
        with pytest.raises(ValueError, match=rf"{name}: . has shape \[4, 2\], expected \[batch, 3\]"):
            call(x[:, :2], context)
    with pytest.raises(ValueError, match=rf"{name}: context is \[4, 3\], expected \[4, 2\]"):
        flow(x, torch.zeros(4, 3).double())
    with pytest.raises(ValueError, match=rf"{name}: context is \[4, 2\], expected None"):
        plain(x, context)
    with pytest.raises(ValueError, match=rf"{name}: x has shape \[\], expected \[..., features\]"):
        flow.log_prob(torch.tensor(1.0).double(), context)
    with pytest.raises(ValueError, match=rf"{name}: context has shape \[\], expected \[..., features\]"):
        flow.sample(3, torch.tensor(1.0).double())
    with pytest.raises(TypeError, match=rf"{name}.sample: sample_shape is tensor\(3\), expected a list of integers"):
        flow.sample(torch.tensor(3), context)
    for call in (flow, flow.log_prob):
        with pytest.raises(TypeError, match=f"{name}: x is a ndarray, expected a torch.Tensor"):
            call(x.numpy(), context)
    with pytest.raises(TypeError, match=f"{name}: context is a list"):
        flow.log_prob(x, [1.0, 2.0])
    with pytest.raises(
        ValueError, match=rf"{name}: context has shape \[3, 2\], expected one that broadcasts against x"
    ):
        flow.log_prob(x, context[:3])
    assert flow(x[:0], context[:0])[1].shape == (0,) and plain.sample(0).shape == (0, 3)


@pytest.mark.parametrize(
    "make", [lambda: NeuralSplineFlow(6, n_flows=2, hidden_dim=8), lambda: MAF(6, hidden_dim=8, order="random")]
)
def test_permutations_may_be_copied_through_data(make: Callable[[], nn.Module]) -> None:
    """As averages of weights do; no counter tells of it."""
    one, other, x = make(), make(), torch.randn(20, 6)
    one(x), other(x)
    for mine, its in zip([*one.parameters(), *one.buffers()], [*other.parameters(), *other.buffers()], strict=True):
        mine.data.copy_(its.data)
    assert torch.equal(one(x)[0], other(x)[0])
