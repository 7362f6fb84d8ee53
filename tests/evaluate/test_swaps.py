"""Swap success, its judge and its baselines, on latents that are a known rotation of known factors."""

import numpy as np
import pytest
from known_latents import NAMES, cut, draw_labels, joined, perfect_factors, rotation

from iin_fast.evaluate import (
    LinearFactors,
    MeanShift,
    judge_accuracy,
    latent_judge,
    pair_verdict,
    shared_correlation,
    swap_success,
    swap_verdict,
)
from iin_fast.evaluate.baselines import LinearRival

TURN = rotation(10, seed=3)


@pytest.fixture(scope="module")
def data():
    """Training and held-out latents with labels, and a judge that learned on the former."""
    train, test = draw_labels(1200, 10), draw_labels(800, 11)
    train_z, z = joined(perfect_factors(train, 10)) @ TURN, joined(perfect_factors(test, 11)) @ TURN
    return train_z, train, z, test, latent_judge(train_z, train, NAMES)


def exact_swap(z):
    """Swaps in the factors that the latents were made of."""

    def swap(concept, keep, give):
        kept, given = cut(z[keep] @ TURN.T), cut(z[give] @ TURN.T)
        return joined({**kept, concept: given[concept]}) @ TURN.T.T

    return swap


def test_the_true_factors_reach_the_ceiling_in_both_directions(data):
    _, _, z, labels, judge = data
    ceiling = judge_accuracy(judge, z, labels, NAMES)
    assert min(ceiling.values()) > 0.98
    for row in swap_success(exact_swap(z), labels, NAMES, judge).values():
        assert row["target"] > 0.97 and row["keep_all"] > 0.97 and row["both"] > 0.95
        assert row["swaps"] == len(z)


def test_swapping_nothing_keeps_all_and_swapping_everything_reaches_the_target(data):
    _, _, z, labels, judge = data
    nothing = swap_success(lambda concept, keep, give: z[keep], labels, NAMES, judge)["shape"]
    assert nothing["target"] < 0.02 and nothing["keep"]["color"] > 0.98 and nothing["both"] < 0.02
    everything = swap_success(lambda concept, keep, give: z[give], labels, NAMES, judge)["shape"]
    assert everything["target"] > 0.98
    chance = np.mean(labels[:, 1] == np.random.default_rng(0).permutation(labels[:, 1]))
    assert everything["keep"]["color"] == pytest.approx(chance, abs=0.08)


def test_donors_are_of_other_classes_and_rare_classes_give_as_often():
    labels = np.repeat([0, 1, 2], [900, 90, 10])[:, None]
    seen = []

    def swap(concept, keep, give):
        seen.append((keep, give))
        return np.zeros((len(keep), 1))

    swap_success(swap, labels, ["y"], lambda z: {"y": np.ones((len(z), 3))}, seed=1)
    (keep, give), own = seen[0], labels[:, 0]
    assert (own[keep] != own[give]).all()
    of_frequent = own[give][own[keep] == 0]
    assert np.mean(of_frequent == 2) == pytest.approx(0.5, abs=0.06)  # 10 samples give as often as 90


def test_unknown_labels_neither_give_nor_keep_nor_count(data):
    _, _, z, labels, judge = data
    lost = labels.copy()
    lost[::2, 0] = -1
    lost[1::4, 1] = -1
    drawn = {}

    def swap(concept, keep, give):
        drawn[concept] = np.concatenate([keep, give])
        return exact_swap(z)(concept, keep, give)

    found = swap_success(swap, lost, NAMES, judge)
    assert (lost[drawn["shape"], 0] >= 0).all() and (lost[drawn["color"], 1] >= 0).all()
    assert found["shape"]["swaps"] == (lost[:, 0] >= 0).sum()
    assert found["shape"]["both"] > 0.95 and found["color"]["keep"]["shape"] > 0.95
    assert min(judge_accuracy(judge, z, lost, NAMES).values()) > 0.98


def test_a_seed_repeats_and_limits_hold(data):
    _, _, z, labels, judge = data
    first = swap_success(exact_swap(z), labels, NAMES, judge, concepts=["color"], max_swaps=50, seed=4)
    assert first == swap_success(exact_swap(z), labels, NAMES, judge, concepts=["color"], max_swaps=50, seed=4)
    assert list(first) == ["color"] and first["color"]["swaps"] == 50


def test_mean_shift_is_right_where_classes_are_shifts_and_wrong_where_concepts_interact(data):
    train_z, train, z, labels, judge = data

    def swap_of(shift, z, labels, names):
        return lambda concept, keep, give: shift.swap(
            z[keep], *(labels[rows, names.index(concept)] for rows in (keep, give)), concept
        )

    shift = MeanShift(train_z, train, NAMES)
    found = swap_success(swap_of(shift, z, labels, NAMES), labels, NAMES, judge)
    assert found["shape"]["both"] > 0.95 and found["color"]["both"] > 0.95

    # The second concept is the sign of a product with the first: its classes have the same mean.
    random = np.random.default_rng(5)
    labels = random.integers(2, size=(1600, 2))
    x = 2 * labels[:, :1] - 1
    z = np.concatenate([x, x * (2 * labels[:, 1:] - 1)], axis=1) + 0.1 * random.standard_normal((1600, 2))
    judge = latent_judge(z[:800], labels[:800], ["a", "b"])
    shift = MeanShift(z[:800], labels[:800], ["a", "b"])
    found = swap_success(swap_of(shift, z[800:], labels[800:], ["a", "b"]), labels[800:], ["a", "b"], judge)
    assert found["b"]["target"] < 0.1


def test_linear_factors_find_the_dimensions_of_each_concept(data):
    labels = draw_labels(900, 12)
    z = joined(perfect_factors(labels, 12))[:, [7, 3, 0, 4, 8, 1, 5, 2, 6, 9]]
    basis = LinearFactors(z, labels, NAMES, {"shape": 3, "color": 4, "residual": 3}, "raw")
    assert basis.dimensions == {"shape": [2, 5, 7], "color": [1, 3, 6, 8], "residual": [0, 4, 9]}
    swapped = basis.swap(z[:5], z[5:10], "shape")
    assert np.allclose(swapped[:, [2, 5, 7]], z[5:10][:, [2, 5, 7]])
    assert np.allclose(np.delete(swapped, [2, 5, 7], 1), np.delete(z[:5], [2, 5, 7], 1))


@pytest.mark.parametrize("kind", ["raw", "pca"])
def test_linear_factors_hold_all_of_z(data, kind):
    train_z, train, z, _, _ = data
    sizes = {"shape": 3, "color": 4, "residual": 3}
    basis = LinearFactors(train_z, train, NAMES, sizes, kind)
    assert {name: part.shape[1] for name, part in basis.encode(z).items()} == sizes
    distance = np.linalg.norm(joined(basis.encode(z))[:50] - joined(basis.encode(z))[50:100], axis=1)
    assert np.allclose(distance, np.linalg.norm(z[:50] - z[50:100], axis=1))  # a rotation
    everything = z[:5]
    for name in sizes:
        everything = basis.swap(everything, z[5:10], name)
    assert np.allclose(everything, z[5:10])


def test_what_is_no_judge_or_no_concept_is_refused(data):
    _, _, z, labels, judge = data
    with pytest.raises(TypeError, match="judge gave"):
        swap_success(exact_swap(z), labels, NAMES, lambda z: z)
    with pytest.raises(ValueError, match=r"judge gave 'shape' of shape \[3\]"):
        swap_success(exact_swap(z), labels, NAMES, lambda z: dict.fromkeys(NAMES, np.zeros(3)))
    with pytest.raises(ValueError, match="concepts has 'size'"):
        swap_success(exact_swap(z), labels, NAMES, judge, concepts=["size"])
    with pytest.raises(ValueError, match="only the class 0"):
        latent_judge(z, np.zeros_like(labels), NAMES)
    with pytest.raises(ValueError, match="sum to more than the 10 dimensions"):
        LinearFactors(z, labels, NAMES, {"shape": 6, "color": 6}, "raw")


def test_swaps_of_a_concept_without_a_known_pair_change_nothing(data):
    _, _, z, labels, _ = data
    codes = labels.copy()
    codes[:, 1] = -1
    codes[:4, 1] = range(4)  # each class once
    rival = LinearRival.of(z, codes, NAMES, NAMES)
    assert list(rival.encode(z)) == ["shape", "residual"]
    assert np.array_equal(rival.swap(z[:5], z[5:10], "color"), z[:5])
    assert np.abs(rival.swap(z[:50], z[50:100], "shape") - z[:50]).max() > 0.5
    assert LinearRival.of(z, codes, NAMES, ["color"]) is None


def outcomes(better, worse, n=1000):
    """Swaps of two systems, of which the first has ``better`` that the second has not, and the other way round."""
    both = {"iin": np.zeros(n, dtype=bool), "mean_shift": np.zeros(n, dtype=bool)}
    both["iin"][:better] = True
    both["mean_shift"][n - worse :] = True
    return both


@pytest.mark.parametrize(
    ("better", "worse", "verdict"), [(100, 20, "better"), (20, 100, "worse"), (60, 60, "equal"), (0, 0, "equal")]
)
def test_verdict_follows_from_an_interval_of_the_difference(better, worse, verdict):
    found = swap_verdict("digit", outcomes(better, worse), seed=1)
    assert found == swap_verdict("digit", outcomes(better, worse), seed=1)
    assert found["verdict"] == verdict and found["rival"] == "mean_shift"
    assert found["difference"] == (better - worse) / 1000
    # The deviation of a mean of 1000 values -1, 0, 1 is known, and two of them make the interval.
    deviation = np.sqrt((better + worse) / 1000 - found["difference"] ** 2) / np.sqrt(1000)
    assert found["low"] == pytest.approx(found["difference"] - 1.96 * deviation, abs=0.003)
    assert found["high"] == pytest.approx(found["difference"] + 1.96 * deviation, abs=0.003)
    words = {"better": "is better than", "equal": "does as well as", "worse": "is worse than"}
    assert found["text"].startswith(f"digit: the IIN {words[verdict]} mean shift; ")


def test_verdict_compares_with_the_better_rival():
    both = outcomes(100, 50)
    found = swap_verdict("digit", {**both, "linear_iin": ~both["iin"]})
    assert found["rival"] == "linear_iin" and found["verdict"] == "worse" and "the linear IIN" in found["text"]
    few = swap_verdict("digit", {who: rows[::100] for who, rows in outcomes(300, 100).items()})
    assert few["difference"] > 0 and few["verdict"] == "equal"  # ten rows show little


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"), [(0.2, 0.8, "better"), (0.8, 0.2, "worse"), (0.5, 0.5, "equal")]
)
def test_verdict_of_ready_pairs(ours, theirs, verdict):
    random = np.random.default_rng(0)
    shared = np.arange(400) % 2 == 0
    za = random.standard_normal((400, 2))
    zb = np.where(shared[:, None], za, random.standard_normal((400, 2)))
    z = np.concatenate([za, zb])
    factors = {
        who: z + noise * random.standard_normal(z.shape) for who, noise in (("iin", ours), ("linear_iin", theirs))
    }
    found = pair_verdict("digit", factors, shared, seed=1)
    assert found == pair_verdict("digit", factors, shared, seed=1)
    assert (
        found["verdict"] == verdict and found["rival"] == "linear_iin" and "200 pairs that share digit" in found["text"]
    )
    scores = {}
    for who, part in factors.items():
        both = shared_correlation({"digit": part}, shared[:, None], ["digit"])
        scores[who] = both["shared"]["digit"]["digit"] - both["apart"]["digit"]["digit"]
    assert found["difference"] == pytest.approx(scores["iin"] - scores["linear_iin"], abs=0.02)
    # The interval holds the difference of other pairs of the same kind in most cases; a fifth of its width is what draws change.
    assert found["low"] < found["difference"] < found["high"] < found["low"] + 0.6
