"""What does without training: raw dimensions, principal components, the linear IIN, and a shift by class means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import MISSING, checked_latents
from ..iin import LinearIIN, PairSampler
from ..iin.factors import RESIDUAL
from ._data import Array, Codes, checked_labels, subset
from .correlation import shared_correlation
from .information import _in_bins, label_entropy

__all__ = ["LinearFactors", "LinearRival", "MeanShift"]


class LinearFactors:
    r"""Creates factors of a latent by a fixed rotation: the baseline of a network that was never trained.

    .. math:: \tilde z = R^\top (z - \mu)

    with R = 1 (``kind="raw"``) or the principal components of the training latents (``kind="pca"``). Each concept gets
    as many dimensions as it has in ``sizes``: those that tell most about it on the training data (mutual information
    in 20 bins, over the label's entropy), the strongest claims first; what is left over is ``residual``.

    Args:
        z: training latents ``[n, dim]``.
        labels: ``[n, concepts]``, -1 where unknown.
        names: of the concepts.
        sizes: name to dimensions; ``residual`` and names that are no concept share what is left.
        kind: ``"raw"`` or ``"pca"``.
        seed: of the samples that information is measured on.

    References:
        Hotelling, Analysis of a Complex of Statistical Variables into Principal Components, 1933.
    """

    def __init__(
        self,
        z: Tensor | ArrayLike,
        labels: Tensor | ArrayLike,
        names: Sequence[str],
        sizes: Mapping[str, int],
        kind: Literal["raw", "pca"],
        seed: int = 0,
    ) -> None:
        where = "LinearFactors"
        x = checked_latents(where, "z", z)
        codes = checked_labels(where, labels, names, len(x))
        wanted = self._turn(where, x, names, sizes, kind)
        dim = x.shape[1]
        rows = subset(len(x), 5000, seed)
        values = (x[rows] - self.mean) @ self.rotation
        claims = []
        for name in wanted:
            column = codes[rows, list(names).index(name)]
            entropy = label_entropy(column)
            claims += [(_in_bins(values[:, i], column, 20) / entropy if entropy else 0.0, -i, name) for i in range(dim)]
        self._share_out(claims, wanted, dim)

    @classmethod
    def of_pairs(
        cls,
        z: Tensor | ArrayLike,  # [2 × pairs, dim]
        shared: Tensor | ArrayLike,  # [pairs, concepts]
        names: Sequence[str],
        sizes: Mapping[str, int],
        kind: Literal["raw", "pca"],
    ) -> LinearFactors:
        """The same of ready pairs: each concept gets the dimensions whose correlation over pairs that share it is furthest
        above that over pairs that do not.

        Args:
            z: training latents, the first samples of all pairs, then the second ones.
            shared: bool, what pair i has in common.
            names, sizes, kind: as for :class:`LinearFactors`.
        """
        where = "LinearFactors.of_pairs"
        x = checked_latents(where, "z", z)
        made = cls.__new__(cls)
        wanted = made._turn(where, x, names, sizes, kind)
        values = (x - made.mean) @ made.rotation
        found = shared_correlation({str(i): values[:, [i]] for i in range(x.shape[1])}, shared, names)
        claims = [
            (found["shared"][str(i)].get(name, 0.0) - found["apart"][str(i)].get(name, 0.0), -i, name)
            for name in wanted
            for i in range(x.shape[1])
        ]
        made._share_out(claims, wanted, x.shape[1])
        return made

    def _turn(self, where: str, x: Array, names: Sequence[str], sizes: Mapping[str, int], kind: str) -> dict[str, int]:
        """Sets mean and rotation; gives the sizes of the concepts."""
        if kind not in ("raw", "pca"):
            raise ValueError(f"{where}: kind is {kind!r}, expected 'raw' or 'pca'")
        dim = x.shape[1]
        if kind == "pca":
            self.mean = x.mean(0)
            self.rotation = np.linalg.eigh(np.cov(x.T).reshape(dim, dim))[1][:, ::-1]  # [dim, components]
        else:
            self.mean, self.rotation = np.zeros(dim), np.eye(dim)
        wanted = {name: size for name, size in sizes.items() if name in names}
        if sum(wanted.values()) > dim:
            raise ValueError(f"{where}: sizes {wanted} sum to more than the {dim} dimensions of z")
        return wanted

    def _share_out(self, claims: list[tuple[float, int, str]], wanted: Mapping[str, int], dim: int) -> None:
        """Gives each concept its dimensions, by claims (strength, -dimension, concept)."""
        taken: dict[str, list[int]] = {name: [] for name in wanted}
        free = set(range(dim))
        for _, minus, name in sorted(claims, reverse=True):
            if -minus in free and len(taken[name]) < wanted[name]:
                taken[name].append(-minus)
                free.remove(-minus)
        self.dimensions = {name: sorted(of) for name, of in taken.items()}
        if free:
            self.dimensions[RESIDUAL] = sorted(free)

    def encode(self, z: Array) -> dict[str, Array]:
        """Name to ``[n, size]``."""
        values = (z - self.mean) @ self.rotation
        return {name: values[:, of] for name, of in self.dimensions.items()}

    def swap(self, z: Array, donor: Array, factor: str) -> Array:
        """``z`` with the factor of ``donor``."""
        of = self.rotation[:, self.dimensions[factor]]
        changed: Array = z + (donor - z) @ of @ of.T
        return changed


class LinearRival:
    """The :class:`iin_fast.LinearIIN` of training latents, as a baseline: it learns from pairs alone, like the IIN.

    It chooses its sizes itself. A concept of which no pair is known is left out, and its swaps change nothing.
    """

    def __init__(self, model: LinearIIN) -> None:
        self.model = model

    @classmethod
    def of(cls, z: Array, codes: Codes, names: Sequence[str], concepts: Sequence[str]) -> LinearRival | None:
        """Of latents ``[n, dim]`` and labels ``[n, names]``, for ``concepts``; None where no two rows share one of them."""
        columns = {name: codes[:, list(names).index(name)] for name in concepts}
        paired = {n: c for n, c in columns.items() if (c >= 0).any() and np.bincount(c[c >= 0]).max() > 1}
        if not paired:
            return None
        return cls(LinearIIN.fit(torch.from_numpy(z), PairSampler(paired, others="any")))

    @classmethod
    def of_pairs(
        cls, z: Array, shared: NDArray[np.generic], names: Sequence[str], concepts: Sequence[str]
    ) -> LinearRival | None:
        """Of ready pairs ``[2 × pairs, dim]``, first samples and then second ones, which share ``[pairs, names]``."""
        paired = [name for name in concepts if name in names and shared[:, list(names).index(name)].any()]
        if not paired:
            return None
        za, zb = torch.from_numpy(z).chunk(2)
        mask = torch.from_numpy(shared[:, [list(names).index(name) for name in paired]])
        return cls(LinearIIN.fit_pairs(za, zb, mask, paired))

    def encode(self, z: Array) -> dict[str, Array]:
        """Name to ``[n, size]``."""
        return {name: part.numpy() for name, part in self.model.encode(torch.from_numpy(z)).items()}

    def swap(self, z: Array, donor: Array, factor: str) -> Array:
        """``z`` with the factor of ``donor``."""
        if factor not in self.model.sizes:
            return z
        changed: Array = self.model.swap(torch.from_numpy(z), torch.from_numpy(donor), factor).numpy()
        return changed


class MeanShift:
    r"""Creates swaps by a shift along class means, which knows the classes of both samples.

    .. math:: z' = z + \mu_{y(\text{donor})} - \mu_{y(z)}

    with the means of the training latents of each class.

    Args:
        z: training latents ``[n, dim]``.
        labels: ``[n, concepts]``, -1 where unknown.
        names: of the concepts.

    References:
        Larsen, Sønderby, Larochelle, Winther, Autoencoding beyond Pixels Using a Learned Similarity Metric, ICML 2016
        (visual attribute vectors).
    """

    def __init__(self, z: Tensor | ArrayLike, labels: Tensor | ArrayLike, names: Sequence[str]) -> None:
        x = checked_latents("MeanShift", "z", z)
        codes = checked_labels("MeanShift", labels, names, len(x))
        self.means: dict[str, Array] = {}
        for j, name in enumerate(names):
            column = codes[:, j]
            table = np.tile(x.mean(0), (int(column.max()) + 1, 1))  # a class without samples does not move
            for label in np.unique(column[column != MISSING]):
                table[label] = x[column == label].mean(0)
            self.means[name] = table

    def swap(self, z: Array, own: Codes, given: Codes, concept: str) -> Array:
        """``z`` ``[n, dim]`` of classes ``own`` ``[n]``, moved to classes ``given`` ``[n]``."""
        means = self.means[concept]
        changed: Array = z + means[np.minimum(given, len(means) - 1)] - means[np.minimum(own, len(means) - 1)]
        return changed
