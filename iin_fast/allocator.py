"""What becomes of memory that this process frees."""

import ctypes
import platform
from typing import NamedTuple

import torch

from ._library import libraries
from .checks import checked_int

__all__ = ["KeptResults", "keep_freed_memory", "keep_results", "kept_results"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt (malloc.h)


class KeptResults(NamedTuple):
    """What :func:`kept_results` says, in bytes."""

    most: int  # of memory that is kept without a tensor in it
    in_use: int  # by tensors
    kept: int  # for the next ones


def kept_results() -> KeptResults:
    """How much memory the results of this package's ops hold on the CPU, and how much is kept for the next ones.

    Results of 1 MiB or more, values and gradients, lie in memory that stays with the process when they are freed, for the
    next result of that size: else the system has to find and clear each page again, which can take as long as the op
    (docs/performance.md). No more is kept than three times what was in use at once, and no more than ``most``; the oldest goes first.
    With torch 2.10, which can't take such memory, and in a pure package nothing is kept.
    """
    return KeptResults(*torch.ops.iin_fast.kept_memory.default(-1)) if libraries else KeptResults(0, 0, 0)


def keep_results(most: int = 2**30) -> None:
    """Sets how many bytes of freed results are kept, in this process; see :func:`kept_results`.

    Args:
        most: 0 or more. What is kept beyond it goes back to the system now; 0 for none, also later. At the start 1 GiB.

    Raises:
        TypeError, ValueError: ``most`` is no integer, or below 0.
    """
    most = checked_int("keep_results", "most", most, least=0)
    if libraries:
        torch.ops.iin_fast.kept_memory.default(most)


def keep_freed_memory() -> bool:
    """Makes the process keep all freed memory for its next allocation, for training on the CPU.

    Results of this package's ops stay by themselves (:func:`kept_results`). What else a step needs, say the temporary tensors
    of an optimizer that is not fused, glibc maps anew where it has 32 MiB or more, and gives it back to the system
    when it is freed. After this call memory stays with the process, in the largest extent it ever had.
    ``iin-fast train`` and ``iin-fast demo`` make it.
    The first ten or so large blocks may still each take new memory: glibc holds back the odd bytes between aligned blocks,
    and a freed block without them is too small for the next of its size, until those stores are full.

    It changes the whole process and holds until its end, so call it in a program of your own, not in a library. The same
    from outside: ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python train.py``. Memory on a GPU is not
    concerned: torch keeps that by itself.

    Returns:
        whether the C library could be told; False where it is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
