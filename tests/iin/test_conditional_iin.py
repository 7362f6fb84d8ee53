"""IIN with a context: a density of its own for every context, through every method, to disk and back."""

import math

import pytest
import torch
import torch.nn.functional as F

from iin_fast.iin import IIN, FactorLoss


def one_hot(labels: list[int]) -> torch.Tensor:
    return F.one_hot(torch.tensor(labels), 3).double()


def make_conditional(dim: int = 8, seed: int = 0) -> IIN:
    generator = torch.Generator().manual_seed(seed)
    model = IIN(
        dim,
        {"digit": 3, "color": 2},
        n_flows=3,
        hidden_dim=16,
        hidden_depth=1,
        context_dim=3,
        generator=generator,
        dtype=torch.float64,
    )
    with torch.no_grad():
        context = one_hot([0, 1, 2] * 20)
        model(3 * torch.randn(60, dim, generator=generator, dtype=torch.float64) + 1, context)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.fixture
def model() -> IIN:
    return make_conditional()


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


C = one_hot([0, 1, 2, 0, 1, 2])
D = one_hot([1, 2, 0, 1, 2, 0])


def test_inverse_and_density(model, z):
    factors, logdet = model(z, C)
    torch.testing.assert_close(model.decode(factors, C), z, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(model.decode(factors, D), z, atol=1e-3)
    for row in range(6):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, row=row: model.encode(x[None], C[row : row + 1]).tensor[0], z[row]
        )
        normal = -0.5 * (factors.tensor[row] ** 2).sum() - 4 * math.log(2 * math.pi)
        expected = normal + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(model.log_prob(z, C)[row], expected, rtol=1e-9, atol=1e-9)


def test_swap_takes_the_factor_under_its_own_context(model, z):
    donor = z.flip(0)
    swapped = model.swap(z, donor, "digit", context=C, donor_context=D)
    found, kept, given = model.encode(swapped, C), model.encode(z, C), model.encode(donor, D)
    torch.testing.assert_close(found["digit"], given["digit"], rtol=1e-7, atol=1e-7)
    for name in ("color", "residual"):
        torch.testing.assert_close(found[name], kept[name], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        model.swap(z, donor, "digit", context=C), model.swap(z, donor, "digit", context=C, donor_context=C)
    )


def test_interpolate(model, z):
    line = model.interpolate(z, z.flip(0), 3, "digit", context=C, context_b=D)
    torch.testing.assert_close(line[0], z, rtol=1e-8, atol=1e-8)
    expected = model.swap(z, z.flip(0), "digit", context=C, donor_context=D)
    torch.testing.assert_close(line[2], expected, rtol=1e-8, atol=1e-8)


def test_samples_differ_by_context_alone(model):
    first, second = (model.sample(6, torch.Generator().manual_seed(0), context=c) for c in (C, D))
    torch.testing.assert_close(model.encode(first, C).tensor, model.encode(second, D).tensor, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(first, second, atol=1e-3)


def test_factor_loss_is_the_two_likelihoods(model, z):
    zb = z.flip(0)
    nothing = torch.zeros(6, 2, dtype=torch.bool)
    loss = FactorLoss(normalized=True)(model, z, zb, nothing, C, D)
    torch.testing.assert_close(loss, -(model.log_prob(z, C) + model.log_prob(zb, D)).mean())


def test_compile(model, z):
    compiled = torch.compile(
        lambda: model.swap(z, z.flip(0), "digit", context=C, donor_context=D), fullgraph=True, backend="aot_eager"
    )
    expected = model.swap(z, z.flip(0), "digit", context=C, donor_context=D)
    torch.testing.assert_close(compiled(), expected, rtol=1e-10, atol=1e-10)


def test_save_and_load(model, z, tmp_path):
    model.save(tmp_path)
    loaded = IIN.load(tmp_path)
    assert loaded.config == model.config and loaded.config["context_dim"] == 3
    assert "context_dim=3" in repr(loaded)
    assert torch.equal(loaded.log_prob(z, C), model.log_prob(z, C))


def test_learns_one_density_per_class():
    """Three Gaussians apart: with the class as context, each is learned, and samples come from the class asked for."""
    random = torch.Generator().manual_seed(0)
    centers = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    model = IIN(2, n_flows=4, hidden_dim=32, hidden_depth=1, context_dim=3, generator=random)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        label = torch.randint(3, (256,), generator=random)
        x = centers[label] + 0.5 * torch.randn(256, 2, generator=random)
        loss = -model.log_prob(x, F.one_hot(label, 3).float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    label = torch.arange(3).repeat_interleave(500)
    context = F.one_hot(label, 3).float()
    samples = model.sample(1500, random, context=context)
    assert (torch.cdist(samples, centers).argmin(1) == label).float().mean() > 0.98
    truth = -2 * (math.log(0.5) + 0.5 * math.log(2 * math.pi) + 0.5)  # minus the entropy of such a Gaussian
    x = centers[label] + 0.5 * torch.randn(1500, 2, generator=random)
    assert abs(model.log_prob(x, context).mean().item() - truth) < 0.15


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, z: m.encode(z), ValueError, r"context is missing, expected \[6, 3\]"),
        (lambda m, z: m.log_prob(z, C[:5]), ValueError, r"context has shape \[5, 3\], expected \[6, 3\]"),
        (lambda m, z: m.log_prob(z, C[:, :2]), ValueError, r"context has shape \[6, 2\], expected \[6, 3\]"),
        (lambda m, z: m.encode(z, C.long()), TypeError, "context has dtype int64"),
        (lambda m, z: m.encode(z, C.float()), TypeError, "context has dtype float32, expected float64 like the model"),
        (lambda m, z: m.encode(z, C.to("meta")), ValueError, "context is on meta"),
        (lambda m, z: m.encode(z, [0, 1]), TypeError, "context is a list"),
        (lambda m, z: m.decode(z), ValueError, "IIN.decode: context is missing"),
        (lambda m, z: m.swap(z, z, "digit"), ValueError, "IIN.swap: context is missing"),
        (lambda m, z: m.swap(z, z, "digit", context=C, donor_context=C[:2]), ValueError, "donor_context has shape"),
        (lambda m, z: m.sample(6), ValueError, "context is missing"),
        (lambda m, z: FactorLoss()(m, z, z, "digit", C), ValueError, "FactorLoss: context_b is missing"),
        (lambda m, z: m.outlier_score(z, z, context=C), ValueError, "expected their log-likelihoods"),
        (lambda m, z: m.axis(z, z), ValueError, "IIN.axis: context is missing"),
        (lambda m, z: IIN(8).encode(z.float(), C.float()), ValueError, "context is given, expected none"),
        (lambda m, z: IIN(8, context_dim=-1), ValueError, "context_dim is -1"),
    ],
)
def test_bad_context(model, z, call, error, message):
    with pytest.raises(error, match=message):
        call(model, z)
