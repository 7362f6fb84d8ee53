"""Which model's swaps of held-out latents are best: small networks and the nearest latents say what they give."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import MISSING, Latents
from ..iin import IIN, Inputs
from ..iin.linear import leading_directions
from .nearest import NearestLatents

__all__ = ["SwapJudge"]

HIDDEN, STEPS, BATCH, RATE, DECAY, NOISE = 64, 400, 256, 3e-3, 1e-2, 0.2
SWAPS = 2000  # of each concept
NETWORKS = 5 / 6  # of the score
MARGIN, GAIN = 1.2, 0.005
READ, NOT_READ = 0.5, 0.2
RIDGE = 0.01  # of the covariance of standardised features
VARIANCES = 0.975, 0.99, 0.999  # shares
LESS = 0.005  # that may be read of a concept in the directions that hold such a share
MOST_REPEATS = 8  # of a row that keeps the rest, with another donor each time


class SwapJudge:
    """Says of a model how often swaps of held-out latents change one concept and keep the others.

    One network for each concept learns it on the training rows. Networks read anything into a point off the data, so the nearest
    latents have a say, too: see :class:`NearestLatents`. What is swapped with what is drawn once, so that models can be
    compared swap by swap. The class of a donor is drawn evenly among the other classes, as :func:`iin_fast.evaluate.swap_success`
    does.

    Args:
        latents: with labels.
        train, held_out: rows.
        concepts: some of ``latents.names``.
        context: of all rows, ``[n, context_dim]``.
        seed: of networks and draws.
    """

    def __init__(
        self,
        latents: Latents,
        train: NDArray[np.int64],
        held_out: NDArray[np.int64],
        concepts: tuple[str, ...],
        context: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        assert latents.labels is not None
        self.z, self.context = latents.z, context
        self.train = torch.from_numpy(train)
        columns = {name: latents.labels[:, latents.names.index(name)] for name in concepts}
        # Concepts of which the training rows say nothing can't be read.
        self.labels = {
            name: _dense(column) for name, column in columns.items() if (column[self.train] != MISSING).any()
        }
        self.inputs = Inputs.of(self.z[self.train])
        random = np.random.default_rng([seed, 3])
        self.keepers: dict[str, Tensor] = {}
        self.donors: dict[str, Tensor] = {}
        for name, column in self.labels.items():
            rows = held_out[column.numpy()[held_out] != MISSING]
            classes, place = np.unique(column.numpy()[rows], return_inverse=True)
            if len(classes) < 2:
                continue
            repeats = min(MOST_REPEATS, max(1, SWAPS // len(rows)))
            order = np.concatenate([random.permutation(len(rows)) for _ in range(repeats)])[:SWAPS]
            given = (place[order] + random.integers(1, len(classes), size=len(order))) % len(classes)
            groups = [np.flatnonzero(place == k) for k in range(len(classes))]
            donor = np.array([random.choice(groups[k]) for k in given])
            self.keepers[name], self.donors[name] = torch.from_numpy(rows[order]), torch.from_numpy(rows[donor])
        self.networks = {name: self._learned(name, seed) for name in self.labels}
        if self.keepers:
            labels = torch.stack(list(self.labels.values()), 1)
            self.nearest = NearestLatents(self.z, labels, held_out, seed)

    def hidden(self) -> tuple[str, ...]:
        """Concepts that the networks read from held-out rows, and class means in white coordinates do not.

        Reading is balanced accuracy, rescaled so that chance is 0.
        """
        found = []
        for name, keepers in self.keepers.items():
            x, y = self._known(name, self.train)
            unseen, truth = self._known(name, keepers.unique())
            classes = y.unique()
            if len(classes) < 2:
                continue
            means = torch.stack([x[y == k].mean(0) for k in classes]).double()
            centre = means.mean(0)
            spread = x.double().T.cov() + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
            directions = torch.linalg.solve(spread, (means - centre).T)
            by_means = unseen.double() @ directions - ((means + centre) / 2 * directions.T).sum(1)
            answers = classes[by_means.argmax(1)], self.networks[name](unseen).argmax(1)
            linear, network = (_balanced(answer, truth, len(classes)) for answer in answers)
            if linear < NOT_READ and network > READ:
                found.append(name)
        return tuple(found)

    def enough_variance(self) -> float:
        """The least of some shares of the variance whose leading directions hold every concept, as networks read held-out rows."""
        x = self._seen(self.z[self.train]).double()
        for share in VARIANCES:
            directions, least = leading_directions(x, share)[1:]
            leading = directions[:, least:].float()
            enough = True
            for name, keepers in self.keepers.items():
                unseen, truth = self._known(name, keepers.unique())
                classes = int(self.labels[name].max()) + 1
                whole, part = (
                    _balanced(self.networks[name](seen).argmax(1), truth, classes)
                    for seen in (unseen, unseen @ leading @ leading.T)
                )
                enough &= part >= whole - LESS
            if enough:
                return share
        return 1.0

    def _known(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What networks see of those rows that have a label, and the labels."""
        column = self.labels[name]
        rows = rows[column[rows] != MISSING]
        return self._seen(self.z[rows]), column[rows]

    def _learned(self, name: str, seed: int) -> nn.Module:
        x, y = self._known(name, self.train)
        generator = torch.Generator().manual_seed(seed)
        # Every class is drawn as often.
        weights = 1.0 / torch.bincount(y)[y].double()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, int(y.max()) + 1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
        for _ in range(STEPS):
            drawn = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
            noise = NOISE * torch.randn(BATCH, x.shape[1], generator=generator)
            loss = nn.functional.cross_entropy(network(x[drawn] + noise), y[drawn])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return network.requires_grad_(False)

    def _seen(self, z: Tensor) -> Tensor:
        return self.inputs(z)[0].float().nan_to_num().clamp(-1e3, 1e3)

    @torch.no_grad()
    def __call__(self, model: IIN) -> Tensor:
        """Success of each swap, 0 to 1, those of all concepts one after the other: ``[swaps]`` float32.

        Five sixths are what the networks say, one sixth what the nearest latents do.
        """
        found = []
        for name, keepers in self.keepers.items():
            donors = self.donors[name]
            rows = [self.z[keepers], self.z[donors]]
            context: list[Tensor | None] = [None, None]
            if self.context is not None:
                context = [self.context[keepers], self.context[donors]]
            z, donor, own, other = (None if x is None else x.to(model.device, model.dtype) for x in (*rows, *context))
            swapped = model.swap(z, donor, name, context=own, donor_context=other).cpu().to(self.z.dtype)  # type: ignore[arg-type]
            x = self._seen(swapped)
            good = torch.ones(len(x), dtype=torch.bool)
            wanted = torch.stack(
                [column[donors if other == name else keepers] for other, column in self.labels.items()], 1
            )
            for network, expected in zip(self.networks.values(), wanted.T, strict=True):
                good &= (network(x).argmax(1) == expected) | (expected == MISSING)
            near, said = self.nearest(swapped, wanted)
            found.append(torch.where(said, NETWORKS * good + (1 - NETWORKS) * near, good.float()))
        return torch.cat(found)

    def better(self, ours: Tensor, theirs: Tensor) -> bool:
        """Whether swaps succeed more often than others do, by more than ``GAIN``, and ``MARGIN`` standard errors of the difference.

        Swaps that keep the rest of one row count as one observation: they are not independent.
        """
        rows = torch.cat(list(self.keepers.values()))
        row, count = rows.unique(return_inverse=True, return_counts=True)[1:]
        sums = torch.zeros(len(count), dtype=torch.float64).index_add(0, row, (ours - theirs).double())
        difference = sums.sum() / len(rows)
        error = (
            (sums - difference * count).square().sum().sqrt() / len(rows) * (len(count) / max(1, len(count) - 1)) ** 0.5
        )
        return bool(difference > max(GAIN, MARGIN * error))


def _dense(labels: Tensor) -> Tensor:
    """Classes renumbered from 0 without gaps; -1 stays."""
    known = labels != MISSING
    found = torch.full_like(labels, MISSING)
    found[known] = labels[known].unique(return_inverse=True)[1]
    return found


def _balanced(answer: Tensor, truth: Tensor, classes: int) -> float:
    """Share of right answers, every class counting alike, rescaled so that chance is 0 and all right is 1."""
    right = torch.stack([(answer[truth == k] == k).double().mean() for k in truth.unique()]).mean().item()
    return (right - 1 / classes) / (1 - 1 / classes)
