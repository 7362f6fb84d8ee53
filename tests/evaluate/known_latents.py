"""Latents whose metrics are known: perfect factors, their mixture, and noise."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

NAMES = ["shape", "color"]


def draw_labels(n, seed):
    """Two independent concepts of three and four classes, of unequal counts: ``[n, 2]``."""
    random = np.random.default_rng(seed)
    return np.stack([random.choice(3, n, p=[0.6, 0.3, 0.1]), random.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])], axis=1)


def perfect_factors(labels, seed, noise=0.05):
    """Every class a corner of a simplex, in the factor of its concept; and a residual of noise."""
    random = np.random.default_rng([seed, 1])
    parts = {
        name: np.eye(size)[labels[:, k]] + noise * random.standard_normal((len(labels), size))
        for k, (name, size) in enumerate(zip(NAMES, (3, 4), strict=True))
    }
    return {**parts, "residual": random.standard_normal((len(labels), 3))}


def rotation(dim, seed=0):
    return np.linalg.qr(np.random.default_rng([seed, 2]).standard_normal((dim, dim)))[0]


def joined(factors):
    return np.concatenate(list(factors.values()), axis=1)


def cut(z):
    """Ten dimensions as factors of the sizes of the perfect ones."""
    return {"shape": z[:, :3], "color": z[:, 3:7], "residual": z[:, 7:]}


def mixed_factors(labels, seed):
    """The perfect factors turned against each other: each dimension holds a bit of everything."""
    return cut(joined(perfect_factors(labels, seed)) @ rotation(10))


def noise_factors(labels, seed):
    return cut(np.random.default_rng([seed, 3]).standard_normal((len(labels), 10)))
