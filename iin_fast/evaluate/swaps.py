"""Swap success: does the concept change when its factor is swapped, and does everything else stay?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import MISSING, checked_latents, to_numpy
from ._data import Array, Codes, checked_labels, require_sklearn, subset
from .probe import Probe, balanced_accuracy

__all__ = ["Judge", "Swap", "judge_accuracy", "latent_judge", "swap_success"]

# latents [n, dim] (or what a decoder makes of them) -> concept to class probabilities [n, classes]
Judge = Callable[[Any], Mapping[str, ArrayLike | Tensor]]
# (concept, rows that keep the rest, rows that give the concept) -> latents [n, dim]
Swap = Callable[[str, Codes, Codes], Array]


def latent_judge(
    z: Tensor | ArrayLike,  # [n, dim]
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    *,
    max_samples: int = 5000,
    seed: int = 0,
) -> Judge:
    """A judge that reads every concept from latents: one small network each (64 hidden units), trained on ``z``.

    Raises:
        ImportError: no scikit-learn.
        TypeError, ValueError: latents or labels that don't fit, fewer than two classes.
    """
    require_sklearn("latent_judge")
    x = checked_latents("latent_judge", "z", z)
    codes = checked_labels("latent_judge", labels, names, len(x))
    probes = {}
    for j, name in enumerate(names):
        known = np.flatnonzero(codes[:, j] != MISSING)
        known = known[subset(len(known), max_samples, seed)]
        probes[name] = Probe(x[known], codes[known, j], "mlp", seed)

    def judge(latents: Any) -> dict[str, Array]:
        return {name: probe(to_numpy(latents).astype(np.float64)) for name, probe in probes.items()}

    return judge


def judge_accuracy(
    judge: Judge, z: Any, labels: Tensor | ArrayLike, names: Sequence[str], seen: Callable[[Array], Any] | None = None
) -> dict[str, float]:
    """Balanced accuracy of the judge on samples as they are: the ceiling of every swap."""
    x = checked_latents("judge_accuracy", "z", z)
    codes = checked_labels("judge_accuracy", labels, names, len(x))
    read = _read(judge, seen(x) if seen else x, names, len(x))
    return {
        name: balanced_accuracy(read[name][codes[:, j] != MISSING], codes[codes[:, j] != MISSING, j])
        for j, name in enumerate(names)
    }


def swap_success(
    swap: Swap,
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    judge: Judge,
    *,
    concepts: Sequence[str] | None = None,
    seen: Callable[[Array], Any] | None = None,
    max_swaps: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    r"""Swaps each concept's factor with donors of another class, and lets a judge read all concepts of the result.

    .. math:: \mathrm{target} = \Pr(\hat y_k(z') = y_k(\text{donor})), \quad
              \mathrm{keep}_j = \Pr(\hat y_j(z') = y_j(z)) \text{ for } j \ne k

    Each row keeps its rest once, at most ``max_swaps`` of them; its donor's class is drawn evenly among the other
    classes, then a sample evenly in it, so that rare classes give as often as frequent ones. Range 0 to 1; higher is
    better, up to what the judge reads right on samples as they are (:func:`judge_accuracy`). Either number alone is
    easy: replacing all of z gives target 1, replacing nothing gives keep 1. Look at ``both``.

    Args:
        swap: (concept, rows that keep, rows that give) to latents ``[n, dim]``.
        labels: classes from 0, -1 where unknown: no donor and no keeper for that concept, and not judged on it.
        names: of the concepts; all of them are followed.
        judge: latents to concept to class probabilities ``[n, classes]``, whose columns are the labels.
        concepts: which to swap; by default all.
        seen: what the judge gets to see, made of latents, such as a decoder; by default the latents.
        max_swaps: for each concept.
        seed: draws rows and donors.

    Returns:
        concept to ``target``; ``keep``: other concept to its share kept; ``keep_all``: all known others kept at once;
        ``both``: target reached and all others kept; ``swaps``: how many.

    Raises:
        TypeError, ValueError: labels that don't fit, an unknown concept, a judge that gives something else.

    References:
        Esser, Rombach, Ommer, A Disentangling Invertible Interpretation Network, CVPR 2020, Sec. 4.1 (swapping factors
        between images, Fig. 2). The measure is this package's.
    """
    outcomes = swap_outcomes(swap, labels, names, judge, concepts, seen, max_swaps, seed)
    return {concept: outcome.summary() for concept, outcome in outcomes.items()}


class Outcome(NamedTuple):
    """What became of each swap of a concept."""

    target: NDArray[np.bool_]  # [swaps], the judge reads the donor's class
    kept: NDArray[np.bool_]  # [swaps], and the own one of all other concepts that are known
    keep: dict[str, float]  # other concept to its share kept

    @property
    def both(self) -> NDArray[np.bool_]:
        return self.target & self.kept

    def summary(self) -> dict[str, Any]:
        """As :func:`swap_success` gives it."""
        shares = {"keep_all": float(self.kept.mean()), "both": float(self.both.mean())}
        return {"target": float(self.target.mean()), "keep": self.keep, **shares, "swaps": len(self.target)}


def swap_outcomes(
    swap: Swap,
    labels: Tensor | ArrayLike,
    names: Sequence[str],
    judge: Judge,
    concepts: Sequence[str] | None,
    seen: Callable[[Array], Any] | None,
    max_swaps: int,
    seed: int,
) -> dict[str, Outcome]:
    """What :func:`swap_success` sums up, swap by swap: a seed gives the same rows and donors whatever swaps them."""
    where = "swap_success"
    codes = checked_labels(where, labels, names, len(to_numpy(labels)))
    random = np.random.default_rng(seed)
    result: dict[str, Outcome] = {}
    for concept in names if concepts is None else concepts:
        if concept not in names:
            raise ValueError(f"{where}: concepts has {concept!r}, expected some of {list(names)}")
        own = codes[:, list(names).index(concept)]
        keepers = np.flatnonzero(own != MISSING)
        keepers = keepers[subset(len(keepers), max_swaps, seed)]
        donors = _donors(own, keepers, random)
        read = _read(judge, (seen or _same)(swap(concept, keepers, donors)), names, len(keepers))
        target = read[concept] == own[donors]
        kept, keep = np.ones(len(keepers), dtype=bool), {}
        for j, other in enumerate(names):
            if other == concept:
                continue
            known = codes[keepers, j] != MISSING
            stays = read[other] == codes[keepers, j]
            kept &= stays | ~known
            if known.any():
                keep[other] = float(stays[known].mean())
        result[concept] = Outcome(target, kept, keep)
    return result


def _same(z: Array) -> Array:
    return z


def _donors(own: Codes, keepers: Codes, random: np.random.Generator) -> Codes:
    """For each keeper a row of another class; classes evenly, then rows evenly."""
    classes = np.unique(own[own != MISSING])
    place = np.searchsorted(classes, own[keepers])
    drawn = random.integers(len(classes) - 1, size=len(keepers))
    given = drawn + (drawn >= place)
    donors = np.empty_like(keepers)
    for k, label in enumerate(classes):
        members = np.flatnonzero(own == label)
        here = given == k
        donors[here] = members[random.integers(len(members), size=here.sum())]
    return donors


def _read(judge: Judge, what: Any, names: Sequence[str], n: int) -> dict[str, Codes]:
    """The judge's likeliest class of every concept."""
    found = judge(what)
    if not isinstance(found, Mapping) or any(name not in found for name in names):
        came = list(found) if isinstance(found, Mapping) else type(found).__name__
        raise TypeError(f"swap_success: judge gave {came}, expected a mapping with each of {list(names)}")
    read = {}
    for name in names:
        table = to_numpy(found[name])
        if table.ndim != 2 or len(table) != n:
            raise ValueError(f"swap_success: judge gave {name!r} of shape {list(table.shape)}, expected [{n}, classes]")
        read[name] = table.argmax(1)
    return read
