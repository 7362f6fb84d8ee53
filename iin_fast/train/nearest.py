"""Swapped latents as the nearest real ones are labelled: no point off the data can seem right."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import MISSING

__all__ = ["NearestLatents"]

MOST_NEAR = 5
MOST_ROWS = 5000


class NearestLatents:
    """Reads what swaps give by the labels of the nearest real latents.

    The majority of the nearest ones decides, of as many as there are with what the swap should give, but five at most: where each
    combination of classes is there once, the nearest one. Where there is none, nothing is said.

    Distances are Euclidean, of features as they are or of standardised ones. Those are taken by which ``held_out`` rows are read better
    from the others.

    Args:
        z: latents, ``[n, dim]``.
        labels: of all concepts, ``[n, concepts]``, -1 where unknown. Such rows are not compared with.
        held_out: rows.
        seed: of the rows that are compared with, where there are more than 5,000.
    """

    def __init__(self, z: Tensor, labels: Tensor, held_out: NDArray[np.int64], seed: int = 0) -> None:
        known = (labels != MISSING).all(1).nonzero()[:, 0]
        rows = known[torch.from_numpy(np.random.default_rng([seed, 4]).permutation(len(known))[:MOST_ROWS])]
        z, self.labels = z[rows].double(), labels[rows]
        if not len(rows):
            return
        self.mean, deviation = z.mean(0), z.std(0, correction=0)
        common = deviation.square().mean().sqrt().expand_as(deviation)
        unseen = torch.from_numpy(np.isin(rows.numpy(), held_out))

        def reads(scale: Tensor) -> float:
            x = self._seen(z, scale)
            distance = torch.cdist(x[unseen], x)
            distance[:, unseen] = torch.inf
            votes = self._votes(distance, torch.full((len(distance),), MOST_NEAR))
            return (votes == self.labels[unseen]).double().mean().nan_to_num().item()

        scales = common, torch.where(deviation > 0, deviation, torch.inf)
        self.scale = max(scales, key=reads) if unseen.any() else scales[1]
        self.x = self._seen(z, self.scale)

    def _seen(self, z: Tensor, scale: Tensor) -> Tensor:
        return ((z.double() - self.mean) / scale).float().nan_to_num().clamp(-1e6, 1e6)

    def _votes(self, distance: Tensor, count: Tensor) -> Tensor:
        """The class that most of the ``count`` nearest latents have, ``[n, concepts]``; of a tie that of the nearer ones."""
        near = min(MOST_NEAR, distance.shape[1])
        rows = distance.topk(near, 1, largest=False).indices
        weights = (torch.arange(near) < count[:, None]) * (1 - torch.arange(near) / 100)
        found = []
        for column in self.labels.T:
            votes = torch.zeros(len(rows), int(column.max()) + 1).scatter_add_(1, column[rows], weights)
            found.append(votes.argmax(1))
        return torch.stack(found, 1)

    def __call__(self, z: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Whether ``z`` ``[n, dim]`` is read as the classes ``wanted`` ``[n, concepts]``, and whether anything is said: bool ``[n]``."""
        if not len(self.labels):
            return (nothing := torch.zeros(len(z), dtype=torch.bool)), nothing
        place = torch.cat([self.labels, wanted]).unique(dim=0, return_inverse=True)[1]
        rows, swaps = place.split([len(self.labels), len(wanted)])
        count = rows.bincount(minlength=int(place.max()) + 1)[swaps]
        right = self._votes(torch.cdist(self._seen(z, self.scale), self.x), count) == wanted
        return right.all(1) & (count > 0), count > 0
