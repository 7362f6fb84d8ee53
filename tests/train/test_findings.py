"""What is said of latents before a training, on latents that have it."""

import numpy as np
import pytest
import torch

from iin_fast import concept_pairs
from iin_fast.data import Latents
from iin_fast.train import inspect_latents


def draw(n=500, dim=12, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_said_of_good_latents(latents):
    found = inspect_latents(latents)
    assert found.lines() == [] and found.rank == found.live == 8
    assert (
        found.constant == found.almost_constant == found.badly_scaled == []
        and found.copies == found.few == found.examples == {}
    )


def test_features_are_named():
    z = draw()
    z[:, [1, 5]] = 0.1
    z[:, 7] = z[:, 2]
    z[:, 3], z[:3, 3] = -4.0, torch.tensor([1.0, 2.0, 3.0])
    z[:, 8] *= 1e4
    z[:, 9] *= 1e-4
    z[:, 11] = z[:, 0] - z[:, 2]
    found = inspect_latents(Latents.of(z))
    assert found.constant == [1, 5] and found.copies == {7: 2} and found.almost_constant == [3]
    assert found.badly_scaled == [8, 9]
    assert (found.live, found.rank) == (9, 8)
    constant, copies, almost, scales, rank = found.lines()
    assert constant.startswith("2 of 12 features (1, 5) are constant; ")
    assert (
        copies == "1 of 12 features (7) is equal to others; standardised inputs, the default, set such features aside"
    )
    assert almost == "1 of 12 features (3) is constant in 99% of the rows or more"
    assert scales.startswith("2 of 12 features (8, 9) are 100 times wider or narrower than most")
    assert "vary in 8 of 9 directions (some features are combinations of others)" in rank


def test_outliers_are_named():
    z = draw()
    z[[3, 70], 5], z[3, 8] = torch.tensor([1e4, -1e4]), 1e30
    (line,) = inspect_latents(Latents.of(z)).lines()
    assert line.startswith(
        "outliers in 2 of 500 rows (3, 70) and 2 of 12 features (5, 8), over 10 times as far from the "
    )


def test_few_rows_and_small_classes_are_named():
    labels = np.zeros((40, 2), dtype=np.int64)
    labels[:, 0] = np.arange(40) % 2
    labels[:13, 1] = range(1, 14)
    labels[39, 1] = -1
    found = inspect_latents(Latents.of(draw(40, 60), labels, ["digit", "color"]))
    assert found.few == {"color": dict.fromkeys(range(1, 14), 1)} and found.rank <= 40
    rank, few, *examples = found.lines()
    assert found.examples == {"digit": 40, "color": 39} and len(examples) == 2
    assert "(fewer rows than features)" in rank
    assert few.startswith("concept 'color': classes with fewer than 10 rows: 1 (1), 2 (1),") and few.endswith(
        "and 5 more"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_that_do_not_vary_at_all(dtype):
    found = inspect_latents(Latents.of(torch.ones(5, 3, dtype=dtype)))
    assert found.constant == [0, 1, 2] and found.rank == found.live == 0


def test_few_rows_in_few_features():
    (line,) = inspect_latents(Latents.of(draw(99, 4))).lines()
    assert line.startswith("99 rows are few")
    assert inspect_latents(Latents.of(draw(100, 4))).lines() == []


def test_few_examples_are_as_well_served_without_a_training():
    z = draw(300)
    pairs = concept_pairs(z[:8], z[8:16], z[16:], n=600, name="nine")
    found = inspect_latents(Latents.of_pairs(pairs.za, pairs.zb, shared=pairs.shared, names=pairs.names))
    assert found.examples == {"nine": 16}
    (line,) = found.lines()
    assert line.startswith("concept 'nine' is said by 16 different latents, which a flow overfits: a linear answer")

    pairs = concept_pairs(z[:100], z[100:200], z[200:], n=600, name="nine")
    assert not inspect_latents(Latents.of_pairs(pairs.za, pairs.zb, shared=pairs.shared, names=pairs.names)).lines()
    labels = np.full((300, 2), -1)
    labels[:49, 0], labels[:50, 1] = np.arange(49) % 2, np.arange(50) % 2
    assert inspect_latents(Latents.of(z, labels, ["digit", "color"])).examples == {"digit": 49}
