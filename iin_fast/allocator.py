"""What becomes of memory that this process frees."""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt (malloc.h)


def keep_freed_memory() -> bool:
    """Makes the process keep freed memory for its next allocation, for training on the CPU.

    glibc maps every block of 32 MiB or more anew and gives it back to the system when it is freed. The gradients of a
    large flow are such blocks, which a training loop frees and needs again at every step: the system has to find and
    clear each page once more, which can take longer than the backward itself (docs/performance.md). After this call
    memory stays with the process, in the largest extent it ever had. ``iin-fast train`` and ``iin-fast demo`` make it.
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
