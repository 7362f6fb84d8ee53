"""How near samples of an IIN come to held-out ones, by the Fréchet distance, beside samples of a Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import checked_latents, to_numpy
from ..checks import checked_seed
from ..iin import IIN

__all__ = ["frechet_distance", "sample_quality"]


def frechet_distance(a: Tensor | ArrayLike, b: Tensor | ArrayLike) -> float:
    r"""Takes the Fréchet distance between two sets of features, as if both were Gaussian.

    .. math:: d^2 = \lVert \mu_a - \mu_b \rVert^2 + \mathrm{tr}\bigl(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2}\bigr)

    Range: 0 (same mean and covariance) up, in squared units of the features. With Inception features of pictures this is the FID.

    Args:
        a, b: features ``[n, dim]`` and ``[m, dim]``, real numbers.

    Raises:
        TypeError, ValueError: features that are none, of two sizes, or of a single sample.

    References:
        Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((500, 4))
        >>> round(frechet_distance(x, x + 1), 6)
        4.0
    """
    where = "frechet_distance"
    x, y = checked_latents(where, "a", a), checked_latents(where, "b", b)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"{where}: a and b have shapes {list(x.shape)} and {list(y.shape)}, expected [n, dim] and [m, dim], two samples at least"
        )
    # tr (AB)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2).
    roots = []
    for part in (x, y):
        centred = (part - part.mean(0)) / np.sqrt(len(part) - 1)
        roots.append(np.linalg.svd(centred, full_matrices=False)[1:])
    (s, u), (t, v) = roots
    cross = np.linalg.svd((s[:, None] * u) @ (t[:, None] * v).T, compute_uv=False).sum()
    squared = ((x.mean(0) - y.mean(0)) ** 2).sum() + (s**2).sum() + (t**2).sum() - 2 * cross
    return max(0.0, float(squared))


@torch.no_grad()
def sample_quality(
    model: IIN,
    z: Tensor | ArrayLike,  # [n, dim]
    train_z: Tensor | ArrayLike,  # [m, dim]
    *,
    decoder: Callable[[Tensor], Any] | None = None,
    features: Callable[[Any], Any] | None = None,
    context: Tensor | None = None,
    n: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Takes the Fréchet distance of samples from held-out latents, in features of what they decode to.

    A Gaussian of the training latents has their mean and covariance, which is all that this distance sees: in the latents
    themselves it is near the best there is. Decode, and read features of what comes out (a layer of the model's own encoder),
    to see how samples differ.

    Args:
        model: the IIN.
        z: held-out latents.
        train_z: what the Gaussian is fitted to.
        decoder: latents ``[n, dim]`` (a tensor) to samples.
        features: these samples, or latents without a decoder, to ``[n, features]``.
        context: of ``z``, for a conditional model; its samples have that of random rows.
        n: most samples of each kind.
        seed: of all draws.

    Returns:
        distance from held-out latents of ``iin`` and ``gaussian`` samples and of ``train``, real ones that it learned on: what
        good samples come near. ``n`` is how many there are of each.

    Raises:
        TypeError, ValueError: latents that don't fit the model, features that are none.
    """
    where = "sample_quality"
    held, learned = checked_latents(where, "z", z), checked_latents(where, "train_z", train_z)
    random = np.random.default_rng(checked_seed(where, seed))
    n = min(n, len(held), len(learned))
    rows = random.permutation(len(held))[:n]
    mean, covariance = learned.mean(0), np.cov(learned.T, bias=True)
    generator = torch.Generator().manual_seed(seed)
    kinds: dict[str, Tensor | NDArray[np.float64]] = {
        "held_out": held[rows],
        "iin": model.sample(
            n, generator, context=None if context is None else context[random.integers(len(held), size=n)]
        ),
        "gaussian": random.multivariate_normal(mean, covariance, n, method="eigh"),
        "train": learned[random.permutation(len(learned))[:n]],
    }

    def read(part: Tensor | NDArray[np.float64]) -> NDArray[np.float64]:
        shown: Any = torch.as_tensor(to_numpy(part)).to(model.device, model.dtype)
        if decoder is not None:
            shown = decoder(shown)
        found = to_numpy(shown if features is None else features(shown))
        return found.reshape(len(found), -1).astype(np.float64)

    seen = {kind: read(part) for kind, part in kinds.items()}
    reference = seen.pop("held_out")
    return {kind: frechet_distance(reference, part) for kind, part in seen.items()} | {"n": n}
