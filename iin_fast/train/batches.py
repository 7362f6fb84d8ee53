"""Which pairs a step learns from: labelled ones, ready ones, and latents of which nothing is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..iin import PairSampler, estimate_factor_dims
from ..latents import MISSING, Latents

__all__ = ["Batch", "Batches", "estimate_sizes", "split_rows"]


class Batch(NamedTuple):
    """The pairs of a step, as rows of the latents."""

    a: Tensor  # [batch] int64
    b: Tensor  # [batch] int64
    shared: Tensor  # [batch, concepts] bool


class Batches:
    """A sequence of batches of pairs, in which batch k depends on the seed, k and its size alone.

    - Labels: pairs share one concept, as :class:`iin_fast.PairSampler` draws them. A missing label counts as a class of
      its own: such a sample takes part in the pairs of the concepts that are known of it. Samples of which no label is
      known come as pairs that share nothing, which makes their loss the plain likelihood, in as large a part of the batch
      as they have in the data: this is semi-supervised training.
    - Ready pairs: drawn evenly, with replacement.
    - No labels: all pairs share nothing.

    Args:
        latents: what is drawn from.
        rows: rows of ``latents.z`` that may be drawn (of pairs: of the first samples); by default all.
        concepts: some of ``latents.names``; by default all.
        seed: a non-negative integer.
        others: as for :class:`iin_fast.PairSampler`.
        lenient: leave out concepts that no pair shares, in place of raising.

    Raises:
        ValueError: an unknown concept, a concept that no pair shares.
    """

    def __init__(
        self,
        latents: Latents,
        rows: NDArray[np.int64] | None = None,
        concepts: Sequence[str] | None = None,
        *,
        seed: int = 0,
        others: str = "differ",
        lenient: bool = False,
    ) -> None:
        self.seed = seed
        self.concepts = latents.names if concepts is None else tuple(concepts)
        for name in self.concepts:
            if name not in latents.names:
                known = list(latents.names) or "none, as there are no labels"
                raise ValueError(f"train: factors names {name!r}, expected concepts of the latents: {known}")
        columns = [latents.names.index(name) for name in self.concepts]
        self._sampler: PairSampler | None = None
        self._pairs: NDArray[np.int64] | None = None
        self._free = np.empty(0, dtype=np.int64)
        if latents.shared is not None:
            count = len(latents.shared)
            self._pairs = np.arange(count) if rows is None else rows
            self._offset, self._shared = count, latents.shared[:, columns]
            return
        rows = np.arange(latents.n) if rows is None else rows
        if not columns or latents.labels is None:
            self._free = rows
            return
        labels = latents.labels.numpy()[rows][:, columns]
        known = (labels != MISSING).any(1)
        self._labelled, self._free = rows[known], rows[~known]
        self._share = len(self._free) / len(rows)
        weights = np.ones(len(columns))
        if lenient:
            for k in range(len(columns)):
                alone = np.zeros(len(columns))
                alone[k] = 1
                weights[k] = self._try(labels[known], alone, others)
        if known.any() and weights.any():
            self._sampler = PairSampler(
                _missing_apart(labels[known]), seed=seed, names=self.concepts, weights=weights.tolist(), others=others
            )
        elif not lenient:
            raise ValueError("train: labels are all missing (-1); leave them out to train without labels")
        else:
            self._free = np.empty(0, dtype=np.int64)

    def _try(self, labels: NDArray[np.int64], weights: NDArray[np.float64], others: str) -> bool:
        if len(labels) == 0:
            return False
        try:
            PairSampler(_missing_apart(labels), names=self.concepts, weights=weights.tolist(), others=others)
        except ValueError:
            return False
        return True

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return self._sampler is None and self._pairs is None and len(self._free) == 0

    def draw(self, size: int, step: int) -> Batch:
        """``size`` pairs: number ``step`` of the sequence."""
        random = np.random.default_rng([self.seed, step, 1])
        if self._pairs is not None:
            drawn = self._pairs[random.integers(len(self._pairs), size=size)]
            a, b = torch.from_numpy(drawn), torch.from_numpy(drawn + self._offset)
            return Batch(a, b, self._shared[a])
        free = 0
        if self._sampler is None:
            free = size
        elif len(self._free):
            free = min(size - 1, max(1, round(self._share * size)))
        alone = torch.from_numpy(self._free[random.integers(max(1, len(self._free)), size=(2, free))])
        nothing = torch.zeros(free, len(self.concepts), dtype=torch.bool)
        if self._sampler is None:
            return Batch(alone[0], alone[1], nothing)
        pairs = self._sampler.sample(size - free, step=step)
        labelled = torch.from_numpy(self._labelled)
        return Batch(
            torch.cat([labelled[pairs.a], alone[0]]),
            torch.cat([labelled[pairs.b], alone[1]]),
            torch.cat([pairs.shared, nothing]),
        )


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


def _missing_apart(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels ``[n, concepts]`` in which every missing one is a class of its own."""
    apart = np.empty_like(labels)
    for k in range(labels.shape[1]):
        codes = np.unique(labels[:, k], return_inverse=True)[1].astype(np.int64)
        missing = labels[:, k] == MISSING
        codes[missing] = len(labels) + np.arange(missing.sum())
        apart[:, k] = codes
    return apart
