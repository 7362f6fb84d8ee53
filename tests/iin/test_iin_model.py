"""IIN: inverse, density, samples, swap and interpolation."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from iin_fast.iin import IIN, Factors

SIZES = {"digit": 3, "color": 2}


@pytest.fixture(params=["affine", "spline"])
def model(make, request) -> IIN:
    return make(coupling=request.param)


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def donor() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("dim", [2, 3, 8, 33])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_decode_inverts_encode(make, dim, dtype, tolerance, coupling):
    model = make(dim, {"a": 1}, dtype, coupling=coupling)
    z = torch.randn(10, dim, dtype=dtype)
    factors = model.encode(z)
    assert factors.sizes == {"a": 1, "residual": dim - 1}
    for given in (factors, dict(factors), dict(reversed(list(factors.items()))), factors.tensor):
        torch.testing.assert_close(model.decode(given), z, rtol=tolerance, atol=tolerance)


def test_forward_is_encode_with_logdet(model, z):
    factors, logdet = model(z)
    assert isinstance(factors, Factors)
    assert factors.sizes == {"digit": 3, "color": 2, "residual": 3}
    assert torch.equal(factors.tensor, model.encode(z).tensor)
    for row, value in zip(z, logdet, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: model.encode(x[None]).tensor[0], row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factors", [None, {}])
def test_unsupervised(make, factors):
    model = make(4, factors)
    assert model.sizes == {"residual": 4}
    assert model.concepts == ()
    assert list(model.encode(torch.randn(2, 4).double())) == ["residual"]


def test_names(make, model):
    assert model.sizes == {"digit": 3, "color": 2, "residual": 3}
    assert model.concepts == ("digit", "color")
    assert "digit" in repr(model)
    assert make(5, SIZES).sizes == SIZES
    assert make(8, {**SIZES, "residual": 3}).sizes == model.sizes


def test_log_prob_is_change_of_variables(model, z):
    normal = torch.distributions.MultivariateNormal(torch.zeros(8).double(), torch.eye(8).double())
    for row, value in zip(z, model.log_prob(z), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: model.encode(x[None]).tensor[0], row)
        expected = normal.log_prob(model.encode(row[None]).tensor[0]) + torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_density_integrates_to_one(make, coupling):
    model = make(2, None, coupling=coupling)
    with torch.no_grad():
        samples = model.sample(4000, generator=torch.Generator().manual_seed(0))
        low, high = samples.amin(0) - 6, samples.amax(0) + 6
        axes = [
            torch.linspace(a, b, 800, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]
        density = model.log_prob(torch.cartesian_prod(*axes)).exp()
        total = density.sum() * (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert abs(total - 1) < 1e-3


def test_samples_follow_log_prob(model):
    """E[log p(z)] over samples is -H = -H(normal) + E[log|det| of T at z]: check through the noise that made them."""
    n = 2000
    samples = model.sample(n, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(n, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert samples.shape == (n, 8) and not samples.requires_grad
    torch.testing.assert_close(model.encode(samples).tensor, noise, rtol=1e-8, atol=1e-8)
    _, logdet = model(samples)
    expected = torch.distributions.Normal(0, 1).log_prob(noise).sum(1) + logdet
    torch.testing.assert_close(model.log_prob(samples), expected, rtol=1e-8, atol=1e-8)
    entropy = 4 * (1 + math.log(2 * math.pi))
    assert abs((model.log_prob(samples) - logdet).mean() + entropy) < 5 * 2 / math.sqrt(n)


def test_sample_seed(model):
    first, second = (model.sample(5, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second)
    torch.manual_seed(4)
    third = model.sample(5)
    torch.manual_seed(4)
    assert torch.equal(model.sample(5), third)


def test_swap(model, z, donor):
    before, given = model.encode(z), model.encode(donor)
    for factor in ("digit", "color", "residual", ["digit", "color"], ("digit", "color", "residual")):
        names = [factor] if isinstance(factor, str) else factor
        after = model.encode(model.swap(z, donor, factor))
        for name in model.sizes:
            torch.testing.assert_close(after[name], (given if name in names else before)[name], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.swap(z, donor, list(model.sizes)), donor, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.swap(z, z, "digit"), z, rtol=1e-8, atol=1e-8)


def test_interpolate(model, z, donor):
    line = model.interpolate(z, donor, 5)
    assert line.shape == (5, 6, 8)
    torch.testing.assert_close(line[0], z, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(line[-1], donor, rtol=1e-8, atol=1e-8)
    middle = (model.encode(z).tensor + model.encode(donor).tensor) / 2
    torch.testing.assert_close(model.encode(line[2]).tensor, middle, rtol=1e-8, atol=1e-8)
    part = model.interpolate(z, donor, 3, "color")
    torch.testing.assert_close(part[0], z, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(part[-1], model.swap(z, donor, "color"), rtol=1e-8, atol=1e-8)


def test_gradients_reach_all_parameters(model, z):
    model.log_prob(z).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_training_lowers_the_negative_log_likelihood():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(256, 4, generator=generator) ** 3
    model = IIN(4, n_flows=4, hidden_dim=32, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = -model.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_deepcopy(model, z):
    other = copy.deepcopy(model)
    expected = model.log_prob(z)
    assert torch.equal(other.log_prob(z), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    assert torch.equal(model.log_prob(z), expected)
    assert not torch.equal(other.log_prob(z), expected)


def test_state_dict_moves_to_another_model(make, model, z):
    other = make(seed=9, coupling=model.coupling)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(z), model.log_prob(z))


def test_generator_makes_the_model():
    a, b, c = (IIN(6, n_flows=2, hidden_dim=8, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), c.state_dict().values(), strict=True))


@pytest.mark.parametrize("batch", [0, 1])
def test_tiny_batches(model, batch):
    z = torch.randn(batch, 8, dtype=torch.float64)
    assert model.log_prob(z).shape == (batch,)
    torch.testing.assert_close(model.swap(z, z, "digit"), z, rtol=1e-8, atol=1e-8)
    assert model.interpolate(z, z, 4).shape == (4, batch, 8)


@pytest.mark.parametrize("call", ["log_prob", "decode", "swap"])
def test_compile(model, z, donor, call):
    def run() -> torch.Tensor:
        if call == "decode":
            return model.decode(Factors.split(z, model.sizes).replace(color=donor[:, :2]))
        if call == "log_prob":
            return model.log_prob(z)
        return model.swap(z, donor, "digit")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), run(), rtol=1e-12, atol=1e-12)


def test_export(model, z):
    factors, logdet = torch.export.export(model, (z,)).module()(z)
    expected, expected_logdet = model(z)
    assert factors.sizes == model.sizes
    torch.testing.assert_close(factors.tensor, expected.tensor)
    torch.testing.assert_close(logdet, expected_logdet)


def test_numpy_sizes_make_a_plain_config():
    model = IIN(np.int64(8), {"a": np.int32(3)}, n_flows=np.int64(1), hidden_dim=8)
    assert json.loads(json.dumps(model.config)) == model.config


def test_meta_device():
    model = IIN(8, SIZES, n_flows=2, hidden_dim=8, device="meta")
    assert model.device.type == "meta"
    assert model.config["factors"] == {**SIZES, "residual": 3}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(dim=0), ValueError, "IIN: dim is 0"),
        (dict(dim=4.0), TypeError, "IIN: dim is 4.0"),
        (dict(dim=8, factors={"a": 9}), ValueError, "sum to 9, expected at most dim = 8"),
        (dict(dim=8, factors={"a": 1, "residual": 3}), ValueError, "sum to 4, expected dim = 8"),
        (dict(dim=8, factors={"a": -1}), ValueError, r"IIN: factors\['a'\] is -1"),
        (dict(dim=8, factors=[3, 5]), TypeError, "IIN: factors is a list"),
        (dict(dim=8, n_flows=0), ValueError, "IIN: n_flows is 0"),
        (dict(dim=8, hidden_dim=2.0), TypeError, "IIN: hidden_dim is 2.0"),
        (dict(dim=8, hidden_depth=-1), ValueError, "IIN: hidden_depth is -1, expected an integer of at least 0"),
        (dict(dim=8, dtype=torch.int64), TypeError, "IIN: dtype is torch.int64"),
        (dict(dim=8, memory="all"), ValueError, "memory is 'all'"),
        (dict(dim=8, coupling="cubic"), ValueError, "IIN: coupling is 'cubic', expected one of 'affine', 'spline'"),
        (dict(dim=8, coupling="spline", bins=0), ValueError, "IIN: bins is 0"),
        (
            dict(dim=8, coupling="spline", tail_bound=0.0),
            ValueError,
            "IIN: tail_bound is 0.0, expected a finite number above 0",
        ),
        (dict(dim=8, coupling="spline", memory="invert"), ValueError, "expected 'auto' with coupling 'spline'"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        IIN(**arguments)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (torch.zeros(8).double(), ValueError, r"z has shape \[8\], expected \[batch, 8\]"),
        (torch.zeros(2, 8, 1, 1).double(), ValueError, r"z has shape \[2, 8, 1, 1\], expected \[batch, 8\]"),
        (torch.zeros(2, 7).double(), ValueError, r"z has shape \[2, 7\], expected \[2, 8\]"),
        (torch.zeros(2, 8, dtype=torch.int64), TypeError, "z has dtype int64"),
        (torch.zeros(2, 8, dtype=torch.complex128), TypeError, "z has dtype complex128"),
        (torch.zeros(2, 8, device="meta").double(), ValueError, "z is on meta, expected cpu"),
        (torch.zeros(2, 8), TypeError, "z has dtype float32, expected float64 like the model"),
        ([[0.0] * 8], TypeError, "z is a list"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "encode", "log_prob", "swap"])
def test_bad_latents(model, method, bad, error, message):
    arguments = (bad, "digit") if method == "swap" else ()
    with pytest.raises(error, match=message):
        getattr(model, method)(bad, *arguments)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, z: m.swap(z, z[:3], "digit"), ValueError, r"donor has shape \[3, 8\], expected \[6, 8\] like z"),
        (
            lambda m, z: m.swap(z, z.float(), "digit"),
            TypeError,
            "donor has dtype float32, expected float64 like the model",
        ),
        (lambda m, z: m.swap(z, z.to("meta"), "digit"), ValueError, "donor is on meta, expected cpu"),
        (lambda m, z: m.swap(z, z, "shape"), ValueError, "factor names 'shape', expected one of"),
        (lambda m, z: m.swap(z, z, ["digit", "digit"]), ValueError, "factor names one twice"),
        (lambda m, z: m.swap(z, z, []), ValueError, "factor is empty"),
        (lambda m, z: m.swap(z, z, 3), TypeError, "factor is 3, expected"),
        (lambda m, z: m.interpolate(z, z, 1), ValueError, "steps is 1, expected at least 2"),
        (lambda m, z: m.interpolate(z, z, 2.5), TypeError, "steps is 2.5"),
        (lambda m, z: m.interpolate(z, z[:2], 3), ValueError, r"z_b has shape \[2, 8\]"),
        (lambda m, z: m.interpolate(z, z, 3, "shape"), ValueError, "factor names 'shape'"),
        (lambda m, z: m.sample(0), ValueError, "n is 0"),
        (lambda m, z: m.sample(2.0), TypeError, "n is 2.0"),
        (lambda m, z: m.sample(2, generator=3), TypeError, "generator is a int"),
        (lambda m, z: m.decode(z[:, :5]), ValueError, r"factors has shape \[6, 5\], expected \[6, 8\]"),
        (
            lambda m, z: m.decode({"digit": z[:, :3]}),
            ValueError,
            r"names \['digit'\], expected \['digit', 'color', 'resid",
        ),
        (lambda m, z: m.decode({**m.encode(z), "x": z}), ValueError, "factors has the names"),
        (lambda m, z: m.decode({**m.encode(z), "color": z}), ValueError, "factors has sizes"),
        (lambda m, z: m.decode(Factors.split(z, {"a": 8})), ValueError, r"factors has the names \['a'\]"),
        (lambda m, z: m.decode(3), TypeError, "factors is a int"),
        (lambda m, z: m.decode(z.to("meta")), ValueError, "factors is on meta"),
    ],
)
def test_bad_calls(model, z, call, error, message):
    with pytest.raises(error, match=message):
        call(model, z)
