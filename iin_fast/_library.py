"""Loads the compiled libraries, so that their ops stand in torch.ops.iin_fast."""

from pathlib import Path

import torch

__all__ = ["cpu_isa", "libraries"]

_FOLDER = Path(__file__).parent / "lib"


def _load() -> dict[str, Path]:
    cpu = _FOLDER / "libiin_fast_cpu.so"
    if not cpu.exists():
        raise ImportError(
            f"iin_fast: the compiled library {cpu.name} is missing from {_FOLDER}; "
            "install the wheel, or build in a source tree with `pip install -e . --no-build-isolation`"
        )
    loaded = {"cpu": cpu}
    torch.ops.load_library(cpu)
    cuda = _FOLDER / "libiin_fast_cuda.so"
    if cuda.exists():
        torch.ops.load_library(cuda)
        loaded["cuda"] = cuda
    return loaded


libraries: dict[str, Path] = _load()
"""The loaded libraries by name: "cpu", and "cuda" where the build had a CUDA compiler."""


def cpu_isa() -> str:
    """The instruction set that the CPU loops use on this machine: avx512, avx2 or baseline.

    The environment variable IIN_FAST_CPU=avx2|baseline, read at the first call of an op, forces a lesser one.
    """
    return torch.ops.iin_fast.cpu_isa()
