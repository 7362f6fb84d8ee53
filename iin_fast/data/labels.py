"""Labels as people have them: integers, texts, floats that are whole numbers, a number per sample; with gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import MISSING, to_numpy

__all__ = ["Concept", "bin_edges", "in_bins", "read_concept"]

MOST_BINS, ROWS_PER_BIN = 10, 20
FAR, GAPS = 1000, 10  # numbers of classes from here on, and above so many times their count, are coded without gaps


class Concept(NamedTuple):
    """One column of labels."""

    codes: NDArray[np.int64]  # [n], -1 where unknown
    classes: tuple[str, ...] = ()  # what texts, or numbers with far gaps, the codes stand for
    values: NDArray[np.float64] | None = None  # [n], NaN where unknown, of a continuous concept
    edges: tuple[float, ...] = ()  # between the bins that its codes are


def read_concept(where: str, name: str, column: Any, continuous: bool = False) -> Concept:
    """Classes of one concept from integers, booleans, texts or floats ``[n]``; NaN, None and empty texts are unknown.

    Floats that are whole numbers are classes. Other floats are a continuous concept, and so are all numbers of a ``continuous``
    one: its codes are bins of equal counts.

    Raises:
        TypeError, ValueError: a column of another kind or shape, infinite values, classes below 0 other than -1.
    """
    array = to_numpy(column)
    if array.ndim != 1:
        raise ValueError(f"{where}: {name} has shape {list(array.shape)}, expected one label for each sample, [n]")
    if array.dtype.kind == "O":
        array = _plain(where, name, array)
    if array.dtype.kind in "US":
        texts = np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array
        known = np.char.str_len(np.char.strip(texts)) > 0
        classes, codes = np.unique(texts[known], return_inverse=True)
        found = np.full(len(texts), MISSING, dtype=np.int64)
        found[known] = codes
        return Concept(found, tuple(classes.tolist()))
    if array.dtype.kind not in "fiub":
        raise TypeError(
            f"{where}: {name} is {array.dtype}, expected integers (-1 where a label is missing), texts or real numbers"
        )
    if array.dtype.kind == "f" or continuous:
        values = array.astype(np.float64)
        if np.isinf(values).any():
            raise ValueError(f"{where}: {name} has Inf, expected finite numbers, or NaN where a label is missing")
        known = ~np.isnan(values)
        if continuous or (values[known] != np.round(values[known])).any():
            edges = bin_edges(values)
            return Concept(in_bins(values, edges), values=values, edges=edges)
        array = np.where(known, values, MISSING)
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{where}: {name} has the value {array.max()}, expected at most 2^63 - 1")
    codes = array.astype(np.int64)
    if codes.min(initial=MISSING) < MISSING:
        raise ValueError(f"{where}: {name} has the value {codes.min()}, expected classes from 0, or -1 for unknown")
    last = codes.max(initial=0)
    if last >= FAR:
        known = codes != MISSING
        numbers, places = np.unique(codes[known], return_inverse=True)
        if last > GAPS * len(numbers):
            codes[known] = places
            return Concept(codes, tuple(map(str, numbers.tolist())))
    return Concept(codes)


def bin_edges(values: NDArray[np.float64]) -> tuple[float, ...]:
    """The inner edges of bins of about equal counts: ten, or fewer where a bin would have less than 20 values. None is empty."""
    known = values[~np.isnan(values)]
    if not len(known):
        return ()
    bins = min(MOST_BINS, max(2, len(known) // ROWS_PER_BIN))
    edges = np.unique(np.quantile(known, np.arange(1, bins) / bins))
    edges = edges[edges > known.min()]
    if not len(edges):  # most values are the lowest one
        edges = np.unique(known)[1:2]
    return tuple(edges.tolist())


def in_bins(values: NDArray[np.float64], edges: Sequence[float]) -> NDArray[np.int64]:
    """The bin of each value, -1 of NaN."""
    return np.where(np.isnan(values), MISSING, np.searchsorted(np.asarray(edges), values, side="right"))


def _plain(where: str, name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Python objects as texts or as floats; None, NaN and pandas' NA are unknown."""
    array = np.array([None if _is_unknown(value) else value for value in array], dtype=object)
    known = [value for value in array if value is not None]
    if all(isinstance(value, str) for value in known):
        return np.array([value if isinstance(value, str) else "" for value in array], dtype=str)
    if all(isinstance(value, int | float | np.number | np.bool_) for value in known):
        return np.array([value if value is not None else np.nan for value in array], dtype=np.float64)
    kinds = sorted({type(value).__name__ for value in known})
    raise TypeError(f"{where}: {name} holds {', '.join(kinds)}, expected texts alone or numbers alone")


def _is_unknown(value: Any) -> bool:
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas, which compare to nothing
        return True
    return value is None or (isinstance(value, float | np.floating) and value != value)
