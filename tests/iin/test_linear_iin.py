"""The linear IIN: exact where concepts add up, both ways on degenerate features, blind to the scale of a feature."""

import itertools

import numpy as np
import pytest
import torch

from iin_fast import IIN, FactorLoss, LinearIIN, PairSampler, concept_pairs
from iin_fast.iin.linear import white_inputs

NAMES = ("digit", "color", "size")
CLASSES = (4, 3, 2)
SIZES = {"digit": 3, "color": 2, "size": 1}


def additive(labels, dim=12, noise=0.0, seed=0):
    """Latents [n, dim] of classes [n, 3] that add up, and the mean of each class: [classes, dim] each."""
    random = np.random.default_rng([seed, 5])
    means = [random.standard_normal((classes, dim)) for classes in CLASSES]
    z = sum(mean[labels[:, k]] for k, mean in enumerate(means)) + 3.0
    return torch.from_numpy(z + noise * random.standard_normal(z.shape)), means


def drawn_labels(n, seed=0):
    random = np.random.default_rng([seed, 6])
    return np.stack([random.integers(classes, size=n) for classes in CLASSES], 1)


def test_swaps_of_a_linear_mixture_are_exact():
    """Every combination of classes ten times, and all pairs of two samples."""
    labels = np.tile(list(itertools.product(*map(range, CLASSES))), (10, 1))
    a, b = (torch.from_numpy(rows) for rows in np.nonzero(~np.eye(len(labels), dtype=bool)))
    z, means = additive(labels, noise=1e-6)
    model = LinearIIN.fit_pairs(z[a], z[b], torch.from_numpy(labels[a] == labels[b]), NAMES)
    assert model.sizes == {**SIZES, "residual": 6}  # classes less one
    for k, name in enumerate(NAMES):
        swapped = model.swap(z[a], z[b], name)
        expected = z[a] + torch.from_numpy(means[k][labels[b, k]] - means[k][labels[a, k]])
        assert torch.allclose(swapped, expected, atol=1e-4), name
        factor = model.encode(z)[name]
        for label in range(CLASSES[k]):  # the factor holds its concept, and nothing else
            assert factor[labels[:, k] == label].std(0).max() < 1e-4


@pytest.mark.parametrize("others", ["any", "differ", "agree"])
def test_swaps_with_noise_and_drawn_pairs_are_near_the_truth(others):
    labels = drawn_labels(2000)
    z, means = additive(labels, noise=0.3)
    model = LinearIIN.fit(z, PairSampler(labels, names=NAMES, others=others), SIZES)
    donors = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    for k, name in enumerate(NAMES):
        change = torch.from_numpy(means[k][labels[donors, k]] - means[k][labels[:, k]])
        off = model.swap(z, z[donors], name) - z - change
        assert off.square().mean().sqrt() < 0.3, others  # less than the noise of z itself
        assert off.square().mean() < 0.25 * change.square().mean()


def test_sizes_are_estimated_given_or_given_in_part():
    labels = drawn_labels(1500)
    z, _ = additive(labels, noise=0.1)
    sampler = PairSampler(labels, names=NAMES, others="any")
    assert LinearIIN.fit(z, sampler).sizes == {**SIZES, "residual": 6}
    assert LinearIIN.fit(z, sampler, {"color": 4}).sizes == {"digit": 3, "color": 4, "size": 1, "residual": 4}
    assert LinearIIN.fit(z, sampler, {"color": 4, "residual": 8}).sizes == {"color": 4, "residual": 8}
    full = {"digit": 6, "color": 3, "size": 3}
    assert LinearIIN.fit(z, sampler, full).sizes == full
    assert sampler.step == 0


def test_concepts_without_effect_get_one_dimension():
    labels = drawn_labels(1500)
    z, _ = additive(labels, noise=0.1)
    labels[:, 1] = np.random.default_rng(9).integers(3, size=1500)
    sizes = LinearIIN.fit(z, PairSampler(labels, names=NAMES, others="any")).sizes
    assert sizes["digit"] == 3 and sizes["color"] <= 2 and sizes["size"] == 1


def test_factors_are_white_and_only_pairs_that_share_them_correlate():
    labels = drawn_labels(4000)
    z, _ = additive(labels, noise=0.2)
    sampler = PairSampler(labels, names=NAMES, others="any")
    model = LinearIIN.fit(z, sampler)
    factors = model.encode(z)
    assert torch.allclose(torch.cov(factors.tensor.T), torch.eye(12, dtype=torch.float64), atol=0.05)
    pairs = sampler.sample(20_000, step=7)
    for k, name in enumerate(NAMES):
        alone = pairs.shared[:, k] & (pairs.shared.sum(1) == 1)
        for other in model.sizes:
            found = (factors[other][pairs.a] * factors[other][pairs.b])[alone].mean().item()
            assert found > 0.8 if other == name else found < 0.05, (name, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_features_come_back(dtype):
    labels = drawn_labels(400)
    good = additive(labels, dim=10, noise=0.1)[0]
    constant = torch.full((400, 1), 0.1, dtype=torch.float64)
    rounding = constant + 1e-9 * torch.randn(400, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns = [good[:, :4], constant, 1e6 * good[:, 4:7], good[:, :1], 1e-6 * good[:, 7:], rounding, 0 * constant]
    z = torch.cat([*columns, good[:, :2] @ torch.ones(2, 1, dtype=torch.float64)], 1).to(dtype)
    model = LinearIIN.fit(z, PairSampler(labels, names=NAMES, others="any"))
    assert model.dtype == dtype and model.sizes == {**SIZES, "residual": 9}
    back = model.decode(model.encode(z))
    spread = z.std(0).clamp(min=1e-30)
    assert ((back - z).abs() / torch.maximum(spread, z.abs().mean(0))).max() < 200 * torch.finfo(dtype).eps
    donors = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        swapped = model.swap(z, z[donors], name)
        assert torch.equal(swapped[:, [4, 13]], z[:, [4, 13]])  # constant, 0
        assert torch.equal(swapped[:, 8], swapped[:, 0])  # a copy stays a copy
        assert (swapped[:, 14] - swapped[:, 0] - swapped[:, 1]).abs().max() < 1e-3  # and a sum a sum
        assert (swapped[:, 0] - z[:, 0]).abs().max() > 0.1
    # A constant feature with another value, as a new latent may have it, is no loss either.
    z[:, 4] += 1.0
    assert (model.decode(model.encode(z))[:, 4] - z[:, 4]).abs().max() < 1e-6


def test_fewer_rows_than_dimensions():
    labels = drawn_labels(60)
    z, means = additive(labels, dim=150, noise=0.5)
    model = LinearIIN.fit(z, PairSampler(labels, names=NAMES, others="any"), SIZES)
    new = drawn_labels(300, seed=1)
    held, _ = additive(new, dim=150, noise=0.5)
    assert torch.allclose(model.decode(model.encode(held)), held, atol=1e-9)
    donors = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for k, name in enumerate(NAMES):
        change = torch.from_numpy(means[k][new[donors, k]] - means[k][new[:, k]])
        moved = model.swap(held, held[donors], name) - held
        # Of what should change most does, in the right direction.
        assert (moved * change).sum() / change.square().sum() > 0.5
        assert (moved - change).square().sum() < 0.5 * change.square().sum()


def test_the_scale_of_a_feature_changes_nothing():
    labels = drawn_labels(800)
    z, _ = additive(labels, noise=0.3)
    scale = torch.logspace(-4, 4, 12, dtype=torch.float64).flip(0) * (-1) ** torch.arange(12)
    shift = torch.linspace(-50, 50, 12, dtype=torch.float64)
    sampler = PairSampler(labels, names=NAMES, others="any")
    plain = LinearIIN.fit(z, sampler)
    scaled = LinearIIN.fit(z * scale + shift, sampler)
    assert plain.sizes == scaled.sizes
    for name in plain.sizes:
        one = plain.swap(z, z.flip(0), name)
        other = (scaled.swap(z * scale + shift, (z * scale + shift).flip(0), name) - shift) / scale
        assert torch.allclose(one, other, atol=1e-4), name


def test_sizes_larger_than_what_varies():
    labels = drawn_labels(300)
    z, _ = additive(labels, dim=4, noise=0.1)
    z = torch.cat([z, z @ torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))], 1)
    sampler = PairSampler(labels, names=NAMES, others="any")
    for sizes in ({"digit": 3, "color": 2, "size": 3}, {"digit": 5, "color": 1, "size": 1}):
        model = LinearIIN.fit(z, sampler, sizes)
        assert {name: model.sizes[name] for name in sizes} == sizes
        assert torch.allclose(model.decode(model.encode(z)), z, atol=1e-12)


def test_logdet_is_that_of_the_jacobian_and_the_loss_falls():
    labels = drawn_labels(500)
    z, _ = additive(labels, noise=0.3)
    sampler = PairSampler(labels, names=NAMES, others="any")
    model = LinearIIN.fit(z * 3, sampler)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.encode(x).tensor, 3 * z[:1])[0, :, 0]
    assert model(3 * z[:1])[1].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-9)
    # The same directions, given to the wrong factors, cost more.
    pairs, loss = sampler.sample(4000, step=3), FactorLoss(0.9)
    turned = LinearIIN.fit(z * 3, sampler)
    turned.flow.matrix = turned.flow.matrix.roll(2, 1)
    own, other = (loss(m, 3 * z[pairs.a], 3 * z[pairs.b], pairs.shared).item() for m in (model, turned))
    assert own < other


def test_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    labels = drawn_labels(300)
    z = additive(labels, noise=0.1)[0].float()
    model = LinearIIN.fit(z, PairSampler(labels, names=NAMES, others="any"))
    model.save(tmp_path)
    for cls in (IIN, LinearIIN):
        loaded = cls.load(tmp_path)
        assert type(loaded) is LinearIIN and loaded.config == model.config and loaded.dtype == torch.float32
        assert torch.equal(loaded.encode(z).tensor, model.encode(z).tensor)
        assert torch.equal(loaded.swap(z, z.flip(0), "color"), model.swap(z, z.flip(0), "color"))
    (tmp_path / "other").mkdir()
    IIN(4, {"a": 1}, n_flows=1, hidden_dim=4).save(tmp_path / "other")
    with pytest.raises(ValueError, match="with affine couplings, expected a linear one; IIN.load opens it"):
        LinearIIN.load(tmp_path / "other")


def test_the_methods_of_an_iin():
    labels = drawn_labels(300)
    z, _ = additive(labels, noise=0.1)
    model = LinearIIN.fit(z, PairSampler(labels, names=NAMES, others="any"))
    assert model.concepts == NAMES and model.dim == 12 and model.coupling == "linear"
    line = model.interpolate(z[:2], z[2:4], 3, "digit")
    assert torch.allclose(line[0], z[:2]) and torch.allclose(line[2], model.swap(z[:2], z[2:4], "digit"))
    axis = model.axis(z[labels[:, 2] == 1], z[labels[:, 2] == 0], "size")
    assert torch.allclose(model.traverse(z[:2], axis, [0.0])[0], z[:2])
    assert model.sample(5).shape == (5, 12) and model.log_prob(z).shape == (300,)
    with pytest.raises(ValueError, match=r"z has shape \[300, 11\]"):
        model.encode(z[:, :11])
    with pytest.raises(TypeError, match="float32"):
        model.encode(z.float())


def test_what_does_not_fit_is_refused():
    labels = drawn_labels(100)
    z, _ = additive(labels, noise=0.1)
    sampler = PairSampler(labels, names=NAMES, others="any")
    rows = torch.arange(50)
    shared = torch.ones(50, 1, dtype=torch.bool)
    for error, match, call in (
        (ValueError, r"sampler draws from 100 rows, expected 99", lambda: LinearIIN.fit(z[:99], sampler)),
        (TypeError, "sampler is a Tensor, expected a PairSampler", lambda: LinearIIN.fit(z, rows)),
        (ValueError, "z has NaN or Inf", lambda: LinearIIN.fit(z / 0, sampler)),
        (TypeError, "z has dtype int64", lambda: LinearIIN.fit(z.long(), sampler)),
        (ValueError, "no feature that varies", lambda: LinearIIN.fit(torch.ones(100, 5), sampler)),
        (ValueError, r"sizes names \['shape'\]", lambda: LinearIIN.fit(z, sampler, {"shape": 2})),
        (ValueError, "sum to more than the 2 features of z that vary", lambda: LinearIIN.fit(z[:, :2], sampler)),
        (ValueError, "at most dim = 12", lambda: LinearIIN.fit(z, sampler, {"digit": 13})),
        (ValueError, "zb has shape", lambda: LinearIIN.fit_pairs(z[:50], z[:40], shared, ["a"])),
        (TypeError, "shared is torch.int64", lambda: LinearIIN.fit_pairs(z[:50], z[50:], shared.long(), ["a"])),
        (ValueError, r"names is \[\], expected", lambda: LinearIIN.fit_pairs(z[:50], z[50:], shared[:, :0], [])),
        (ValueError, "no pair shares 'a'", lambda: LinearIIN.fit_pairs(z[:50], z[50:], ~shared, ["a"])),
    ):
        with pytest.raises(error, match=match):
            call()


def test_ready_pairs_that_all_share_one_concept():
    generator = torch.Generator().manual_seed(0)
    a, b, turn = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3000, 6), (3000, 6), (6, 6))
    )
    b[:, :2] = 0.9 * a[:, :2] + (1 - 0.9**2) ** 0.5 * b[:, :2]
    model = LinearIIN.fit_pairs(a @ turn, b @ turn, torch.ones(3000, 1, dtype=torch.bool), ["shape"])
    assert model.sizes == {"shape": 2, "residual": 4}
    swapped = model.swap(a @ turn, b @ turn, "shape") @ torch.linalg.inv(turn)
    assert (swapped - torch.cat([b[:, :2], a[:, 2:]], 1)).square().mean() < 0.01


def test_a_concept_from_two_small_groups():
    """Eight latents with it and eight without: the pairs of concept_pairs are enough for its direction."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    with_, without, background = (torch.randn(n, 16, generator=generator) for n in (8, 8, 500))
    with_[:, 0], without[:, 0] = with_[:, 0] * 0.2 + 3, without[:, 0] * 0.2 - 3
    background[:, 0] = 3 * torch.sign(background[:, 0])
    pairs = concept_pairs(with_ @ turn, without @ turn, background @ turn, n=4000)
    model = LinearIIN.fit_pairs(pairs.za, pairs.zb, pairs.shared, pairs.names, {"concept": 1})
    moved = (model.swap(background @ turn, background.flip(0) @ turn, "concept") - background @ turn) @ turn.T
    change = background.flip(0)[:, 0] - background[:, 0]
    assert (moved[:, 0] - change).square().mean() < 0.3 * change.square().mean()
    assert moved[:, 1:].square().mean() < 0.1 * change.square().mean()


@pytest.mark.parametrize("coupling", ["affine", "spline"])
@pytest.mark.parametrize("features", ["plain", "few rows", "dead"])
def test_a_flow_starts_at_the_linear_solution(coupling, features):
    generator = torch.Generator().manual_seed(0)
    n = 20 if features == "few rows" else 300
    labels = torch.randint(0, 3, (n, 2), generator=generator)
    means = torch.randn(2, 3, 31, generator=generator)
    z = means[0, labels[:, 0]] + means[1, labels[:, 1]] + 0.2 * torch.randn(n, 31, generator=generator)
    if features == "dead":
        z[:, [2, 5]], z[:, 7] = 1.0, z[:, 8]
    linear = LinearIIN.fit(z, PairSampler(labels, names=("a", "b"), others="any"))
    inputs = linear.start()
    assert inputs.live == {"plain": 31, "few rows": 19, "dead": 28}[features]
    model = IIN(31, linear.sizes, 3, 16, coupling=coupling, inputs=inputs, generator=generator)
    model.start_as_identity()
    found, expected = model.encode(z), linear.encode(z)
    assert list(found.sizes.items()) == list(expected.sizes.items())
    assert torch.allclose(found.tensor, expected.tensor, atol=1e-4)
    for factor in ("a", "b"):
        assert torch.allclose(model.swap(z, z.flip(0), factor), linear.swap(z, z.flip(0), factor), atol=1e-4)
    assert torch.allclose(model.log_prob(z[:5]), linear.log_prob(z[:5]), atol=1e-2, rtol=1e-4)
    assert torch.allclose(model.decode(found), z, atol=1e-4)


def test_directions_of_little_variance_bypass_the_flow():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (500, 1), generator=generator)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    parts = torch.cat([torch.randn(3, 4, generator=generator)[labels[:, 0]], torch.zeros(500, 8)], 1)
    z = (parts + 0.02 * torch.randn(500, 12, generator=generator)) @ turn + 5
    pairs = PairSampler(labels, names=("a",), others="any").sample(5000)
    linear = LinearIIN._fit("test", z, pairs.a, pairs.b, pairs.shared, ("a",), None, 0.99)
    inputs = linear.start()
    assert inputs.live == 2 and linear.sizes == {"a": 2, "residual": 10}  # three means lie in a plane
    model = IIN(12, linear.sizes, 3, 16, inputs=inputs, generator=generator)
    x = model.encode(z).tensor
    assert torch.allclose(x[:, 2:], linear.encode(z).tensor[:, 2:], atol=1e-4)  # whatever the flow is
    assert torch.allclose(x[:, 2:].T @ x[:, 2:] / len(z), torch.eye(10), atol=0.1)  # white, too
    assert torch.allclose(model.decode(model.encode(z)), z, atol=1e-4)
    swapped = linear.swap(z, z.flip(0), "a")
    assert torch.allclose(linear.encode(swapped)["residual"], linear.encode(z)["residual"], atol=1e-3)
    assert inputs.turned(torch.eye(12)).live == 12 and white_inputs(z, 0.99).live == 2 and white_inputs(z).live == 12


def test_a_linear_start_is_saved(tmp_path):
    pytest.importorskip("safetensors")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 8, generator=generator) @ torch.randn(8, 10, generator=generator)
    model = IIN(10, None, 2, 16, inputs=white_inputs(z))
    model.start_as_identity()
    assert model.inputs.live == 8
    x = model.encode(z).tensor
    assert torch.allclose(x[:, :8].T @ x[:, :8] / len(z), torch.eye(8), atol=0.05) and x[:, 8:].abs().max() < 1e-3
    model.save(tmp_path)
    loaded = IIN.load(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded.encode(z).tensor, x)
