"""Pairs of samples that share a concept."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import MISSING, dense, to_numpy
from ..checks import checked_int, checked_seed
from ..files import check_name

__all__ = ["PairBatches", "PairSampler", "Pairs"]

# Draws per pair before the partners are listed. Acceptance is (1 - 1/values) per other concept for even labels, so two
# or three concepts are done in a few rounds; lists serve the rest.
_ROUNDS = 16
# Cells that these lists may hold in all, before they are made anew each time: 32 MB.
_LISTED = 2**21


class Pairs(NamedTuple):
    """A batch of pairs: rows of the labelled data set, and what each pair shares."""

    a: Tensor  # [batch] int64, row of the first sample
    b: Tensor  # [batch] int64, row of the second sample
    shared: Tensor  # [batch, concepts] bool; with others="differ" exactly one True per row
    factor: Tensor  # [batch] int64, the concept that was drawn for the pair; -1 for two rows without labels


class PairSampler:
    """Creates a source of pairs (a, b) that share one concept, or all but one.

    A concept is drawn (evenly, or by ``weights``), then a sample evenly among those that have a partner for it, then
    its partner evenly among all of them. Batch k depends on the seed, k and its size alone: a run resumes bit for bit
    from ``state_dict()``, and workers of a DataLoader can draw different batches of one sequence (:meth:`batches`).

    Labels may be missing (-1). An unknown label counts as different from every other: no pair is said to share it, and
    :class:`FactorLoss` then asks nothing of that factor but that each sample be likely in it. Rows without any label
    come in pairs that share nothing, as a fixed share of each batch, and teach the density alone.

    Args:
        labels: integers ``[n, concepts]``, or a mapping of concept name to ``[n]``; from 0, or -1 where unknown.
        seed: a non-negative integer; the same seed gives the same pairs.
        names: names of the columns, where ``labels`` is an array; by default ``"0"``, ``"1"``, …
        weights: how often each concept is drawn, relative to the others, in column order or by name; by default evenly.
            A concept with weight 0 is not drawn, but samples still have to differ in it.
        others: ``"differ"``: partners differ in every other concept. ``"any"``: the others fall as they may, and
            ``shared`` marks all that agree. Take "any" where concepts have two values: partners that differ in two of
            them always agree on whether the two are equal, and a factor would learn that in place of its concept.
            ``"agree"``: partners share every other concept and differ in the drawn one, which says what a concept is by
            its change (the negative codes of the published code, which there share the residual too: name it as a
            concept for that).
        unlabelled: share of the pairs of a batch that are drawn from the rows without any label, from 0 to 1; by
            default one half, and 0 where every row has a label.

    Raises:
        TypeError: labels that are not integers.
        ValueError: empty labels, a label below -1, names, weights, ``others`` or ``unlabelled`` that don't fit, a
            concept that no pair shares (alone, with "differ"; or differs in alone, with "agree").

    References:
        Esser, Rombach, Ommer, CVPR 2020, Sec. 3 (pairs that share a semantic concept); CompVis/iin, factor codes.

    Example:
        >>> from iin_fast import PairSampler
        >>> labels = {"digit": [0, 0, 1, 1], "color": [0, 1, 0, 1]}
        >>> sampler = PairSampler(labels, seed=1)
        >>> pairs = sampler.sample(100)
        >>> bool((pairs.shared.sum(1) == 1).all())
        True
        >>> sampler.names
        ('digit', 'color')
    """

    def __init__(
        self,
        labels: Mapping[str, Tensor | ArrayLike] | Tensor | ArrayLike,
        *,
        seed: int = 0,
        names: Sequence[str] | None = None,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        others: str = "differ",
        unlabelled: float | None = None,
    ) -> None:
        if others not in ("differ", "any", "agree"):
            raise ValueError(f"PairSampler: others is {others!r}, expected 'differ', 'any' or 'agree'")
        self.others = others
        table, self.names = _table(labels, names)
        self.seed = checked_seed("PairSampler", seed)
        self.step = 0
        n, concepts = table.shape
        self._weights = _weights(weights, self.names)
        self._known = table != MISSING
        self._codes = np.stack([dense(_distinct(table[:, k])) for k in range(concepts)], axis=1)
        self._free = np.flatnonzero(~self._known.any(1))
        self._unlabelled = _share(unlabelled, len(self._free))
        self._fingerprint = zlib.crc32(self._codes.data, n)

        # Rows with the same labels form a cell. Cells, not rows, decide who has a partner.
        self._cell_of = np.zeros(n, dtype=np.int64)
        for k in range(concepts):
            self._cell_of = dense(self._cell_of * (self._codes[:, k].max() + 1) + self._codes[:, k])
        self._by_cell = _Groups(self._cell_of)
        self._cell_size = self._by_cell.size
        first = self._by_cell.order[self._by_cell.start]  # a row of each cell
        self._cells = self._codes[first]
        self._cell_known = self._known[first]
        # Partners for concept k lie in the group of rows that share it, or, for "agree", that share all the others.
        self._group_of = np.stack([self._groups(k) for k in range(concepts)], axis=1)
        self._rows = [_Groups(self._group_of[:, k]) for k in range(concepts)]
        if others == "any":
            partners = np.stack([g.size[self._group_of[first, k]] - 1 for k, g in enumerate(self._rows)], axis=1)
        elif others == "agree":
            known = [np.bincount(self._group_of[:, k], weights=self._known[:, k]) for k in range(concepts)]
            partners = np.stack([known[k][self._group_of[first, k]] - self._cell_size for k in range(concepts)], axis=1)
            partners *= self._cell_known
        else:
            partners = _partner_counts(self._cells, self._cell_size)
        self._cell_groups = [_Groups(dense(self._group_of[first, k])) for k in range(concepts)]
        self._anchors = []
        for k, name in enumerate(self.names):
            anchors = np.flatnonzero(partners[self._cell_of, k] > 0)
            if len(anchors) == 0 and self._weights[k] > 0:
                wanted = {
                    "any": f"shares concept {name!r}",
                    "differ": f"shares concept {name!r} and differs in all others",
                    "agree": f"differs in concept {name!r} and shares all others",
                }[others]
                raise ValueError(f"PairSampler: labels have no pair that {wanted}; give it weight 0 or leave it out")
            self._anchors.append(anchors)
        self._listed: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._room = _LISTED

    def __repr__(self) -> str:
        n, concepts = self._codes.shape
        return f"PairSampler(n={n}, concepts={list(self.names)}, seed={self.seed}, step={self.step})"

    def sample(self, batch_size: int, *, step: int | None = None) -> Pairs:
        """Pairs number ``step`` of the sequence; by default the next ones, and the sampler moves on.

        Args:
            batch_size: pairs to draw, at least 1.
            step: a place in the sequence; the sampler stays where it is.
        """
        batch_size = checked_int("PairSampler.sample", "batch_size", batch_size)
        if step is None:
            pairs = self._draw(batch_size, self.step)
            self.step += 1
            return pairs
        return self._draw(batch_size, checked_int("PairSampler", "step", step, least=0))

    def batches(self, batch_size: int, steps: int, *, start: int | None = None) -> "PairBatches":
        """A data set of ``steps`` batches, from place ``start`` of the sequence on (by default the sampler's own).

        For ``torch.utils.data.DataLoader(sampler.batches(50, 1000), batch_size=None)``. The sampler stays where it is.
        """
        where = "PairSampler.batches"
        batch_size = checked_int(where, "batch_size", batch_size)
        steps = checked_int(where, "steps", steps)
        start = self.step if start is None else checked_int(where, "start", start, least=0)
        return PairBatches(self, batch_size, steps, start)

    def state_dict(self) -> dict[str, int]:
        """Where the sequence stands, as plain integers."""
        return {"seed": self.seed, "step": self.step, "labels": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: a state that is none, or of a sampler over other labels.
        """
        if set(state) != {"seed", "step", "labels"}:
            raise ValueError(f"PairSampler: state has the keys {sorted(state)}, expected ['labels', 'seed', 'step']")
        if state["labels"] != self._fingerprint:
            raise ValueError("PairSampler: state was taken over other labels than this sampler has")
        seed = checked_seed("PairSampler", state["seed"], "state['seed']")
        step = checked_int("PairSampler", "state['step']", state["step"], least=0)
        self.seed, self.step = seed, step

    def _draw(self, batch_size: int, step: int) -> Pairs:
        random = np.random.default_rng([self.seed, step])
        edges = np.cumsum(self._weights)
        factor = np.searchsorted(edges, random.random(batch_size) * edges[-1], side="right")
        factor = np.minimum(factor, np.flatnonzero(self._weights)[-1])  # random * edges[-1] may round up to edges[-1]
        a = np.empty(batch_size, dtype=np.int64)
        b = np.empty(batch_size, dtype=np.int64)
        if self._unlabelled:
            factor[random.random(batch_size) < self._unlabelled] = -1
        for k in np.unique(factor):
            drawn = np.flatnonzero(factor == k)
            if k < 0:
                a[drawn] = self._free[random.integers(len(self._free), size=len(drawn))]
                b[drawn] = self._free[random.integers(len(self._free), size=len(drawn))]
                continue
            anchors = self._anchors[k]
            a[drawn] = anchors[random.integers(len(anchors), size=len(drawn))]
            b[drawn] = self._partners(a[drawn], int(k), random)
        if self.others == "any":
            shared = self._codes[a] == self._codes[b]
        else:
            shared = np.arange(len(self.names)) == factor[:, None]
            if self.others == "agree":
                shared = ~shared
        shared[factor < 0] = False
        return Pairs(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(shared), torch.from_numpy(factor))

    def _partners(self, a: NDArray[np.int64], concept: int, random: np.random.Generator) -> NDArray[np.int64]:
        """For each row of ``a`` (which all have one) a partner for ``concept``, evenly drawn."""
        rows = self._rows[concept]
        group = self._group_of[a, concept]
        differ = self._differing(concept)
        if not differ:  # the only rule is that b is not a
            return rows.draw(group, random, without=a)
        b = np.empty_like(a)
        left = np.arange(len(a))
        for _ in range(_ROUNDS):
            candidate = rows.draw(group[left], random)
            good = (self._codes[candidate][:, differ] != self._codes[a[left]][:, differ]).all(1)
            if self.others == "agree":
                good &= self._known[candidate, concept]
            b[left[good]] = candidate[good]
            left = left[~good]
            if len(left) == 0:
                return b
        for i in left:
            cells, edges = self._partner_cells(int(self._cell_of[a[i]]), concept)
            place = random.integers(edges[-1])
            chosen = np.searchsorted(edges, place, side="right")
            b[i] = self._by_cell.members(cells[chosen])[place - edges[chosen]]  # counted from the end of the cell
        return b

    def _differing(self, concept: int) -> list[int]:
        """The concepts in which partners for ``concept`` have to differ."""
        if self.others == "any":
            return []
        return [k for k in range(len(self.names)) if (k == concept) == (self.others == "agree")]

    def _groups(self, concept: int) -> NDArray[np.int64]:
        """The group of each row, ``[n]`` from 0 without gaps: rows of one group may be partners for ``concept``."""
        if self.others != "agree":
            return self._codes[:, concept]
        group = np.zeros(len(self._codes), dtype=np.int64)
        for k in range(len(self.names)):
            if k != concept:
                group = dense(group * (self._codes[:, k].max() + 1) + self._codes[:, k])
        return group

    def _partner_cells(self, cell: int, concept: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The cells of partners of ``cell`` for ``concept``, and the running sum of their rows."""
        listed = self._listed.get((cell, concept))
        if listed is None:
            labels = self._cells[cell]
            row = self._by_cell.members(cell)[0]
            cells = self._cell_groups[concept].members(self._group_of[row, concept])
            for k in self._differing(concept):
                cells = cells[self._cells[cells, k] != labels[k]]
            if self.others == "agree":
                cells = cells[self._cell_known[cells, concept]]
            listed = cells, np.cumsum(self._cell_size[cells])
            if len(cells) <= self._room:
                self._room -= len(cells)
                self._listed[cell, concept] = listed
        return listed


class PairBatches(torch.utils.data.Dataset[Pairs]):
    """A stretch of a sampler's sequence as a data set of batches; made by :meth:`PairSampler.batches`."""

    def __init__(self, sampler: PairSampler, batch_size: int, steps: int, start: int) -> None:
        self.sampler, self.batch_size, self.steps, self.start = sampler, batch_size, steps, start

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Pairs:
        if not 0 <= index < self.steps:
            raise IndexError(f"PairBatches: index is {index}, expected 0 to {self.steps - 1}")
        return self.sampler.sample(self.batch_size, step=self.start + index)

    def __iter__(self) -> Iterator[Pairs]:
        return (self[index] for index in range(self.steps))


class _Groups:
    """Members of each group, for codes ``[n]`` from 0 to groups - 1 that all occur."""

    def __init__(self, codes: NDArray[np.int64]) -> None:
        self.order = np.argsort(codes, kind="stable")  # [n], members of group 0, then of group 1, …
        self.size = np.bincount(codes)  # [groups]
        self.start = np.cumsum(self.size) - self.size  # [groups]
        self.place: NDArray[np.int64] | None = None

    def members(self, group: int | np.int64) -> NDArray[np.int64]:
        start = self.start[group]
        return self.order[start : start + self.size[group]]

    def draw(
        self, groups: NDArray[np.int64], random: np.random.Generator, without: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """One member of each of ``groups``, evenly; not ``without``, which are members too."""
        if without is None:
            place = random.integers(self.size[groups])
        else:
            place = random.integers(self.size[groups] - 1)
            if self.place is None:
                self.place = np.empty_like(self.order)
                self.place[self.order] = np.arange(len(self.order))
            place += place >= self.place[without] - self.start[groups]
        return self.order[self.start[groups] + place]


def _partner_counts(cells: NDArray[np.int64], cell_size: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows share concept k alone with a row of cell u: ``[cells, concepts]``.

    Two ways, the cheaper one is taken. Inclusion and exclusion: with N_S(u) the rows that agree with u in all of S, the
    count is sum over S that contain k of (-1)^(|S| - 1) N_S(u); 2^concepts groupings. Or each cell against each.
    """
    n_cells, concepts = cells.shape
    # Measured at 1e6 cells x 3 concepts and at 2e4 x 40, on one core.
    grouping = float(2**concepts) * n_cells * 50e-9
    comparing = float(n_cells) ** 2 * concepts * 0.1e-9
    if min(grouping, comparing) > 600:
        raise ValueError(
            f"PairSampler: labels have {n_cells} different combinations of {concepts} concepts, too many to find out "
            f"which samples have partners; use fewer concepts"
        )
    counts = np.zeros((n_cells, concepts), dtype=np.int64)
    if grouping <= comparing:

        def refine(codes: NDArray[np.int64], subset: tuple[int, ...], first: int) -> None:
            for k in range(first, concepts):
                finer = dense(codes * (cells[:, k].max() + 1) + cells[:, k])
                agree = np.bincount(finer, weights=cell_size)[finer].astype(np.int64)
                members = (*subset, k)
                counts[:, members] += (agree if len(members) % 2 else -agree)[:, None]
                refine(finer, members, k + 1)

        refine(np.zeros(n_cells, dtype=np.int64), (), 0)
    else:
        small = np.ascontiguousarray(cells.T.astype(np.min_scalar_type(cells.max())))  # [concepts, cells]
        block = max(1, 2**18 // n_cells)
        for start in range(0, n_cells, block):
            equal = np.zeros((min(block, n_cells - start), n_cells), dtype=np.min_scalar_type(concepts))
            for column in small:
                equal += column[start : start + block, None] == column
            u, v = np.nonzero(equal == 1)
            k = np.argmax(cells[start + u] == cells[v], axis=1)
            np.add.at(counts, (start + u, k), cell_size[v])
    if concepts == 1:
        counts -= 1  # a row is no partner of its own
    return counts


def _table(
    labels: Mapping[str, Tensor | ArrayLike] | Tensor | ArrayLike, names: Sequence[str] | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as ``[n, concepts]`` and the names of the columns."""
    if isinstance(labels, Mapping):
        if names is not None:
            raise ValueError("PairSampler: names is given, expected none with labels that are a mapping of name to [n]")
        if not labels:
            raise ValueError("PairSampler: labels are empty, expected at least one concept")
        names = tuple(labels)
        columns = [_integers(f"labels[{name!r}]", column) for name, column in labels.items()]
        for name, column in zip(names, columns, strict=True):
            if column.ndim != 1 or column.shape != columns[0].shape:
                expected = f"[{len(columns[0])}] like labels[{names[0]!r}]" if columns[0].ndim == 1 else "[n]"
                raise ValueError(f"PairSampler: labels[{name!r}] has shape {list(column.shape)}, expected {expected}")
        table = np.stack(columns, axis=1)
    else:
        table = _integers("labels", labels)
        if table.ndim != 2:
            raise ValueError(f"PairSampler: labels have shape {list(table.shape)}, expected [n, concepts]")
        names = tuple(str(k) for k in range(table.shape[1])) if names is None else tuple(names)
        if len(names) != table.shape[1]:
            raise ValueError(f"PairSampler: names has {len(names)} names, expected {table.shape[1]}, one per concept")
    if 0 in table.shape:
        raise ValueError(f"PairSampler: labels are empty, of shape {list(table.shape)}, expected [n, concepts]")
    if table.min() < MISSING:
        raise ValueError(f"PairSampler: labels have the value {table.min()}, expected none below 0 but -1 for unknown")
    for name in names:
        check_name("PairSampler: names has", name)
    if len(set(names)) != len(names):
        raise ValueError(f"PairSampler: names has one twice: {list(names)}")
    return table, tuple(names)


def _integers(name: str, values: Tensor | ArrayLike) -> NDArray[np.int64]:
    array = to_numpy(values)
    if array.size == 0:
        raise ValueError(f"PairSampler: {name} is empty, of shape {list(array.shape)}, expected at least one sample")
    if array.dtype.kind not in "iub":
        raise TypeError(f"PairSampler: {name} is {array.dtype}, expected integers")
    if array.max() >= (most := np.iinfo(np.int64).max):  # beyond it lies -1, and codes are counted one up
        raise ValueError(f"PairSampler: {name} has the value {array.max()}, expected less than {most}")
    return array.astype(np.int64)


def _distinct(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Codes in which every unknown label is a value of its own, so that it equals no other."""
    unknown = np.flatnonzero(codes == MISSING)
    if len(unknown) == 0:
        return codes
    codes = dense(codes + 1)  # unknown is 0
    codes[unknown] = codes.max() + 1 + np.arange(len(unknown))
    return codes


def _share(unlabelled: float | None, n: int) -> float:
    """The share of pairs without labels, for ``n`` rows that have none."""
    if unlabelled is None:
        return 0.5 if n else 0.0
    if isinstance(unlabelled, bool) or not isinstance(unlabelled, int | float):
        raise TypeError(f"PairSampler: unlabelled is {unlabelled!r}, expected a number from 0 to 1")
    if not 0 <= unlabelled <= 1:
        raise ValueError(f"PairSampler: unlabelled is {unlabelled}, expected a number from 0 to 1")
    if unlabelled and not n:
        raise ValueError(f"PairSampler: unlabelled is {unlabelled}, expected 0 where every row has a label")
    return float(unlabelled)


def _weights(weights: Mapping[str, float] | Sequence[float] | None, names: tuple[str, ...]) -> NDArray[np.float64]:
    if weights is None:
        return np.ones(len(names))
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"PairSampler: weights has the names {list(weights)}, expected {list(names)}")
        weights = [weights[name] for name in names]
    try:
        array = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"PairSampler: weights are {weights!r}, expected numbers") from None
    if array.shape != (len(names),):
        raise ValueError(
            f"PairSampler: weights has shape {list(array.shape)}, expected [{len(names)}], one per concept"
        )
    with np.errstate(over="ignore"):
        total = array.sum()
    if not np.isfinite(total) or (array < 0).any() or not array.any():
        raise ValueError(
            f"PairSampler: weights are {array.tolist()}, expected finite numbers from 0, not all 0, of a finite sum"
        )
    return array
