"""Which pairs a step learns from: labelled ones, ready ones, and latents of which nothing is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import Latents
from ..iin import LinearIIN, PairSampler, estimate_factor_dims
from ..iin.linear import LEAST_PAIRS, PAIRS_PER_ROW

__all__ = ["Batch", "Batches", "estimate_sizes", "fit_linear", "split_rows"]


class Batch(NamedTuple):
    """The pairs of a step, as rows of the latents."""

    a: Tensor  # [batch] int64
    b: Tensor  # [batch] int64
    shared: Tensor  # [batch, concepts] bool


class Batches:
    """A sequence of batches of pairs, in which batch k depends on the seed, k and its size alone.

    Labels: as :class:`iin_fast.PairSampler` draws them; missing ones make this semi-supervised training. Ready pairs: drawn
    evenly, with replacement. Neither: two latents that share nothing, drawn evenly.

    Args:
        latents: what is drawn from.
        rows: rows of ``latents.z`` that may be drawn (of pairs: of the first samples); by default all.
        concepts: some of ``latents.names``; by default all.
        seed: a non-negative integer.
        others, unlabelled: as for :class:`iin_fast.PairSampler`.
        lenient: leave out concepts that no pair shares, in place of raising; see :attr:`empty`.

    Raises:
        ValueError: an unknown concept, a concept that no pair shares, or of which all samples have one class.
    """

    def __init__(
        self,
        latents: Latents,
        rows: NDArray[np.int64] | None = None,
        concepts: Sequence[str] | None = None,
        *,
        seed: int = 0,
        others: str = "differ",
        unlabelled: float | None = None,
        lenient: bool = False,
    ) -> None:
        self.seed = seed
        self.concepts = latents.names if concepts is None else tuple(concepts)
        for name in self.concepts:
            if name not in latents.names:
                known = list(latents.names) or "none, as there are no labels"
                raise ValueError(f"train: factors names {name!r}, expected concepts of the latents: {known}")
        columns = [latents.names.index(name) for name in self.concepts]
        units = latents.n if latents.shared is None else len(latents.shared)
        self._rows = np.arange(units) if rows is None else rows
        self._shared = None if latents.shared is None else latents.shared[:, columns]
        self._sampler: PairSampler | None = None
        self.empty = False  # whether there is nothing to draw
        if latents.labels is None or not columns:
            return
        labels = latents.labels.numpy()[self._rows][:, columns]
        for name, column in zip(self.concepts, labels.T, strict=True):
            # Where some labels are unknown, one class sets its samples apart from these.
            if not lenient and column[0] >= 0 and (column == column[0]).all():
                raise ValueError(
                    f"train: concept {name!r} has only the class {column[0]} in all samples to train on, expected two "
                    "classes at least; leave it out of the labels, or give factors without it"
                )

        def sampler(weights: Sequence[float] | None) -> PairSampler:
            settings = {"weights": weights, "others": others, "unlabelled": unlabelled}
            return PairSampler(labels, seed=seed, names=self.concepts, **settings)  # type: ignore[arg-type]

        weights: list[float] | None = None
        if lenient:
            weights = []
            for k in range(len(columns)):
                try:
                    sampler([float(k == j) for j in range(len(columns))])
                    weights.append(1.0)
                except ValueError:
                    weights.append(0.0)
            self.empty = not any(weights)
        if not self.empty:
            self._sampler = sampler(weights)

    def draw(self, size: int, step: int) -> Batch:
        """``size`` pairs: number ``step`` of the sequence."""
        if self._sampler is not None:
            pairs = self._sampler.sample(size, step=step)
            rows = torch.from_numpy(self._rows)
            return Batch(rows[pairs.a], rows[pairs.b], pairs.shared)
        drawn = np.random.default_rng([self.seed, step]).integers(len(self._rows), size=(2, size))
        a, b = torch.from_numpy(self._rows[drawn])
        if self._shared is not None:
            return Batch(a, a + len(self._shared), self._shared[a])
        return Batch(a, b, torch.zeros(size, len(self.concepts), dtype=torch.bool))


def split_rows(latents: Latents, held_out: float, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of ``latents.z`` to train on, and a share ``held_out`` to leave alone, each in order.

    Of ready pairs, both samples of a pair go to the same side.
    """
    units = latents.n if latents.shared is None else latents.n // 2
    count = round(held_out * units)
    if count == units:
        raise ValueError(f"train: held_out is {held_out}, which leaves nothing of {units} to train on")
    order = np.random.default_rng([seed, 0, 2]).permutation(units)
    sides = np.sort(order[count:]), np.sort(order[:count])
    if latents.shared is None:
        return sides
    train, held = (np.concatenate([side, side + units]) for side in sides)
    return train, held


def units(latents: Latents, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """What :class:`Batches` draws from, of one side of :func:`split_rows`: the rows, or of pairs the first samples."""
    return rows if latents.shared is None else rows[: len(rows) // 2]


def fit_linear(
    latents: Latents,
    train: NDArray[np.int64],
    concepts: tuple[str, ...],
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    variance: float = 1.0,
) -> LinearIIN:
    """The linear IIN of the rows ``train`` of ``latents.z``; ``sizes`` of some concepts, the others estimated.

    It finds concepts in the leading directions alone that hold the share ``variance`` of what standardised features vary.
    """
    batches = Batches(latents, units(latents, train), concepts, seed=seed, others="any", unlabelled=0.0)
    if batches._shared is not None:  # every ready pair once
        half = len(train) // 2
        a, shared = torch.arange(half), torch.as_tensor(batches._shared)[torch.from_numpy(train[:half])]
        pairs = a, a + half, shared
    else:
        drawn = batches.draw(max(LEAST_PAIRS, PAIRS_PER_ROW * len(train)), 0)
        a, b = (torch.from_numpy(np.searchsorted(train, rows.numpy())) for rows in (drawn.a, drawn.b))
        pairs = a, b, drawn.shared
    return LinearIIN._fit("train", latents.z[torch.from_numpy(train)], *pairs, concepts, sizes or {}, variance)


def estimate_sizes(
    latents: Latents,
    batches: Batches,
    *,
    method: str = "published",
    n_pairs: int = 8192,
) -> dict[str, int]:
    """How many dimensions each concept asks for, and the residual, from ``n_pairs`` pairs of ``batches``.

    See :func:`iin_fast.estimate_factor_dims`, also for ``method``.

    Returns:
        concept to size, ``residual`` last; the sizes sum to ``latents.dim``, and may be 0.
    """
    if not batches.concepts:
        return {"residual": latents.dim}
    a, b, shared = batches.draw(n_pairs, 0)
    pair, factor = shared.nonzero(as_tuple=True)  # a pair that shares two concepts speaks for both
    za, zb = latents.z[a[pair]], latents.z[b[pair]]
    sizes = estimate_factor_dims(za, zb, factor, method, len(batches.concepts) + 1)  # type: ignore[arg-type]
    return dict(zip((*batches.concepts, "residual"), sizes, strict=True))
