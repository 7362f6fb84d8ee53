"""The IIN that is a linear map: whitening, then the directions that pairs have in common. No training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_device, check_dtype, check_floating, check_kind, check_rank, check_shape, checked_int
from .factors import RESIDUAL, factor_sizes
from .inputs import Inputs, LinearMap
from .model import IIN
from .pairs import PairSampler

__all__ = ["LinearIIN"]

PAIRS_PER_ROW, LEAST_PAIRS = 10, 100_000  # every row meets several partners, few rows meet all of theirs
SHRINKAGES = [0.0, *(10 ** (-k / 4) for k in range(24, -1, -1))]
ENOUGH = 0.005  # nats per dimension that shrinkage has to save
NULL_VARIANCE = 1e-9  # of a standardised direction; below it lies what is a combination of other features
ROTATIONS = 100


class LinearIIN(IIN):
    r"""Creates the IIN that is a linear map, in closed form from pairs: seconds, no training, no options.

    .. math:: \tilde z = (U_1, \dots, U_K, U_\text{residual})^\top w, \quad w = \Sigma^{-1/2} (z - \mu)

    Σ is the covariance of z, shrunk towards its diagonal where rows are few, so that w has covariance 1. Over pairs
    that share factor F, w has the covariance :math:`\mathrm{E}[w^a w^{b\top} \mid F]`. What sharing F adds to it is M_F,
    by least squares over all pairs, which may share several factors:

    .. math:: \mathrm{sym}(w^a w^{b\top}) \approx M_0 + \sum_F m_F M_F, \quad m_F = 1 \text{ if factor F is shared}

    The loss of the IIN asks for :math:`U_F^\top M_F U_F = \rho` in the factor of F and 0 elsewhere. Its linear solution
    is a set of orthogonal subspaces, found together so that none overlap:

    .. math:: \max_{U^\top U = 1} \sum_F \mathrm{tr}(U_F^\top M_F U_F)

    Within a factor, dimensions stand by falling shared covariance. Features that are constant or copies of others are set
    aside (:class:`iin_fast.iin.Inputs`). The directions in which z is a combination of other features go into the residual
    as they are: they come back, and no swap of another factor touches them. Scaling a feature changes nothing.

    Made by :meth:`fit` from a sampler of pairs, or by :meth:`fit_pairs` from ready pairs. All methods are those of
    :class:`IIN`; :meth:`IIN.load` opens what :meth:`save` wrote. Where concepts add up, it is as good as a trained network.

    References:
        Esser, Rombach, Ommer, A Disentangling Invertible Interpretation Network, CVPR 2020, Sec. 3.2 (σ_ab, the loss).
        Friedman, Regularized Discriminant Analysis, J. American Statistical Association 84, 1989 (shrinkage by held-out rows).

    Example:
        >>> from iin_fast import LinearIIN, PairSampler
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = {"digit": torch.arange(900) % 3, "color": torch.arange(900) // 3 % 2}
        >>> means = torch.randn(5, 8, generator=generator)  # of three digits and two colors
        >>> z = means[labels["digit"]] + means[3 + labels["color"]] + 0.01 * torch.randn(900, 8, generator=generator)
        >>> model = LinearIIN.fit(z, PairSampler(labels, others="any"))
        >>> model.sizes
        {'digit': 2, 'color': 1, 'residual': 5}
        >>> swapped = model.swap(z[:1], z[4:5], "digit")  # digit 0 in color 0, with the digit 1 of the other
        >>> torch.allclose(swapped, means[1] + means[3], atol=0.1)
        True
    """

    def __init__(self, inputs: Inputs, matrix: Tensor, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.dim, self.context_dim, self.coupling = inputs.dim, 0, "linear"
        self._sizes = factor_sizes(self.dim, sizes, where="LinearIIN")
        self._set_inputs("LinearIIN", inputs, None, dtype)
        self.flow = LinearMap(matrix, dtype)  # type: ignore[assignment]
        self._flat = 0  # columns of the matrix, the last ones, that give what varies little or not; known after a fit

    @classmethod
    def fit(
        cls,
        z: Tensor,  # [n, dim]
        sampler: PairSampler,
        sizes: Mapping[str, int] | None = None,
        *,
        n_pairs: int | None = None,
    ) -> LinearIIN:
        """The linear IIN of latents and a sampler of pairs of them.

        Args:
            z: latents, ``[n, dim]``.
            sampler: draws pairs of rows of ``z``; its first pairs are taken, and it stays where it is. Best with
                ``others="any"``, which compares most pairs.
            sizes: name to dimensions, for all concepts or for some of them; by default as many for each as pairs that
                share it have in common beyond chance.
            n_pairs: how many to draw; by default ten for each row, 100,000 at least.

        Raises:
            TypeError, ValueError: latents that are not finite ``[n, dim]``, a sampler of other rows, sizes that don't fit.
        """
        where = "LinearIIN.fit"
        _check(where, "z", z)
        if not isinstance(sampler, PairSampler):
            kind = type(sampler).__name__
            raise TypeError(f"{where}: sampler is a {kind}, expected a PairSampler; ready pairs go to fit_pairs")
        rows = len(sampler._codes)
        if rows != len(z):
            raise ValueError(f"{where}: sampler draws from {rows} rows, expected {len(z)} like z")
        n_pairs = max(LEAST_PAIRS, PAIRS_PER_ROW * rows) if n_pairs is None else checked_int(where, "n_pairs", n_pairs)
        pairs = sampler.sample(n_pairs, step=0)
        return cls._fit(where, z, pairs.a, pairs.b, pairs.shared, sampler.names, sizes)

    @classmethod
    def fit_pairs(
        cls,
        za: Tensor,  # [n, dim]
        zb: Tensor,  # [n, dim]
        shared: Tensor,  # [n, names] bool
        names: Sequence[str],
        sizes: Mapping[str, int] | None = None,
    ) -> LinearIIN:
        """The linear IIN of ready pairs.

        Args:
            za: latents of the first samples, ``[n, dim]``.
            zb: latents of the second samples, like ``za``.
            shared: bool, what pair i has in common.
            names: of the columns of ``shared``.
            sizes: as for :meth:`fit`.

        Raises:
            TypeError, ValueError: latents that are not finite ``[n, dim]`` or don't match, ``shared`` or sizes that don't
                fit, a concept that no pair shares.
        """
        where = "LinearIIN.fit_pairs"
        _check(where, "za", za)
        _check(where, "zb", zb)
        check_shape(where, "zb", zb, za.shape, "like za")
        check_dtype(where, "zb", zb, za.dtype, "like za")
        check_device(where, "zb", zb, za, "za")
        names = tuple(names)
        if not names or len(set(names)) < len(names) or RESIDUAL in names:
            raise ValueError(f"{where}: names is {list(names)}, expected different ones, none of them {RESIDUAL!r}")
        check_kind(where, "shared", shared, torch.bool, "a bool tensor [n, names]")
        check_shape(where, "shared", shared, (len(za), len(names)), "([pairs, names])")
        a = torch.arange(len(za))
        return cls._fit(where, torch.cat([za, zb]), a, a + len(za), shared, names, sizes)

    @classmethod
    @torch.no_grad()
    def _fit(
        cls,
        where: str,
        z: Tensor,  # [rows, dim]
        a: Tensor,  # [n] rows of the first samples
        b: Tensor,  # [n]
        shared: Tensor,  # [n, names]
        names: Sequence[str],
        sizes: Mapping[str, int] | None,
        variance: float = 1.0,
    ) -> LinearIIN:
        a, b, shared = (part.to(z.device) for part in (a, b, shared))
        dim = z.shape[1]
        wanted: dict[str, int | None] = {name: None for name in names}
        if sizes is not None:
            given = {name: size for name, size in factor_sizes(dim, sizes, where=where).items() if name != RESIDUAL}
            unknown = [name for name in given if name not in names]
            if unknown:
                raise ValueError(f"{where}: sizes names {unknown}, expected some of {list(names)}")
            wanted.update(given)
            if RESIDUAL in sizes:
                wanted = {name: given[name] for name in names if name in given}
        for name in wanted:
            if not shared[:, list(names).index(name)].any():
                raise ValueError(f"{where}: no pair shares {name!r}, expected some; leave it out")

        inputs = Inputs.of(z)
        x = inputs(z.double())[0]
        whitening = _Whitening(x, variance)
        w = whitening.rows(x)  # [rows, rank]
        weights = _contrast(shared)[:, [list(names).index(name) for name in wanted]]
        common = _in_common(w, a, b, weights)
        values, vectors = torch.linalg.eigh(common)
        counts = _counts(wanted, values, w, a, b, weights, where, inputs.live)
        fitted = _fitting(counts, w.shape[1])
        basis = _subspaces(common, values, vectors, list(fitted.values()))
        matrix = whitening.matrix(basis, list(fitted.values()), list(counts.values()))
        made = cls(inputs, matrix, counts, z.dtype)
        made._flat = len(matrix) - max(len(basis), sum(counts.values()))
        return made

    def start(self) -> Inputs:
        """This map as what stands before a flow: an IIN with it whose flow is the identity has the factors of this model.

        What varies little or not bypasses the flow, as far as no factor wants it.
        """
        assert self.inputs is not None
        return self.inputs.turned(self.flow.matrix, self._flat)  # type: ignore[arg-type]

    @property
    def like(self) -> Tensor:
        """One of the buffers: there are no parameters."""
        return self.flow.matrix  # type: ignore[return-value]

    @property
    def config(self) -> dict[str, Any]:
        """What :meth:`load` needs, as plain values: ``dim``, ``factors``, ``coupling``, ``left_out``, ``dtype``."""
        assert self.inputs is not None
        kind = str(self.dtype).removeprefix("torch.")
        left_out = self.inputs.left_out
        return {"dim": self.dim, "factors": self.sizes, "coupling": "linear", "left_out": left_out, "dtype": kind}

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None, memory: str = "auto"
    ) -> LinearIIN:
        """As :meth:`IIN.load`, of a linear model alone."""
        model = IIN.load(path, device=device, memory=memory)
        if not isinstance(model, LinearIIN):
            raise ValueError(
                f"{os.fspath(path)}: a model with {model.coupling} couplings, expected a linear one; IIN.load opens it"
            )
        return model

    @classmethod
    def _of_config(cls, config: Mapping[str, Any], dtype: torch.dtype) -> LinearIIN:
        """A model that a state is loaded into."""
        return cls(config["inputs"], torch.eye(config["inputs"].live), config["factors"], dtype)


@torch.no_grad()
def white_inputs(z: Tensor, variance: float = 1.0) -> Inputs:
    """Inputs that make latents ``[n, dim]`` white: the linear start where there are no pairs to learn factors from."""
    inputs = Inputs.of(z)
    whitening = _Whitening(inputs(z.double())[0], variance)
    rank = len(whitening.gain)
    varying = torch.eye(rank, dtype=torch.float64, device=z.device)
    return inputs.turned(whitening.matrix(varying, [], []), inputs.live - rank)


def leading_directions(x: Tensor, share: float) -> tuple[Tensor, Tensor, int]:
    """Variances ``[dim]`` of standardised rows ``[n, dim]``, rising; their directions; and where those begin that hold ``share``."""
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    least = int((variance <= NULL_VARIANCE).sum())
    if share < 1:
        spare = variance.clamp(min=0).cumsum(0) <= (1 - share) * variance.sum()
        least = max(least, min(int(spare.sum()), len(variance) - 1))
    return variance, directions, least


class _Whitening:
    """What makes standardised latents ``x`` ``[n, dim]`` white: a turn, and a scale of each direction that varies.

    ``rows`` gives the leading directions alone, which hold ``share`` of the variance.
    """

    def __init__(self, x: Tensor, share: float = 1.0) -> None:
        shrinkage = _shrinkage(x)
        variance, directions, least = leading_directions(x, share)
        gain = torch.where(variance > NULL_VARIANCE, (1 - shrinkage) * variance + shrinkage, 1.0).rsqrt()
        self.directions, self.gain = directions[:, least:], gain[least:]
        self.rest = (directions * gain)[:, :least].flip(1)

    def rows(self, x: Tensor) -> Tensor:
        """w of latents, ``[n, rank]``."""
        return x @ self.directions * self.gain

    def matrix(self, basis: Tensor, fitted: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """From standardised features to factors, ``[dim, dim]``.

        Args:
            basis: of w, ``[rank, rank]``: for each factor ``fitted`` columns, then the residual.
            fitted, wanted: dimensions that each factor has in ``basis``, and in all. It gets the others from the directions
                in which little varies; the residual gets what is left of these.
        """
        columns = torch.cat([self.directions * self.gain @ basis, self.rest], 1)
        dim, rank = columns.shape[1], len(basis)
        largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
        columns = columns * largest.sign()  # a direction has no sign of its own
        order, first, spare = [], 0, rank
        for own, all_ in zip(fitted, wanted, strict=True):
            order += [*range(first, first + own), *range(spare, spare + all_ - own)]
            first, spare = first + own, spare + all_ - own
        return columns[:, [*order, *range(first, rank), *range(spare, dim)]]


def _shrinkage(x: Tensor) -> float:
    """Share of the identity in the covariance (1 - s) C + s of standardised rows ``[n, dim]``, 0 to 1.

    It is the one with which each half of the rows is likeliest under the Gaussian of the other half. Many rows need none,
    also where some directions vary little; with fewer rows than features it decides how white what was not seen becomes.
    """
    if len(x) < 4:
        return 1.0
    x = torch.unique(x, dim=0)  # a row in several pairs tells nothing new about itself
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    halves = [x[rows].T @ x[rows] / max(1, len(rows)) for rows in order.chunk(2)]
    if len(halves) < 2:
        return 1.0
    shares = torch.tensor(SHRINKAGES, dtype=x.dtype, device=x.device)
    cost = torch.zeros_like(shares)
    for own, other in (halves, halves[::-1]):
        variance, directions = torch.linalg.eigh(own)
        seen = (directions * (other @ directions)).sum(0)
        varies = torch.maximum(variance, seen) > NULL_VARIANCE
        variance, seen = variance[varies].clamp(min=0), seen[varies]
        shrunk = (1 - shares[:, None]) * variance + shares[:, None] + torch.finfo(x.dtype).tiny
        cost += 0.5 * (shrunk.log() + seen / shrunk).sum(1)
    # The least share that is as good: whitening that is none to speak of in some directions would not keep factors apart.
    return SHRINKAGES[int((cost <= cost.min() + 2 * ENOUGH * x.shape[1]).int().argmax())]


def _contrast(shared: Tensor) -> Tensor:
    """Weights ``[n, names]`` of pairs, whose weighted sums are least-squares coefficients of ``shared`` ``[n, names]``.

    With an intercept, unless ``shared`` holds one already: where each pair shares one concept, M_F is a plain mean.
    """
    design = shared.double()
    with_one = torch.cat([design, torch.ones_like(design[:, :1])], 1)
    gram = with_one.T @ with_one
    if torch.linalg.matrix_rank(gram, hermitian=True) == len(gram):
        design = with_one
    solved = design @ torch.linalg.pinv(design.T @ design, hermitian=True)
    return solved[:, : shared.shape[1]]


def _in_common(w: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Symmetric matrices M_F ``[names, rank, rank]`` of pairs of the rows ``a`` and ``b`` of ``w``.

    Products are float32: what rounding adds is far below what drawing other pairs changes.
    """
    rows, found = w.float(), []
    for weight in weights.T.float():
        size = (len(w), len(w))
        pairs = torch.sparse_coo_tensor(torch.stack([a, b]), weight, size, check_invariants=False)
        product = (rows.T @ torch.sparse.mm(pairs, rows)).double()
        found.append((product + product.T) / 2)
    return torch.stack(found)


def _counts(
    wanted: Mapping[str, int | None],
    values: Tensor,  # [names, rank], eigenvalues of M_F
    w: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    where: str,
    dim: int,
) -> dict[str, int]:
    """Dimensions of each factor: those wanted, or as many as have more in common than pairs of rows that were exchanged."""
    open_ = [k for k, size in enumerate(wanted.values()) if size is None]
    counts = {name: size or 1 for name, size in wanted.items()}
    if sum(counts.values()) > dim:
        raise ValueError(f"{where}: sizes {counts} sum to more than the {dim} features of z that vary")
    if open_:
        exchanged = torch.randperm(len(w), generator=torch.Generator().manual_seed(0)).to(b.device)
        chance = _in_common(w, a, exchanged[b], weights[:, open_])
        for k, by_chance in zip(open_, chance, strict=True):
            counts[list(wanted)[k]] = max(1, int((values[k] > _spectral_norm(by_chance)).sum()))
    return _fitting(counts, dim, [list(wanted)[k] for k in open_])


def _spectral_norm(symmetric: Tensor) -> float:
    """The largest size of an eigenvalue, by subspace iteration: much faster than all eigenvalues, and near enough."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(symmetric), 8, dtype=symmetric.dtype, generator=generator).to(symmetric.device)
    for _ in range(30):
        block = symmetric @ torch.linalg.qr(block).Q
    return float(torch.linalg.matrix_norm(block, 2))


def _fitting(counts: Mapping[str, int], most: int, among: Sequence[str] | None = None) -> dict[str, int]:
    """``counts`` that sum to ``most`` or less: the largest ones become smaller, ``among`` these."""
    fitted = dict(counts)
    for _ in range(sum(fitted.values()) - most):
        largest = max(among or fitted, key=lambda name: fitted[name])
        fitted[largest] -= 1
    return fitted


def _subspaces(common: Tensor, values: Tensor, vectors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Orthonormal ``[rank, rank]``: for each M_F its columns, which together maximise Σ tr(U_F' M_F U_F); then the rest.

    Each turn replaces U by the orthonormal matrix nearest to [A_1 U_1, …], where A_F is M_F made positive by one multiple of
    the identity for all. The sum never falls: it is convex in U, and U maximises the tangent at its predecessor.
    """
    lift = max(0.0, -float(values.min()))
    rank = common.shape[1]
    parts = [top[:, rank - size :] for top, size in zip(vectors, sizes, strict=True)]
    basis, best = _nearest_orthonormal(torch.cat(parts, 1)), -torch.inf
    for _ in range(ROTATIONS):
        parts = list(basis.split(list(sizes), 1))
        moved = [own @ part for own, part in zip(common, parts, strict=True)]
        reached = float(sum((part * move).sum() for part, move in zip(parts, moved, strict=True)))
        if reached <= best + 1e-9 * abs(best):
            break
        best = reached
        basis = _nearest_orthonormal(torch.cat(moved, 1) + lift * basis)
    turned = []
    for own, part in zip(common, basis.split(list(sizes), 1), strict=True):
        turned.append(part @ torch.linalg.eigh(part.T @ own @ part).eigenvectors.flip(1))
    named = torch.cat(turned, 1)
    rest = torch.linalg.qr(named, mode="complete").Q[:, named.shape[1] :]
    return torch.cat([named, rest], 1)


def _nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The matrix ``[rank, size]`` with orthonormal columns that is nearest to ``matrix``."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _check(where: str, name: str, z: Tensor) -> None:
    """Refuse what is no finite latents ``[n, dim]``."""
    check_floating(where, name, z)
    check_rank(where, name, z, "latents [n, dim]", 2)
    if len(z) < 2 or z.shape[1] == 0:
        raise ValueError(f"{where}: {name} has shape {list(z.shape)}, expected [n, dim] with two rows at least")
    if not torch.isfinite(z).all():
        raise ValueError(f"{where}: {name} has NaN or Inf, expected finite numbers")
