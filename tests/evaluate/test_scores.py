"""DCI, SAP, leaks and pair correlation, on perfect, mixed and meaningless factors."""

import numpy as np
import pytest
from known_latents import NAMES, draw_labels, mixed_factors, noise_factors, perfect_factors

from iin_fast.evaluate import dci, dci_from_importances, leak, pair_correlation, sap

KINDS = {"perfect": perfect_factors, "mixed": mixed_factors, "noise": noise_factors}


@pytest.fixture(scope="module")
def labels():
    return draw_labels(1000, 0), draw_labels(600, 1)


def split(kind, labels):
    train, test = labels
    return dict(train_factors=KINDS[kind](train, 0), train_labels=train), KINDS[kind](test, 1), test


def test_dci_of_known_importances():
    assert dci_from_importances([[1, 0], [0, 1], [0, 0]]) == {"disentanglement": 1.0, "completeness": 1.0}
    # One factor serves both concepts, each concept is served by one factor; and the other way round.
    both = dci_from_importances([[1, 1], [0, 0]])
    assert both == {"disentanglement": 0.0, "completeness": 1.0}
    assert dci_from_importances([[1, 0], [1, 0]]) == {"disentanglement": 1.0, "completeness": 0.0}
    # Weighted: a factor that hardly matters hardly counts.
    assert dci_from_importances([[1, 0], [0, 1], [1e-6, 1e-6]])["disentanglement"] > 0.999
    assert dci_from_importances([[3, 1], [1, 3]])["completeness"] == pytest.approx(1 - 0.8112781, abs=1e-6)
    with pytest.raises(ValueError, match="from 0, finite"):
        dci_from_importances([[1, -1]])


def test_dci_of_perfect_mixed_and_meaningless_factors(labels):
    scores = {}
    for kind in KINDS:
        train, factors, y = split(kind, labels)
        scores[kind] = dci(factors, y, NAMES, trees=20, **train)
    for name in ("disentanglement", "completeness", "informativeness"):
        assert scores["perfect"][name] > 0.95, name
        assert scores["noise"][name] < 0.15, name
    assert scores["mixed"]["disentanglement"] < 0.5 and scores["mixed"]["completeness"] < 0.5
    assert scores["mixed"]["informativeness"] > 0.6  # turned, but all there
    importances = scores["perfect"]["importances"]
    assert importances["shape"]["shape"] > 0.95 and importances["color"]["color"] > 0.95
    assert sum(row["shape"] for row in importances.values()) == pytest.approx(1)


def test_sap_of_perfect_mixed_copied_and_meaningless_factors(labels):
    train, factors, y = split("perfect", labels)
    assert sap(factors, y, NAMES, **train)["sap"] > 0.85  # the best reads all, the second best a little by chance
    copies = {"a": factors["shape"], "b": factors["shape"], "c": factors["color"], "d": factors["color"]}
    assert sap(copies, y, NAMES)["sap"] < 0.01
    train, factors, y = split("noise", labels)
    assert sap(factors, y, NAMES, **train)["sap"] < 0.1
    train, factors, y = split("mixed", labels)
    assert sap(factors, y, NAMES, **train)["sap"] < 0.6
    scalar = {"shape": y[:, :1] + 0.0, "color": y[:, 1:] + 0.0}
    found = sap(scalar, y, NAMES, dimensions=True)
    assert found["sap"] > 0.9 and "scores" not in found


def test_leak_is_small_in_perfect_factors_and_large_in_mixed_ones(labels):
    train, factors, y = split("perfect", labels)
    for row in leak(factors, y, NAMES, **train).values():
        assert row["linear"] < 0.1 and row["mlp"] < 0.15
        assert row["own"] > 0.99 and row["all"] > 0.99
    train, factors, y = split("mixed", labels)
    for row in leak(factors, y, NAMES, **train).values():
        assert row["linear"] > 0.6 and row["mlp"] > 0.6
        assert row["all"] > 0.99
    assert row["chance"] == 1 / 4


def test_a_folded_leak_is_found_by_the_network_alone():
    random = np.random.default_rng(7)
    x = random.standard_normal((1500, 2))
    y = (x[:, :1] * x[:, 1:] > 0).astype(int)  # the sign of a product: no line tells it
    found = leak({"residual": x}, y, ["sign"], seed=1)["sign"]
    assert found["linear"] < 0.15 and found["mlp"] > 0.8
    assert found["own"] == 0.5  # it has no factor of its own


def test_a_concept_without_samples_of_a_class_is_scored_evenly():
    """Balanced: always saying the frequent class is chance, not success."""
    random = np.random.default_rng(8)
    y = (random.random((800, 1)) < 0.05).astype(int)
    row = leak({"residual": random.standard_normal((800, 4))}, y, ["rare"])["rare"]
    assert abs(row["linear_accuracy"] - 0.5) < 0.2 and abs(row["mlp_accuracy"] - 0.5) < 0.2


def test_pairs_of_one_class_correlate_in_its_factor_alone():
    n, classes, rho = 4000, 4, 0.8
    random = np.random.default_rng(9)
    y = np.stack([random.integers(classes, size=n), random.choice(2, n, p=[0.9, 0.1])], axis=1)
    corners = np.eye(classes) - 1 / classes
    corners /= corners.std(0)
    own = np.sqrt(rho) * corners[y[:, 0]] + np.sqrt(1 - rho) * random.standard_normal((n, classes))
    factors = {"kind": own, "residual": random.standard_normal((n, 3))}
    found = pair_correlation(factors, y, ["kind", "other"])
    assert found["same"]["kind"]["kind"] == pytest.approx(rho, abs=0.03)
    assert found["different"]["kind"]["kind"] == pytest.approx(-rho / (classes - 1), abs=0.03)
    for kind in ("same", "different"):
        assert abs(found[kind]["residual"]["kind"]) < 0.03
        assert abs(found[kind]["kind"]["other"]) < 0.05


@pytest.mark.parametrize("metric", [dci, sap, leak])
def test_samples_without_label_do_not_count(metric, labels):
    train, factors, y = split("perfect", labels)
    lost = y.copy()
    lost[::3, 0] = -1
    wrong = {name: part.copy() for name, part in factors.items()}
    wrong["shape"][::3] = 50.0  # of samples whose shape nobody knows
    found = metric(wrong, lost, NAMES, **train)
    row = found["shape"] if metric is leak else found
    assert row["own" if metric is leak else "informativeness" if metric is dci else "sap"] > 0.8


@pytest.mark.parametrize("metric", [dci, sap, leak, pair_correlation])
def test_what_cannot_be_scored_is_refused_by_name(metric):
    x = {"f": np.random.default_rng(0).standard_normal((20, 2))}
    with pytest.raises(ValueError, match="'one' hold only the class 3, expected two classes"):
        metric(x, np.full((20, 1), 3), ["one"])
    with pytest.raises(ValueError, match="'none' hold no label"):
        metric(x, np.full((20, 1), -1), ["none"])
    with pytest.raises(ValueError, match="the value -2"):
        metric(x, np.full((20, 1), -2), ["y"])
    with pytest.raises(ValueError, match=r"shape \[20, 1\], expected \[20, 2\]"):
        metric(x, np.zeros((20, 1), dtype=int), ["y", "x"])
    with pytest.raises(TypeError, match="float64, expected integers"):
        metric(x, np.zeros((20, 1)), ["y"])
    with pytest.raises(ValueError, match="NaN or Inf"):
        metric({"f": np.full((20, 1), np.nan)}, np.arange(20)[:, None] % 2, ["y"])


def test_one_of_train_factors_and_labels_is_refused():
    x, y = {"f": np.zeros((20, 2))}, np.arange(20)[:, None] % 2
    with pytest.raises(ValueError, match="needed together"):
        leak(x, y, ["y"], train_factors=x)
    with pytest.raises(ValueError, match=r"train_factors has sizes \{'f': 3\}"):
        leak(x, y, ["y"], train_factors={"f": np.zeros((20, 3))}, train_labels=y)
