"""The Fréchet distance on Gaussians whose distance is known, and of samples whose quality is known."""

import numpy as np
import pytest
import torch

from iin_fast import IIN
from iin_fast.evaluate import frechet_distance, sample_quality

random = np.random.default_rng(0)


def exact(x, y):
    """By the matrix square root of the definition."""
    from scipy.linalg import sqrtm

    a, b = np.cov(x.T), np.cov(y.T)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)


def test_it_is_that_of_the_definition():
    for n, m in ((300, 200), (4, 300)):  # also where covariances have no full rank
        x = random.standard_normal((n, 6)) @ random.standard_normal((6, 6))
        y = random.standard_normal((m, 6)) @ random.standard_normal((6, 6)) + 2
        assert frechet_distance(x, y) == pytest.approx(exact(x, y), rel=1e-5)
        assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    white = random.standard_normal((500, 3))
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(499)
    assert frechet_distance(white, 3 * white) == pytest.approx(3 * (3 - 1) ** 2)
    for x, y, message in (
        (white, white[:, :2], "shapes"),
        (white, white[:1], "two samples"),
        (white * np.nan, white, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_distance(x, y)


def test_features_tell_a_ring_from_a_gaussian():
    """Latents on a ring: a Gaussian has their covariance, and differs in the radius that a feature reads."""
    angle = random.uniform(0, 2 * np.pi, 4000)
    z = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * random.standard_normal((4000, 2))

    def radius(x):
        return torch.stack([x.norm(dim=1), x[:, 0]], 1)

    class Ring(IIN):
        def sample(self, n, generator=None, context=None):
            return torch.from_numpy(z[:n]).float()

    model = Ring(2, n_flows=1, hidden_dim=4)
    plain = sample_quality(model, z[2000:], z[:2000])
    assert plain["n"] == 2000 and max(plain["iin"], plain["gaussian"], plain["train"]) < 0.01
    found = sample_quality(model, z[2000:], z[:2000], decoder=lambda x: x.double(), features=radius, n=1500)
    assert found["n"] == 1500 and found["gaussian"] > 0.1 > 20 * found["iin"] and found["train"] < 0.005
