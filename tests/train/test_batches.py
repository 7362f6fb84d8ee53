"""Which pairs are drawn: what they share, and what becomes of samples with missing labels."""

import numpy as np
import pytest
import torch

from iin_fast.data import Latents
from iin_fast.train import Batches, Settings, estimate_sizes, split_rows


def table(n=400, missing=0.0, seed=0):
    random = np.random.default_rng(seed)
    labels = np.stack([random.integers(0, 4, n), random.integers(0, 3, n)], 1)
    labels[random.random(labels.shape) < missing] = -1
    z = random.standard_normal((n, 6)).astype(np.float32)
    return Latents.of(z, labels, ["digit", "color"])


def test_labelled_pairs_share_what_they_say():
    latents = table()
    rows = np.arange(100, 300)
    batch = Batches(latents, rows).draw(200, 3)
    a, b = latents.labels[batch.a], latents.labels[batch.b]
    assert torch.equal(a == b, batch.shared) and (batch.shared.sum(1) == 1).all()
    assert set(batch.a.tolist()) | set(batch.b.tolist()) <= set(rows.tolist())


def test_missing_labels_make_no_claims_and_unlabelled_samples_come_alone():
    latents = table(missing=0.4)
    rows = np.arange(50, 350)
    batches = Batches(latents, rows, unlabelled=0.25)
    unknown = (latents.labels == -1).all(1)
    alone = []
    for step in range(20):
        batch = batches.draw(100, step)
        a, b = latents.labels[batch.a], latents.labels[batch.b]
        assert ((a == b) & (a >= 0))[batch.shared].all()
        free = ~batch.shared.any(1)
        assert torch.equal(unknown[batch.a], free) and torch.equal(unknown[batch.b], free)
        assert set(batch.a.tolist()) | set(batch.b.tolist()) <= set(rows.tolist())
        alone.append(free.double().mean().item())
    assert np.mean(alone) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("kind", ["labels", "missing", "pairs", "alone"])
def test_a_batch_follows_from_seed_and_step(kind):
    latents = table(missing=0.3 * (kind == "missing"))
    if kind == "pairs":
        latents = Latents.of_pairs(latents.z[:200], latents.z[200:], torch.arange(200) % 2)
    elif kind == "alone":
        latents = Latents.of(latents.z)
    first, again = Batches(latents, seed=5), Batches(latents, seed=5)
    first.draw(30, 0)
    for x, y in zip(first.draw(30, 7), again.draw(30, 7), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(first.draw(30, 7).a, first.draw(30, 8).a)
    assert not torch.equal(first.draw(30, 7).a, Batches(latents, seed=6).draw(30, 7).a)


def test_ready_pairs_stay_together():
    z = torch.randn(40, 3)
    shared = torch.rand(20, 2) < 0.7
    shared[0] = True
    latents = Latents.of_pairs(z[:20], z[20:], shared=shared)
    batch = Batches(latents, np.arange(5, 15)).draw(100, 0)
    assert torch.equal(batch.b, batch.a + 20) and torch.equal(batch.shared, shared[batch.a])
    assert set(batch.a.tolist()) == set(range(5, 15))
    train, held = split_rows(latents, 0.2, seed=1)
    assert len(held) == 8 and set(held[:4] + 20) == set(held[4:])
    assert sorted([*train, *held]) == list(range(40))


def test_without_labels_nothing_is_shared():
    batch = Batches(Latents.of(torch.randn(50, 3))).draw(200, 0)
    assert batch.shared.shape == (200, 0) and len(batch.a.unique()) > 40


def test_split():
    latents = table()
    train, held = split_rows(latents, 0.1, seed=3)
    assert len(held) == 40 and sorted([*train, *held]) == list(range(400))
    assert np.array_equal(held, split_rows(latents, 0.1, seed=3)[1])
    assert not np.array_equal(held, split_rows(latents, 0.1, seed=4)[1])
    assert len(split_rows(latents, 0.0)[1]) == 0
    with pytest.raises(ValueError, match="leaves nothing of 400"):
        split_rows(latents, 0.9999)


def test_sizes_follow_what_pairs_have_in_common():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2000, 2), generator=generator)
    z = 0.1 * torch.randn(2000, 12, generator=generator)
    z[:, :8] += torch.randn(5, 8, generator=generator)[labels[:, 0]]  # eight features for one, two for the other
    z[:, 8:10] += torch.randn(5, 2, generator=generator)[labels[:, 1]]
    latents = Latents.of(z, labels, ["wide", "narrow"])
    sizes = estimate_sizes(latents, Batches(latents))
    assert list(sizes) == ["wide", "narrow", "residual"] and sum(sizes.values()) == 12
    assert sizes["wide"] > sizes["narrow"] > 0
    alone = Latents.of(z)
    assert estimate_sizes(alone, Batches(alone)) == {"residual": 12}


def test_what_cannot_be_drawn():
    latents = table()
    with pytest.raises(ValueError, match="factors names 'shape', expected concepts of the latents: .*'digit', 'color'"):
        Batches(latents, concepts=["shape"])
    with pytest.raises(ValueError, match="none, as there are no labels"):
        Batches(Latents.of(latents.z), concepts=["shape"])
    with pytest.raises(ValueError, match="no pair that shares concept"):
        Batches(Latents.of(latents.z, torch.full((400, 1), -1)))
    single = Latents.of(latents.z[:6], torch.stack([torch.arange(6), torch.arange(6) % 2], 1), ["own", "two"])
    with pytest.raises(ValueError, match="no pair that shares concept 'own'"):
        Batches(single)
    batch = Batches(single, lenient=True).draw(50, 0)
    assert batch.shared[:, 1].all() and not batch.shared[:, 0].any()
    assert Batches(Latents.of(latents.z[:3], torch.arange(3)[:, None]), lenient=True).empty


def test_a_concept_of_one_class_is_refused_unless_the_others_are_unknown():
    labels = torch.stack([torch.arange(40) % 2, torch.full((40,), 5)], 1)
    z = torch.randn(40, 3)
    with pytest.raises(ValueError, match="concept 'b' has only the class 5 in all samples"):
        Batches(Latents.of(z, labels, ["a", "b"]), others="any")
    assert Batches(Latents.of(z, labels, ["a", "b"]), concepts=["a"]).draw(5, 0).shared.all()
    labels[::2, 1] = -1
    assert Batches(Latents.of(z, labels, ["a", "b"]), concepts=["b"]).draw(200, 0).shared.any()


def test_rate_is_flat_and_then_a_line():
    settings = Settings(batch=100, steps=10, decay_start=6, warmup=0)
    assert [settings.rate(step) for step in range(10)] == pytest.approx(
        [4.5e-4] * 6 + [4.5e-4 * share for share in (1, 0.75, 0.5, 0.25)]
    )
    assert Settings(steps=10, batch=1, learning_rate=0.1, decay_start=0).rate(5) == pytest.approx(0.05)
    assert Settings(preset="paper", steps=3, decay_start=3).rate(2) == pytest.approx(4.5e-6 * 25)
    rising = Settings(steps=10, batch=1, learning_rate=1.0, warmup=4, decay_start=8)
    assert [rising.rate(step) for step in range(10)] == pytest.approx([0.25, 0.5, 0.75, *[1] * 5, 1, 0.5])


def test_noise_falls_by_equal_shares():
    settings = Settings(steps=20, noise=0.8, noise_end=0.05)
    assert [settings.noise_at(step) for step in (0, 2, 3, 4, 5, 6, 19)] == pytest.approx(
        [0.8, 0.8, 0.4, 0.2, 0.1, 0.05, 0.05]
    )
    assert Settings(steps=20, noise=0.8).noise_at(3) == 0.8
    assert Settings(steps=20, noise=0.8, noise_end=0).noise_at(5) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"rho": 1.0}, ValueError, "rho is 1.0, expected between 0 and 1"),
        ({"rho": "x"}, TypeError, "rho is 'x', expected a number"),
        ({"learning_rate": 0}, ValueError, "learning_rate is 0, expected more than 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate is nan"),
        ({"held_out": 1}, ValueError, "held_out is 1, expected 0 to below 1"),
        ({"held_out": -0.1}, ValueError, "held_out is -0.1"),
        ({"noise": -0.1}, ValueError, "noise is -0.1, expected a finite number from 0"),
        ({"keep": "first"}, ValueError, "keep is 'first', expected 'last' or 'best' or 'swaps'"),
        ({"unlabelled": 1.5}, ValueError, "unlabelled is 1.5, expected 0 to 1"),
        ({"seed": None}, TypeError, "seed is None, expected an integer of at least 0"),
        ({"preset": "best"}, ValueError, "preset is 'best', expected 'auto' or 'paper'"),
        ({"start": "zero"}, ValueError, "start is 'zero', expected 'linear' or 'redrawn' or 'random'"),
        ({"batch": 0}, ValueError, "batch is 0, expected a positive integer"),
        ({"steps": 1.5}, TypeError, "steps is 1.5, expected a positive integer"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"steps": 10, "decay_start": 11}, ValueError, "decay_start is 11, expected at most steps = 10"),
        ({"precision": "16"}, ValueError, "precision is '16', expected '32-true' or"),
        ({"coupling": "additive"}, ValueError, "coupling is 'additive', expected 'affine' or 'spline'"),
        ({"factors": ["digit"]}, TypeError, "factors is a list"),
        ({"factors": {"digit": -1}}, ValueError, r"factors\['digit'\] is -1"),
    ],
)
def test_settings_are_checked(wrong, error, message):
    with pytest.raises(error, match=message):
        Settings(**wrong)
