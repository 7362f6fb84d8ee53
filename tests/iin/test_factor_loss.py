"""FactorLoss: the likelihood of correlated Gaussians, by its definition."""

import math

import pytest
import torch

from iin_fast.iin import IIN, FactorLoss, Factors


def latents(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, n, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).unbind()


def mask(n: int = 6) -> torch.Tensor:
    """All combinations of two concepts, none and both included."""
    return torch.tensor([[False, False], [True, False], [False, True], [True, True]]).repeat(2, 1)[:n]


def joint_log_prob(model: IIN, za: torch.Tensor, zb: torch.Tensor, shared: torch.Tensor, rho: float) -> torch.Tensor:
    """log p(za, zb): one Gaussian over both samples' factors, and the Jacobians of both."""
    values = []
    for a, b, row in zip(za, zb, shared, strict=True):
        by_concept = dict(zip(model.concepts, row.tolist(), strict=True))
        m = torch.tensor(
            [float(by_concept.get(name, False)) for name, size in model.sizes.items() for _ in range(size)]
        )
        cross = torch.diag(rho * m.double())
        eye = torch.eye(model.dim, dtype=torch.float64)
        covariance = torch.cat([torch.cat([eye, cross], 1), torch.cat([cross, eye], 1)])
        normal = torch.distributions.MultivariateNormal(torch.zeros(2 * model.dim).double(), covariance)
        value = normal.log_prob(torch.cat([model.encode(x[None]).tensor[0] for x in (a, b)]))
        for x in (a, b):
            jacobian = torch.autograd.functional.jacobian(lambda y: model.encode(y[None]).tensor[0], x)
            value = value + torch.linalg.slogdet(jacobian).logabsdet
        values.append(value)
    return torch.stack(values)


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.975])
@pytest.mark.parametrize("factors", [{"digit": 3, "color": 2}, {"digit": 3, "color": 5}], ids=["residual", "full"])
def test_normalized_is_the_joint_negative_log_likelihood(make, rho, factors):
    model = make(8, factors)
    (za, zb), shared = latents(), mask()
    (fa, logdet_a), (fb, logdet_b) = model(za), model(zb)
    loss = FactorLoss(rho, normalized=True)
    expected = -joint_log_prob(model, za, zb, shared, rho)
    each = loss.from_factors(fa, logdet_a, fb, logdet_b, shared)
    torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss(model, za, zb, shared), expected.mean(), rtol=1e-9, atol=1e-9)


def test_unnormalized_drops_only_constants(make):
    model, rho, shared = make(), 0.9, mask()
    za, zb = (z.requires_grad_() for z in latents())
    dropped = 8 * math.log(2 * math.pi) + 0.5 * (shared.double() @ torch.tensor([3.0, 2.0]).double()) * math.log1p(
        -rho * rho
    )
    plain, full = FactorLoss(rho)(model, za, zb, shared), FactorLoss(rho, normalized=True)(model, za, zb, shared)
    torch.testing.assert_close(full - plain, dropped.mean(), rtol=1e-10, atol=1e-10)
    inputs = [za, zb, *model.parameters()]
    for x, y in zip(torch.autograd.grad(plain, inputs), torch.autograd.grad(full, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_pairs_that_share_nothing_are_two_samples(make):
    model, (za, zb) = make(), latents()
    loss = FactorLoss(normalized=True)(model, za, zb, torch.zeros(6, 2, dtype=torch.bool))
    torch.testing.assert_close(loss, -(model.log_prob(za) + model.log_prob(zb)).mean(), rtol=1e-10, atol=1e-10)


def test_unsupervised_model(make):
    model, (za, zb) = make(8, None), latents()
    loss = FactorLoss(normalized=True)(model, za, zb, torch.zeros(6, 0, dtype=torch.bool))
    torch.testing.assert_close(loss, -(model.log_prob(za) + model.log_prob(zb)).mean(), rtol=1e-10, atol=1e-10)


def test_ways_to_say_what_is_shared(make):
    model, (za, zb), loss = make(), latents(), FactorLoss()
    all_color = torch.tensor([[False, True]]).expand(6, 2)
    assert torch.equal(loss(model, za, zb, "color"), loss(model, za, zb, all_color))
    assert torch.equal(loss(model, za, zb, ["color"] * 6), loss(model, za, zb, all_color))
    names = ["digit", "color", "color", "digit", "digit", "color"]
    mixed = torch.tensor([[name == "digit", name == "color"] for name in names])
    assert torch.equal(loss(model, za, zb, names), loss(model, za, zb, mixed))
    assert not torch.equal(loss(model, za, zb, names), loss(model, za, zb, "color"))


def test_both_samples_start_the_flow_as_one_batch():
    za, zb = torch.randn(2, 32, 8, dtype=torch.float64).unbind()
    zb = 5 * zb + 3
    options = dict(n_flows=1, hidden_dim=8, dtype=torch.float64)
    a, b = (IIN(8, {"x": 3}, generator=torch.Generator().manual_seed(0), **options) for _ in range(2))
    FactorLoss()(a, za, zb, "x")
    b(torch.cat([za, zb]))
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_training_puts_a_concept_into_its_factor():
    """Pairs share the first two features (mixed into all): after training they agree in the factor, not elsewhere."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    model = IIN(6, {"concept": 2}, n_flows=4, hidden_dim=32, generator=generator)
    loss = FactorLoss(0.9)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = torch.randn(2, n, 6, generator=generator).unbind()
        b[:, :2] = a[:, :2]
        return a @ mixing, b @ mixing

    for _ in range(300):
        value = loss(model, *pairs(128), "concept")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    za, zb = pairs(2000)
    with torch.no_grad():
        a, b = model.encode(za), model.encode(zb)

    def correlation(name: str) -> float:
        return torch.stack(
            [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a[name].T, b[name].T, strict=True)]
        ).mean()

    assert correlation("concept") > 0.8
    assert abs(correlation("residual")) < 0.2


def test_compile(make):
    model, (za, zb), loss = make(), latents(), FactorLoss()
    compiled = torch.compile(lambda a, b: loss(model, a, b, "color"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(za, zb), loss(model, za, zb, "color"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rho", [0, 1, -0.5, 1.5, float("nan"), float("inf")])
def test_rho_outside(rho):
    with pytest.raises(ValueError, match="FactorLoss: rho is .*, expected a finite number above 0 and below 1"):
        FactorLoss(rho)


@pytest.mark.parametrize("rho", ["0.5", None, True, torch.tensor(0.5)])
def test_rho_of_another_kind(rho):
    with pytest.raises(TypeError, match="FactorLoss: rho is"):
        FactorLoss(rho)


def test_repr():
    assert repr(FactorLoss()) == "FactorLoss(rho=0.975, normalized=False)"


ZA, ZB = latents()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(model=torch.nn.Linear(8, 8)), TypeError, "model is a Linear, expected an iin_fast.IIN"),
        (dict(za=ZA[0]), ValueError, r"za has shape \[8\], expected \[batch, 8\]"),
        (dict(zb=ZB[:, :7]), ValueError, r"zb has shape \[6, 7\], expected \[6, 8\]"),
        (dict(zb=ZB[:5]), ValueError, r"zb has shape \[5, 8\], expected \[6, 8\] like za"),
        (dict(zb=ZB.float()), TypeError, "zb has dtype float32, expected float64 like the model"),
        (dict(za=ZA.long()), TypeError, "za has dtype int64"),
        (dict(za=ZA + 0j), TypeError, "za has dtype complex128"),
        (dict(zb=ZB.to("meta")), ValueError, "zb is on meta, expected cpu"),
        (dict(za=ZA[:0], zb=ZB[:0]), ValueError, "za has no samples"),
        (dict(shared="shape"), ValueError, r"shared names 'shape', expected one of \['digit', 'color'\]"),
        (dict(shared="residual"), ValueError, "shared names 'residual'"),
        (dict(shared=["digit"] * 5), ValueError, "shared has 5 names, expected 6"),
        (dict(shared=[]), ValueError, "shared has 0 names, expected 6"),
        (dict(shared=3), TypeError, "shared is a int"),
        (dict(shared=torch.zeros(6, 2)), TypeError, "shared is torch.float32, expected torch.bool"),
        (dict(shared=torch.zeros(6, 3, dtype=torch.bool)), ValueError, r"shared has shape \[6, 3\], expected \[6, 2\]"),
        (dict(shared=torch.zeros(6, dtype=torch.bool)), ValueError, r"shared has shape \[6\], expected \[6, 2\]"),
        (dict(shared=torch.zeros(6, 2, dtype=torch.bool, device="meta")), ValueError, "shared is on meta"),
    ],
)
def test_bad_input(make, change, error, message):
    with pytest.raises(error, match=message):
        FactorLoss()(**{"model": make(), "za": ZA, "zb": ZB, "shared": "digit", **change})


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(factors_a=ZA), TypeError, "factors_a is a Tensor, expected iin_fast.Factors"),
        (dict(factors_b=Factors.split(ZB, {"digit": 8})), ValueError, "factors_b has sizes"),
        (
            dict(factors_b=Factors.split(ZB[:3], {"digit": 3, "residual": 5})),
            ValueError,
            r"factors_b has shape \[3, 8\]",
        ),
        (dict(logdet_a=ZA), ValueError, r"logdet_a has shape \[6, 8\], expected \[6\]"),
        (dict(logdet_b=0.0), TypeError, "logdet_b is a float"),
        (dict(logdet_b=torch.zeros(6, dtype=torch.int64)), TypeError, "logdet_b has dtype int64"),
        (dict(logdet_b=torch.zeros(6, device="meta").double()), ValueError, "logdet_b is on meta, expected cpu"),
    ],
)
def test_bad_factors(change, error, message):
    sizes = {"digit": 3, "residual": 5}
    good = dict(
        factors_a=Factors.split(ZA, sizes),
        logdet_a=torch.zeros(6).double(),
        factors_b=Factors.split(ZB, sizes),
        logdet_b=torch.zeros(6).double(),
        shared="digit",
    )
    with pytest.raises(error, match=message):
        FactorLoss().from_factors(**{**good, **change})


def test_from_factors_of_no_pairs():
    factors, logdet = Factors.split(ZA[:0], {"digit": 3, "residual": 5}), ZA[:0, 0]
    for shared in ("digit", [], torch.zeros(0, 1, dtype=torch.bool)):
        assert FactorLoss().from_factors(factors, logdet, factors, logdet, shared).shape == (0,)
