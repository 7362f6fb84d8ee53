"""How well a concept can be read from factors: linear and small nonlinear probes, and the leak test made of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..arrays import MISSING
from ._data import Array, Codes, checked_factors, checked_labels, halves, require_sklearn, subset

__all__ = ["Probe", "above_chance", "balanced_accuracy", "leak", "train_and_test"]


class Probe:
    """A classifier of ``[n, dim]`` that weighs all classes alike, however many samples each has.

    Args:
        x: what to read from, ``[n, dim]``.
        y: classes ``[n]``, two at least.
        kind: ``"linear"`` (multinomial logistic regression) or ``"mlp"`` (64 hidden units, early stopping).
        seed: of the network and its batches.
    """

    def __init__(self, x: Array, y: Codes, kind: Literal["linear", "mlp"], seed: int) -> None:
        require_sklearn("iin_fast.evaluate")
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier

        self.mean, spread = x.mean(0), x.std(0)
        self.scale = np.where(spread > 0, spread, 1.0)
        x = (x - self.mean) / self.scale
        if kind == "linear":
            self.model = LogisticRegression(C=1.0, max_iter=200, class_weight="balanced")
        else:
            self.model = MLPClassifier((64,), alpha=1e-3, max_iter=200, n_iter_no_change=10, random_state=seed % 2**32)
            self.model.set_params(early_stopping=len(y) >= 200)
            x, y = _evened(x, y, np.random.default_rng(seed))
        with warnings.catch_warnings():  # a probe that would still improve a little is good enough
            warnings.simplefilter("ignore")
            self.model.fit(x, y)

    def __call__(self, x: Array) -> Array:
        """Class probabilities ``[n, largest label + 1]``; a class that was never seen has 0."""
        found = self.model.predict_proba((np.asarray(x, dtype=np.float64) - self.mean) / self.scale)
        table = np.zeros((len(found), int(self.model.classes_.max()) + 1))
        table[:, self.model.classes_] = found
        return table

    def read(self, x: Array) -> Codes:
        """The likeliest class, ``[n]``."""
        labels: Codes = self(x).argmax(1)
        return labels


def balanced_accuracy(read: Codes, truth: Codes) -> float:
    """Share read right, averaged over the classes in ``truth``: 1/C by chance, whatever their counts."""
    return float(np.mean([(read[truth == label] == label).mean() for label in np.unique(truth)]))


def above_chance(accuracy: float, chance: float) -> float:
    """0 at chance or below, 1 for all right."""
    return max(0.0, (accuracy - chance) / (1.0 - chance))


def leak(
    factors: Mapping[str, Tensor | ArrayLike],
    labels: Tensor | ArrayLike,  # [n, concepts]
    names: Sequence[str],
    *,
    train_factors: Mapping[str, Tensor | ArrayLike] | None = None,
    train_labels: Tensor | ArrayLike | None = None,
    max_samples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    r"""Tests how well each concept can be read from the factors that should not hold it.

    A probe is trained to read the concept from all factors but the one of its name, and scored on other samples:

    .. math:: \mathrm{leak} = \frac{A - 1/C}{1 - 1/C}, \quad A = \frac1C \sum_c \Pr(\text{read} = c \mid y = c)

    Range 0 (nothing leaks; by chance a little above 0) to 1 (the rest tells all); lower is better. ``linear`` sees what
    a logistic regression sees, ``mlp`` what a network of 64 hidden units sees: a rotated or scaled leak is found by the
    first, a folded one by the second alone. Concepts that go together in the data leak by themselves.

    Args:
        factors: name to ``[n, size]``, scored on.
        labels: classes from 0, -1 where unknown.
        names: of the concepts. The factor of the same name is the one that may hold it; without one, none may.
        train_factors, train_labels: what the probes learn on; by default half of the samples, drawn by ``seed``.
        max_samples: most samples to learn on and to score on.
        seed: of the draws and the network.

    Returns:
        concept to ``linear``, ``mlp`` (leak, above chance), ``linear_accuracy``, ``mlp_accuracy`` (balanced), ``own`` and
        ``all`` (linear balanced accuracy from its own factor, and from all factors: what there is to know), ``chance``.

    Raises:
        ImportError: no scikit-learn.
        TypeError, ValueError: factors or labels that don't fit, fewer than two classes.

    References:
        Alain, Bengio, Understanding Intermediate Layers Using Linear Classifier Probes, ICLR workshop 2017, Sec. 3.
        Brodersen, Ong, Stephan, Buhmann, The Balanced Accuracy and Its Posterior Distribution, ICPR 2010.
    """
    where = "leak"
    data = train_and_test(where, factors, labels, names, train_factors, train_labels, max_samples, seed)
    train, train_codes, test, test_codes = data
    result = {}
    for j, name in enumerate(names):
        seen, scored = train_codes[:, j] != MISSING, test_codes[:, j] != MISSING
        y, truth = train_codes[seen, j], test_codes[scored, j]
        chance = 1.0 / len(np.unique(y))

        def accuracy(
            chosen: list[str],
            kind: Literal["linear", "mlp"],
            seen: Codes = seen,
            scored: Codes = scored,
            y: Codes = y,
            truth: Codes = truth,
            chance: float = chance,
        ) -> float:
            if not chosen:
                return chance
            x = np.concatenate([train[factor][seen] for factor in chosen], axis=1)
            probe = Probe(x, y, kind, seed)
            return balanced_accuracy(probe.read(np.concatenate([test[f][scored] for f in chosen], axis=1)), truth)

        others = [factor for factor in train if factor != name]
        linear, mlp = accuracy(others, "linear"), accuracy(others, "mlp")
        result[name] = {
            "linear": above_chance(linear, chance),
            "mlp": above_chance(mlp, chance),
            "linear_accuracy": linear,
            "mlp_accuracy": mlp,
            "own": accuracy([name] if name in train else [], "linear"),
            "all": accuracy(list(train), "linear"),
            "chance": chance,
        }
    return result


def train_and_test(
    where: str,
    factors: Mapping[str, Tensor | ArrayLike],
    labels: Tensor | ArrayLike,
    names: Sequence[str],
    train_factors: Mapping[str, Tensor | ArrayLike] | None,
    train_labels: Tensor | ArrayLike | None,
    max_samples: int,
    seed: int,
) -> tuple[dict[str, Array], Codes, dict[str, Array], Codes]:
    """Factors and labels to learn on and to score on: those given, or two halves of what is scored."""
    test = checked_factors(where, factors)
    n = len(next(iter(test.values())))
    codes = checked_labels(where, labels, names, n)
    if (train_factors is None) != (train_labels is None):
        raise ValueError(f"{where}: train_factors and train_labels are needed together, one is missing")
    if train_factors is None or train_labels is None:
        if n < 4:
            raise ValueError(f"{where}: factors have {n} samples, expected at least 4 to learn and to score on")
        first, second = halves(n, seed)
        train, train_codes = {name: part[first] for name, part in test.items()}, codes[first]
        test, codes = {name: part[second] for name, part in test.items()}, codes[second]
    else:
        train = checked_factors(where, train_factors)
        train_codes = checked_labels(where, train_labels, names, len(next(iter(train.values()))), "train_labels")
        sizes, train_sizes = ({k: v.shape[1] for k, v in parts.items()} for parts in (test, train))
        if sizes != train_sizes:
            raise ValueError(f"{where}: train_factors has sizes {train_sizes}, expected {sizes} like factors")
    rows = subset(len(train_codes), max_samples, seed)
    train, train_codes = {name: part[rows] for name, part in train.items()}, train_codes[rows]
    rows = subset(len(codes), max_samples, seed + 1)
    test, codes = {name: part[rows] for name, part in test.items()}, codes[rows]
    # Again, for what was drawn: a class or two may be gone.
    checked_labels(where, train_codes, names, len(train_codes), "the labels to learn on")
    return train, train_codes, test, checked_labels(where, codes, names, len(codes), "the labels to score on")


def _evened(x: Array, y: Codes, random: np.random.Generator) -> tuple[Array, Codes]:
    """Rows of small classes again and again, until all classes have as many as the largest."""
    labels, counts = np.unique(y, return_counts=True)
    rows = [np.arange(len(y))]
    for label, count in zip(labels, counts, strict=True):
        rows.append(random.choice(np.flatnonzero(y == label), counts.max() - count))
    order = random.permutation(np.concatenate(rows))
    return x[order], y[order]
