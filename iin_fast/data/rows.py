"""Some rows of files that are larger than memory: a random sample to train on, or a shard to go through."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import checked_int

__all__ = ["chosen_rows", "read_rows", "training_rows"]

LARGE = 2**30  # bytes of a file that a training samples from
ELEMENTS = 2**24  # of such a sample: 64 MiB of float32
TABLE_ROWS = 500_000
CHUNK = 8192  # rows that are read together


def chosen_rows(n: int, sample: int | None, shard: tuple[int, int] | None) -> NDArray[np.int64]:
    """Rows of ``n``, in order: all, those of shard (i, of) counted from 0, or at most ``sample`` of them, drawn by a fixed seed.

    Raises:
        TypeError, ValueError: a sample below 1, a shard that is not there.
    """
    start, stop = 0, n
    if shard is not None:
        i, of = (
            checked_int("load_latents", "shard[0]", shard[0], least=0),
            checked_int("load_latents", "shard[1]", shard[1]),
        )
        if i >= of or of > n:
            raise ValueError(f"load_latents: shard is {i} of {of}, expected one of 0 to {of - 1}, of at most {n} rows")
        start, stop = i * n // of, (i + 1) * n // of
    if sample is None or checked_int("load_latents", "sample", sample) >= stop - start:
        return np.arange(start, stop)
    drawn = np.random.default_rng(0).choice(stop - start, sample, replace=False, shuffle=False)
    return np.sort(drawn) + start


def read_rows(array: Any, rows: NDArray[np.int64]) -> Any:
    """These rows of an array or a tensor. Of a mapped file no more than some pages stay in memory."""
    if isinstance(array, Tensor):
        return array[torch.from_numpy(rows)]
    if not isinstance(array, np.memmap):
        return array[rows]
    found = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for start in range(0, len(rows), CHUNK):
        found[start : start + CHUNK] = array[rows[start : start + CHUNK]]
        pages: mmap.mmap = array._mmap  # type: ignore[attr-defined]
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
    return found


def training_rows(path: Path) -> int | None:
    """How many rows of a file a training draws, if it is large; None where it takes all."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if sum(file.stat().st_size for file in files if file.exists()) < LARGE:
        return None
    arrays = [file for file in files if file.suffix == ".npy"]
    if not arrays:
        return TABLE_ROWS if any(file.suffix in (".parquet", ".arrow", ".feather") for file in files) else None
    largest = np.load(max(arrays, key=lambda file: file.stat().st_size), mmap_mode="r")
    return max(1, ELEMENTS * len(largest) // largest.size)
