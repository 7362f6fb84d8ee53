"""Mutual information and the gap made of it, on factors whose information is known."""

import numpy as np
import pytest
from known_latents import NAMES, draw_labels, mixed_factors, noise_factors, perfect_factors

from iin_fast.evaluate import factor_label_information, label_entropy, mig
from iin_fast.evaluate.information import _places


def information(x, y, **settings):
    found = factor_label_information({"f": np.asarray(x, dtype=float)}, np.asarray(y)[:, None], ["y"], **settings)
    return found["nats"]["f"]["y"]


@pytest.mark.parametrize("estimator", ["neighbours", "bins"])
@pytest.mark.parametrize(
    "shares", [[0.5, 0.5], [0.7, 0.2, 0.1], [0.25] * 4, [0.96, 0.04], [0.96, 0.02, 0.02], [0.03, 0.97]]
)
def test_the_label_itself_has_the_labels_entropy(estimator, shares):
    y = np.repeat(np.arange(len(shares)), np.round(1000 * np.array(shares)).astype(int))
    entropy = -sum(share * np.log(share) for share in shares)
    assert label_entropy(y) == pytest.approx(entropy)
    assert information(y[:, None], y, estimator=estimator) == pytest.approx(entropy, abs=0.02)


def test_one_hot_vectors_have_the_labels_entropy():
    y = draw_labels(900, 0)[:, 1]
    assert information(np.eye(4)[y], y) == pytest.approx(label_entropy(y), abs=0.02)


@pytest.mark.parametrize(("estimator", "more"), [("neighbours", 0), ("neighbours", 1), ("bins", 0)])
def test_overlapping_intervals_have_half_a_bit(estimator, more):
    # Uniform on [0, 1] or [1/2, 3/2]: half of the samples tell their class, the others nothing.
    random = np.random.default_rng(0)
    y = random.integers(2, size=2000)
    x = np.column_stack([random.random(2000) + 0.5 * y, random.random((2000, more))])
    assert information(x, y, estimator=estimator) == pytest.approx(0.5 * np.log(2), abs=0.05)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("estimator", ["neighbours", "bins"])
def test_a_feature_that_is_mostly_zero_tells_what_its_other_values_tell(estimator, order):
    # 95 % of the rows are 0; the sign of the others is the label of those rows, which is a fair coin elsewhere.
    random = np.random.default_rng(4)
    y = random.integers(2, size=2000)
    x = np.where(np.arange(2000) < 1900, 0, (2 * y - 1) * random.uniform(1, 2, 2000))
    assert information(order * x[:, None], y, estimator=estimator) == pytest.approx(0.05 * np.log(2), abs=0.01)


@pytest.mark.parametrize("noise", [0, 1e-12, 1e-7])
@pytest.mark.parametrize("estimator", ["neighbours", "bins"])
def test_an_almost_constant_feature_tells_a_rare_label(estimator, noise):
    # 98 % of the rows have one value, up to rounding; the others are of the other class, fewer than a bin holds.
    random = np.random.default_rng(6)
    y = (np.arange(2000) < 40).astype(int)
    x = np.where(y == 1, random.uniform(1, 2, 2000), 0.3) + noise * random.standard_normal(2000)
    assert information(x[:, None], y, estimator=estimator) == pytest.approx(label_entropy(y), abs=0.003)


@pytest.mark.parametrize("values", [1, 7, 20, 25, 400])
def test_bins_hold_equal_values_together_and_are_not_more_than_asked_for(values):
    x = np.random.default_rng(5).permutation(np.arange(2000) % values).astype(float)
    place = _places(x, 20)
    assert len(np.unique(place)) == min(values, 20)
    assert all(len(np.unique(place[x == value])) == 1 for value in range(values))
    assert np.bincount(place).max() <= 2 * 2000 / min(values, 20)


@pytest.mark.parametrize("size", [1, 5])
def test_noise_has_none(size):
    random = np.random.default_rng(1)
    x, y = random.standard_normal((1500, size)), random.choice(3, 1500, p=[0.6, 0.3, 0.1])
    assert 0 <= information(x, y) < 0.04


def test_scale_and_shift_of_a_dimension_do_not_matter():
    y = draw_labels(500, 2)[:, 0]
    x = np.random.default_rng(2).standard_normal((500, 3)) + y[:, None]
    assert information(x * [1, 100, 1e-3] + [0, 5, -7], y) == pytest.approx(information(x, y), abs=1e-6)


@pytest.mark.parametrize("estimator", ["neighbours", "bins"])
def test_samples_without_label_do_not_count(estimator):
    y = np.array([0, 1] * 200)
    x = y[:, None] + 0.3 * np.random.default_rng(3).standard_normal((400, 1))
    expected = information(x, y, estimator=estimator)
    more_x, more_y = np.concatenate([x, np.zeros((150, 1))]), np.concatenate([y, np.full(150, -1)])
    assert information(more_x, more_y, estimator=estimator) == pytest.approx(expected, abs=1e-2)


def test_a_seed_gives_the_same_estimate_and_a_sample_is_near_it():
    labels = draw_labels(1500, 4)
    factors = perfect_factors(labels, 4, noise=0.5)
    whole = factor_label_information(factors, labels, NAMES)
    assert whole == factor_label_information(factors, labels, NAMES)
    part = factor_label_information(factors, labels, NAMES, max_samples=700)
    assert part["samples"] == 700
    for factor, row in whole["nats"].items():
        assert part["nats"][factor] == pytest.approx(row, abs=0.15)


def test_gap_is_one_for_perfect_factors_and_zero_for_copies_and_noise():
    labels = draw_labels(1200, 5)
    perfect = perfect_factors(labels, 5)
    assert mig(perfect, labels, NAMES)["mig"] > 0.95
    copies = {"first": perfect["shape"], "second": perfect["shape"], "third": perfect["color"], "4": perfect["color"]}
    assert mig(copies, labels, NAMES)["mig"] < 0.02
    assert mig(noise_factors(labels, 5), labels, NAMES)["mig"] < 0.05
    assert mig(mixed_factors(labels, 5), labels, NAMES)["mig"] < 0.4


def test_gap_of_single_dimensions():
    labels = draw_labels(1200, 6)
    scalar = {"shape": labels[:, :1] + 0.0, "color": labels[:, 1:] + 0.0, "residual": np.ones((1200, 1))}
    assert mig(scalar, labels, NAMES, dimensions=True)["mig"] > 0.98
    # A concept spread over the dimensions of its factor has no single best one.
    assert mig(perfect_factors(labels, 6), labels, NAMES, dimensions=True)["mig"] < 0.7


def test_bins_are_for_one_dimension():
    with pytest.raises(ValueError, match="'f' has 2 dimensions, expected 1"):
        information(np.zeros((10, 2)), np.arange(10) % 2, estimator="bins")
    with pytest.raises(ValueError, match="estimator is 'kde'"):
        information(np.zeros((10, 2)), np.arange(10) % 2, estimator="kde")
