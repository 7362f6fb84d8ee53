"""Concepts from few examples, and from few labels."""

import pytest
import torch

from iin_fast import IIN, FactorLoss, PairSampler, concept_pairs

WITH = torch.arange(5.0)[:, None] + torch.tensor([100.0, 0.0])
WITHOUT = torch.arange(4.0)[:, None] + torch.tensor([200.0, 0.0])
BACKGROUND = torch.arange(50.0)[:, None] + torch.tensor([1000.0, 0.0])


def group(z: torch.Tensor) -> torch.Tensor:
    """Which group each latent came from: 1 with, 2 without, 10 background."""
    return (z[:, 0] / 100).floor().long()


def test_what_pairs_share():
    pairs = concept_pairs(WITH, WITHOUT, BACKGROUND, n=1000)
    a, b = group(pairs.za), group(pairs.zb)
    assert pairs.names == ("concept",) and pairs.shared.shape == (1000, 1)
    assert torch.equal(pairs.shared[:, 0], (a == b) & (a < 10))
    assert torch.equal(pairs.factor, torch.where(pairs.shared[:, 0], 0, -1))
    assert (a == 10).sum() == 500 and torch.equal(a == 10, b == 10)
    assert ((a == b) & (a == 1)).sum() == 125 and ((a == b) & (a == 2)).sum() == 125
    assert abs(((a == 1) & (b == 2)).sum() - 125) < 40  # either group comes first
    assert (pairs.za != pairs.zb).any(1).all()
    for rows, whole in ((a == 1, WITH), (a == 2, WITHOUT), (a == 10, BACKGROUND)):
        assert {tuple(z) for z in pairs.za[rows].tolist()} == {tuple(z) for z in whole.tolist()}  # all come up


def test_rest():
    """The same thing with and without the concept: such pairs share the rest."""
    pairs = concept_pairs(WITH[:4], WITHOUT, n=400, rest="rest")
    a, b = group(pairs.za), group(pairs.zb)
    assert pairs.names == ("concept", "rest")
    assert torch.equal(pairs.shared, torch.stack([a == b, a != b], 1))
    assert torch.equal(pairs.factor, (a != b).long())
    across = a != b
    assert torch.equal(pairs.za[across, 0] % 100, pairs.zb[across, 0] % 100)  # partners, not just any two


def test_seed_noise_and_batches():
    first, again, other = (concept_pairs(WITH, WITHOUT, n=300, noise=0.1, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(first[:4], again[:4], strict=True))
    assert not torch.equal(first.za, other.za)
    batches = list(first.batches(16, 5, seed=1))
    assert len(batches) == 5 and all(za.shape == (16, 2) and shared.shape == (16, 1) for za, _, shared in batches)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(batches, first.batches(16, 5, seed=1), strict=True))


def test_noise_is_in_deviations_of_each_feature():
    scale = torch.tensor([1.0, 30.0, 0.0])  # the last feature does not vary
    with_, without = ((torch.randn(5, 3, generator=torch.Generator().manual_seed(k)) * scale) for k in range(2))
    noisy, plain = (concept_pairs(with_, without, n=20_000, noise=noise) for noise in (0.3, 0.0))

    def nearest(z: torch.Tensor) -> torch.Tensor:
        return (z[:, None] - torch.cat([with_, without])).abs().sum(2).min(1).values

    assert nearest(plain.za).max() == 0 and nearest(noisy.za).min() > 0
    spread = torch.cat([with_, without]).std(0)
    added = noisy.za.var(0) - plain.za.var(0)
    torch.testing.assert_close(added, (0.3 * spread) ** 2, rtol=0.15, atol=1e-12)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(with_=WITH[:1]), ValueError, "with_ has 1 latents, expected at least 2"),
        (dict(without=WITHOUT[0]), ValueError, r"without has shape \[2\], expected latents \[n, dim\]"),
        (dict(without=WITHOUT[:, :1]), ValueError, r"without has shape \[4, 1\], expected \[4, 2\] like with_"),
        (dict(without=WITHOUT.double()), TypeError, "without has dtype float64, expected float32 like with_"),
        (dict(with_=WITH.long()), TypeError, "with_ has dtype int64"),
        (dict(background=[1]), TypeError, "background is a list"),
        (dict(background=BACKGROUND * torch.nan), ValueError, "background has NaN"),
        (dict(background=BACKGROUND.to("meta")), ValueError, "background is on meta"),
        (dict(rest="rest"), ValueError, "without has 4 latents, expected 5 like with_"),
        (dict(with_=WITH[:4], rest="concept"), ValueError, "expected another name"),
        (dict(name="residual"), ValueError, "'residual', which is what the concepts leave over"),
        (dict(background_share=1.0), ValueError, "background_share is 1.0"),
        (dict(noise=-1.0), ValueError, "noise is -1.0"),
        (dict(n=0), ValueError, "n is 0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        concept_pairs(**{"with_": WITH, "without": WITHOUT, **change})


def world(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents ``[n, 6]``, curved and mixed, of which one hidden sign is the concept ``[n]``."""
    concept = torch.randint(2, (n,), generator=generator)
    hidden = torch.randn(n, 6, generator=generator)
    hidden[:, 0] = 2.0 * (2 * concept - 1) + 0.3 * hidden[:, 0]
    hidden[:, 1] += 0.5 * hidden[:, 2] ** 2
    mixing = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(7)))[0]
    return hidden @ mixing, concept


def train(model: IIN, batches) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    loss_of = FactorLoss(0.99)
    for za, zb, shared in batches:
        loss = loss_of(model, za, zb, shared)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def read_concept(z: torch.Tensor) -> torch.Tensor:
    mixing = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(7)))[0]
    return ((z @ mixing.T)[:, 0] > 0).long()


def test_a_dozen_examples_define_a_concept():
    """8 with, 8 without, and unlabelled latents: swapping the factor swaps the concept of held-out latents."""
    generator = torch.Generator().manual_seed(0)
    z, concept = world(64, generator)
    background, _ = world(2000, generator)
    pairs = concept_pairs(z[concept == 1][:8], z[concept == 0][:8], background, noise=0.3, seed=1)
    model = IIN(6, {"concept": 1}, n_flows=4, hidden_dim=32, hidden_depth=1, generator=generator)
    train(model, pairs.batches(128, 300))
    test, truth = world(1000, generator)
    donor = test.flip(0)
    with torch.no_grad():
        swapped = model.swap(test, donor, "concept")
        other = model.swap(test, donor, "residual")
    assert (read_concept(swapped) == truth.flip(0)).float().mean() > 0.93  # 0.5 is chance
    assert (read_concept(other) == truth).float().mean() > 0.93


def test_unlabelled_rows_teach_the_density():
    """40 labelled rows of 2000: with the others as unlabelled ones, held-out latents are likelier than without."""
    generator = torch.Generator().manual_seed(0)
    z, concept = world(2000, generator)
    test, truth = world(1000, generator)
    labels = concept.clone()
    labels[40:] = -1
    nats, swaps = {}, {}

    def noisy(z: torch.Tensor) -> torch.Tensor:
        return z + 0.3 * torch.randn(z.shape, generator=generator)

    for name, rows in (("semi", slice(None)), ("labelled", slice(40))):
        start = torch.Generator().manual_seed(1)
        model = IIN(6, {"concept": 1}, n_flows=4, hidden_dim=32, hidden_depth=1, generator=start)
        sampler = PairSampler({"concept": labels[rows]}, seed=0)
        batches = (sampler.sample(128) for _ in range(300))
        train(model, ((noisy(z[p.a]), noisy(z[p.b]), p.shared) for p in batches))
        with torch.no_grad():
            nats[name] = model.log_prob(test).mean().item()
            swaps[name] = (read_concept(model.swap(test, test.flip(0), "concept")) == truth.flip(0)).float().mean()
    assert nats["semi"] > nats["labelled"] + 1
    assert swaps["semi"] > 0.95
