"""How many dimensions each factor needs, estimated from pairs."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import checked_latents, to_numpy
from ..checks import checked_int

__all__ = ["estimate_factor_dims"]


def estimate_factor_dims(
    za: Tensor | ArrayLike,  # [n, dim]
    zb: Tensor | ArrayLike,  # [n, dim]
    factor: Tensor | ArrayLike,  # [n]
    method: Literal["paper", "published"] = "paper",
    n_factors: int | None = None,
) -> list[int]:
    r"""Creates the factor sizes ``[N_0, …, N_K]`` that pairs of latents ask for; the residual is last.

    .. math::
        s_F = \sum_i \frac{\mathrm{Cov}(z^a_i, z^b_i \mid F)}
                          {\sqrt{\mathrm{Var}(z^a_i \mid F) \mathrm{Var}(z^b_i \mid F)}}, \quad
        s_\text{residual} = N, \quad N_F = \lfloor \mathrm{softmax}(s)_F \, N \rfloor

    over the pairs that share factor F, with N = ``dim``; what rounding leaves goes to the residual. This is
    ``method="paper"``. ``method="published"`` is what the authors' code computes: the covariance summed over all
    features, over the variance (of all samples) summed over all features, and 1 for the residual. These scores lie
    in [-1, 1], so the sizes come out even. The paper's lie in [-N, N], so a factor that is correlated in part of the
    features gets few dimensions or 0, which IIN refuses: take ``"published"`` there.

    A feature that does not vary has correlation 0.

    Args:
        za: latents of the first samples, ``[n, dim]``, real numbers.
        zb: latents of the second samples, like ``za``.
        factor: the factor that pair i shares, ``[n]`` integers from 0 to ``n_factors - 2``.
        method: ``"paper"`` or ``"published"``.
        n_factors: number of factors, the residual included; by default the largest in ``factor`` plus 2.

    Returns:
        ``n_factors`` integers that sum to ``dim``.

    Raises:
        TypeError: integer or complex latents, ``factor`` that is not an integer array.
        ValueError: shapes that don't match, NaN or Inf, a code out of range, a factor without pairs, unknown method.

    References:
        Esser, Rombach, Ommer, CVPR 2020, "Estimating Dimensionality of Factors"; CompVis/iin, ``dim_callback``.

    Example:
        >>> from iin_fast import estimate_factor_dims
        >>> rng = np.random.default_rng(0)
        >>> za, zb = rng.standard_normal((2, 1000, 10))
        >>> factor = np.arange(1000) % 2
        >>> za[factor == 0, :5] = zb[factor == 0, :5]  # a factor that 5 features carry, and one that none does
        >>> estimate_factor_dims(za, zb, factor, method="published")
        [3, 1, 6]
    """
    where = "estimate_factor_dims"
    a, b = checked_latents(where, "za", za), checked_latents(where, "zb", zb)
    if a.shape != b.shape:
        raise ValueError(f"{where}: zb has shape {list(b.shape)}, expected {list(a.shape)} like za")
    codes = to_numpy(factor)
    if codes.dtype.kind not in "iu":
        raise TypeError(f"{where}: factor is {codes.dtype}, expected integers")
    n, dim = a.shape
    if codes.shape != (n,):
        raise ValueError(f"{where}: factor has shape {list(codes.shape)}, expected [{n}], one per pair")
    if n_factors is None:
        n_named = int(codes.max()) + 1
    else:
        n_named = checked_int(where, "n_factors", n_factors) - 1
    if codes.min() < 0 or codes.max() >= n_named:
        raise ValueError(
            f"{where}: factor has values from {codes.min()} to {codes.max()}, expected 0 to {n_named - 1} "
            f"(n_factors = {n_named + 1}, the residual included)"
        )
    if method not in ("paper", "published"):
        raise ValueError(f"{where}: method is {method!r}, expected 'paper' or 'published'")

    lacking = np.setdiff1d(np.arange(min(n_named, n + 1)), codes)  # n pairs show n factors at most
    if len(lacking):
        raise ValueError(
            f"{where}: factor has no pair with the value {lacking[0]}, expected at least one for each factor"
        )
    exponent = -np.frexp(max(np.abs(a).max(), np.abs(b).max()))[1]
    a, b = np.ldexp(a, exponent), np.ldexp(b, exponent)  # exact, and squares neither overflow nor vanish
    everything = np.concatenate([a, b])
    total_variance = everything.var(0).sum()
    scores = np.zeros(n_named + 1)
    for k in range(n_named):
        pairs = codes == k
        ak, bk = a[pairs], b[pairs]
        if method == "paper":
            ak, bk = ak - ak.mean(0), bk - bk.mean(0)
            spread = np.sqrt((ak * ak).mean(0)) * np.sqrt((bk * bk).mean(0))
            scores[k] = _ratio((ak * bk).mean(0), spread).sum()
        else:
            mean = (ak.mean(0) + bk.mean(0)) / 2
            scores[k] = _ratio(((ak - mean) * (bk - mean)).mean(0).sum(), total_variance)
    scores[-1] = dim if method == "paper" else 1.0

    weights = np.exp(scores - scores.max())
    dims = [int(share * dim) for share in weights / weights.sum()]
    dims[-1] = dim - sum(dims[:-1])
    return dims


def _ratio(covariance: ArrayLike, variance: ArrayLike) -> NDArray[np.float64]:
    """covariance / variance, and 0 where nothing varies."""
    variance = np.asarray(variance, dtype=np.float64)
    ratio = np.zeros_like(variance)
    np.divide(covariance, variance, out=ratio, where=variance > 0)
    return ratio
