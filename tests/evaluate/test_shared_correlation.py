"""Ready pairs: how much they have in common in each factor, on pairs that were made with a known correlation."""

import json

import numpy as np
import pytest
import torch
from known_latents import rotation

import iin_fast
from iin_fast.evaluate import LinearFactors, evaluate_unlabelled, shared_correlation

RHO = 0.9
NAMES = ["shape", "color"]
SIZES = {"shape": 3, "color": 2}


def parts(z):
    return {"shape": z[:, :3], "color": z[:, 3:5], "residual": z[:, 5:]}


def ready_pairs(n, seed):
    """Factors [2 n, 10] of pairs that share the shape (even rows) or the color (odd rows), correlated by RHO there."""
    random = np.random.default_rng([seed, 7])
    a, b = random.standard_normal((2, n, 10))
    shared = np.arange(n)[:, None] % 2 == np.arange(2)
    own = np.concatenate([np.repeat(shared, (3, 2), axis=1), np.zeros((n, 5), dtype=bool)], axis=1)
    b = np.where(own, RHO * a + np.sqrt(1 - RHO**2) * b, b)
    return np.concatenate([a, b]), shared


def test_pairs_correlate_in_what_they_share_alone():
    z, shared = ready_pairs(4000, 0)
    found = shared_correlation(parts(z), shared, NAMES)
    for factor in ("shape", "color", "residual"):
        for name in NAMES:
            assert found["shared"][factor][name] == pytest.approx(RHO if factor == name else 0, abs=0.05)
            # Every pair that does not share the shape shares the color.
            other = factor in NAMES and factor != name
            assert found["apart"][factor][name] == pytest.approx(RHO if other else 0, abs=0.05)


def test_concepts_that_all_or_no_pairs_share_are_left_out():
    z, shared = ready_pairs(50, 0)
    shared[:, 0], shared[:, 1] = True, False
    found = shared_correlation(parts(z), shared, NAMES)
    assert set(found["shared"]["shape"]) == {"shape"} and set(found["apart"]["shape"]) == {"color"}


def test_linear_factors_of_pairs_find_the_dimensions_that_they_share():
    z, shared = ready_pairs(2000, 1)
    for kind, turned in (("raw", z), ("pca", (z * np.linspace(1, 3, 10)) @ rotation(10))):
        made = LinearFactors.of_pairs(turned, shared, NAMES, SIZES, kind)
        found = shared_correlation(made.encode(turned), shared, NAMES)["shared"]
        for name in NAMES:
            assert found[name][name] == pytest.approx(RHO, abs=0.05), kind
            assert abs(found["residual"][name]) < 0.05, kind


def test_evaluation_tells_the_network_that_made_the_latents_from_what_does_without():
    generator = torch.Generator().manual_seed(0)
    model = iin_fast.IIN(10, SIZES, n_flows=4, hidden_dim=16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # far from a line
    model(torch.randn(500, 10, generator=generator, dtype=torch.float64))
    (train, train_shared), (held, shared) = ready_pairs(1500, 2), ready_pairs(1000, 3)
    with torch.no_grad():
        train_z, z = (model.decode(torch.from_numpy(factors)) for factors in (train, held))
    options = {"shared": shared, "train_shared": train_shared, "names": NAMES, "rho": RHO, "source": "pairs", "seed": 4}
    found = evaluate_unlabelled(model, z, train_z, **options)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["pairs"]["n"], found["pairs"]["rho"], found["pairs"]["names"]) == (1000, RHO, NAMES)
    assert found["samples"] == {"scored": 2000, "learned_on": 3000, "source": "pairs"}
    for name in NAMES:
        own = {who: found["pairs"][who]["shared"][name][name] for who in ("iin", "pca", "raw")}
        assert own["iin"] == pytest.approx(RHO, abs=0.05)
        assert max(own["pca"], own["raw"]) < own["iin"] - 0.1
    assert found["likelihood"]["iin"] < found["likelihood"]["gaussian"]


def test_the_linear_iin_undoes_a_linear_mixture_of_ready_pairs():
    model = iin_fast.IIN(10, SIZES, n_flows=1, hidden_dim=8, generator=torch.Generator().manual_seed(0))
    (train, train_shared), (held, shared) = ready_pairs(3000, 2), ready_pairs(1000, 3)
    mixture = (np.random.default_rng(4).standard_normal((10, 10)) * np.logspace(-2, 2, 10)).astype(np.float32)
    z, train_z = (torch.from_numpy(x.astype(np.float32) @ mixture) for x in (held, train))
    with torch.no_grad():
        model(train_z)
    found = evaluate_unlabelled(
        model, z, train_z, shared=torch.from_numpy(shared), train_shared=torch.from_numpy(train_shared), names=NAMES
    )["pairs"]
    for name in NAMES:
        assert found["linear_iin"]["shared"][name][name] == pytest.approx(RHO, abs=0.05)
        assert abs(found["linear_iin"]["shared"]["residual"][name]) < 0.05
        assert max(found[who]["shared"][name][name] for who in ("pca", "raw")) < RHO - 0.1


def test_what_does_not_fit_is_refused():
    z, shared = ready_pairs(20, 0)
    with pytest.raises(TypeError, match="shared is int64, expected bool"):
        shared_correlation(parts(z), shared.astype(np.int64), NAMES)
    for wrong in (shared[:19], shared[:, :1]):
        with pytest.raises(ValueError, match=r"expected \[20, 2\], a row for each pair of the 40 samples"):
            shared_correlation(parts(z), wrong, NAMES)
    with pytest.raises(ValueError, match=r"expected \[19.5, 2\]"):
        shared_correlation(parts(z[:39]), shared[:19], NAMES)
    model = iin_fast.IIN(10, SIZES, n_flows=1, hidden_dim=8)
    with pytest.raises(ValueError, match="shared and train_shared are needed together"):
        evaluate_unlabelled(model, z, z, shared=shared)
