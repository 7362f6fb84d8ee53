"""Factor dimensions: the published code's answers, the paper's formula, and input that is no good."""

from pathlib import Path

import numpy as np
import pytest
import torch

from iin_fast.iin import estimate_factor_dims

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["dims", "dims4"])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published(name, convert, dtype):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        za, zb = (convert(golden[key].astype(dtype)) for key in ("za", "zb"))
        factor, expected, n_factors = convert(golden["factor"]), golden["dims"].tolist(), int(golden["n_factors"])
    assert estimate_factor_dims(za, zb, factor, method="published", n_factors=n_factors) == expected
    assert estimate_factor_dims(za, zb, factor, method="published") == expected


def pairs(shares: list[int], n: int = 4000, dim: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard normal pairs of latents that are equal in the first ``shares[k]`` features if they share factor k."""
    za, zb = np.random.default_rng(0).standard_normal((2, n, dim))
    factor = np.arange(n) % len(shares)
    for k, size in enumerate(shares):
        za[factor == k, :size] = zb[factor == k, :size]
    return za, zb, factor


def test_paper_is_its_formula():
    shares, dim = [12, 11], 12
    za, zb, factor = pairs(shares)
    scores = []
    for k in range(2):
        a, b = za[factor == k], zb[factor == k]
        scores.append(sum(np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(dim)))
    share = np.exp([*scores, dim])
    share /= share.sum()
    expected = [int(share[0] * dim), int(share[1] * dim)]
    dims = estimate_factor_dims(za, zb, factor)
    assert dims == [*expected, dim - sum(expected)]
    assert dims[0] >= dims[1] > 0


@pytest.mark.parametrize("method", ["paper", "published"])
def test_properties(method):
    za, zb, factor = pairs([12, 12, 12])
    dims = estimate_factor_dims(za, zb, factor, method)
    assert sum(dims) == 12 and all(type(d) is int for d in dims)
    assert estimate_factor_dims(zb, za, factor, method) == dims
    assert estimate_factor_dims(za, zb, np.array([2, 0, 1])[factor], method) == [dims[k] for k in (1, 2, 0)] + dims[3:]
    order = np.random.default_rng(1).permutation(len(za))
    assert estimate_factor_dims(za[order], zb[order], factor[order], method) == dims


def test_scale_of_features_matters_to_published_only():
    za, zb, factor = pairs([12, 6])
    scale = np.where(np.arange(12) < 6, 100.0, 1.0)
    assert estimate_factor_dims(za * scale, zb * scale, factor) == estimate_factor_dims(za, zb, factor)
    scaled = estimate_factor_dims(za * scale, zb * scale, factor, "published")
    assert scaled[1] > estimate_factor_dims(za, zb, factor, "published")[1]


@pytest.mark.parametrize("method", ["paper", "published"])
@pytest.mark.parametrize("unit", [1e-200, 1e300])
def test_any_unit(method, unit):
    za, zb, factor = pairs([12, 6])
    assert estimate_factor_dims(za * unit, zb * unit, factor, method) == estimate_factor_dims(za, zb, factor, method)


@pytest.mark.parametrize("method", ["paper", "published"])
@pytest.mark.parametrize("constant", [slice(0, 3), slice(None)], ids=["some", "all"])
def test_features_that_do_not_vary(method, constant):
    za, zb, factor = pairs([10, 9])
    za[:, constant] = zb[:, constant] = 0.1
    with np.errstate(all="raise"):
        dims = estimate_factor_dims(za, zb, factor, method)
    assert sum(dims) == 12 and min(dims) >= 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(za=np.zeros((4, 3), int)), TypeError, "za is int64, expected real floating"),
        (dict(zb=np.zeros((4, 3), complex)), TypeError, "zb is complex128"),
        (dict(za=torch.zeros(4, 3, dtype=torch.complex64)), TypeError, "za is complex64"),
        (dict(za=np.zeros(4)), ValueError, r"za has shape \[4\], expected \[n, dim\]"),
        (dict(za=np.zeros((0, 3))), ValueError, r"za has shape \[0, 3\]"),
        (dict(zb=np.zeros((4, 2))), ValueError, r"zb has shape \[4, 2\], expected \[4, 3\] like za"),
        (dict(za=np.full((4, 3), np.nan)), ValueError, "za has NaN or Inf"),
        (dict(zb=torch.full((4, 3), torch.inf)), ValueError, "zb has NaN or Inf"),
        (dict(factor=np.zeros(4)), TypeError, "factor is float64, expected integers"),
        (dict(factor=np.zeros(3, int)), ValueError, r"factor has shape \[3\], expected \[4\]"),
        (dict(factor=np.array([0, 1, 2, 0]), n_factors=3), ValueError, "values from 0 to 2, expected 0 to 1"),
        (dict(factor=np.array([0, 1, -1, 0])), ValueError, "values from -1 to 1, expected 0 to 1"),
        (dict(factor=np.array([0, 0, 2, 2])), ValueError, "no pair with the value 1"),
        (dict(factor=np.array([0, 0, 2, 10**12])), ValueError, "no pair with the value 1"),
        (dict(n_factors=4), ValueError, "no pair with the value 2"),
        (dict(n_factors=0), ValueError, "n_factors is 0"),
        (dict(n_factors=2.0), TypeError, "n_factors is 2.0"),
        (dict(method="mine"), ValueError, "method is 'mine', expected 'paper' or 'published'"),
    ],
)
def test_bad_input(change, error, message):
    good = dict(za=np.zeros((4, 3)), zb=np.zeros((4, 3)), factor=np.array([0, 0, 1, 1]))
    with pytest.raises(error, match=message):
        estimate_factor_dims(**{**good, **change})
