"""What the metrics share: checked factors and labels, splits, and the extra that they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..arrays import MISSING, checked_latents, to_numpy

__all__ = [
    "Array",
    "Codes",
    "checked_factors",
    "checked_labels",
    "halves",
    "require_sklearn",
    "single_dimensions",
    "subset",
]

_MOST = 10**5

Array = NDArray[np.float64]
Codes = NDArray[np.int64]


def require_sklearn(where: str) -> None:
    """ImportError that names the extra, where scikit-learn is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError(f"{where} needs scikit-learn: pip install 'iin-fast[evaluate]'")


def checked_factors(where: str, factors: Mapping[str, Tensor | ArrayLike]) -> dict[str, Array]:
    """Name to float64 ``[n, size]``, all of one n."""
    if not isinstance(factors, Mapping):
        raise TypeError(
            f"{where}: factors is a {type(factors).__name__}, expected Factors or a mapping of name to [n, size]"
        )
    if not factors:
        raise ValueError(f"{where}: factors is empty, expected at least one")
    arrays = {name: checked_latents(where, f"factors[{name!r}]", part) for name, part in factors.items()}
    n = len(next(iter(arrays.values())))
    for name, array in arrays.items():
        if len(array) != n:
            raise ValueError(f"{where}: factors[{name!r}] has {len(array)} samples, expected {n} like the first factor")
    return arrays


def checked_labels(
    where: str, labels: Tensor | ArrayLike, names: Sequence[str], n: int, argument: str = "labels", classes: int = 2
) -> Codes:
    """Integers ``[n, concepts]``, -1 where unknown; each concept with so many ``classes`` at least among the known ones."""
    names = list(names)
    table = to_numpy(labels)
    if table.dtype.kind not in "iub":
        raise TypeError(f"{where}: {argument} is {table.dtype}, expected integers (-1 where a label is missing)")
    if table.shape != (n, len(names)):
        expected = f"[{n}, {len(names)}], a row for each sample and a column for each of {names}"
        raise ValueError(f"{where}: {argument} has shape {list(table.shape)}, expected {expected}")
    if not names:
        raise ValueError(f"{where}: names is empty, expected at least one concept")
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: names has one twice: {names}")
    codes: Codes = table.astype(np.int64)
    if codes.min() < MISSING:
        raise ValueError(f"{where}: {argument} has the value {codes.min()}, expected classes from 0, or -1 for unknown")
    if codes.max() >= _MOST:  # tables are as wide as the largest label
        raise ValueError(
            f"{where}: {argument} has the value {codes.max()}, expected below {_MOST}; renumber the classes"
        )
    for k, name in enumerate(names):
        known = np.unique(codes[codes[:, k] != MISSING, k])
        if len(known) < classes:
            found = f"only the class {known[0]}" if len(known) else "no label"
            raise ValueError(
                f"{where}: {argument} of {name!r} hold {found}, expected two classes at least; leave this concept out"
            )
    return codes


def single_dimensions(factors: Mapping[str, Array]) -> dict[str, Array]:
    """Every dimension as a factor of its own: ``digit[0]``, ``digit[1]``, …"""
    return {f"{name}[{i}]": part[:, [i]] for name, part in factors.items() for i in range(part.shape[1])}


def halves(n: int, seed: int) -> tuple[Codes, Codes]:
    """The rows 0 to n - 1, split at random into two halves, each in order."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: (n + 1) // 2]), np.sort(order[(n + 1) // 2 :])


def subset(n: int, most: int, seed: int) -> Codes:
    """At most ``most`` of the rows 0 to n - 1, drawn without replacement, in order."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, most, replace=False))
