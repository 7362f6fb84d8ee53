"""Loads the compiled libraries, so that their ops stand in torch.ops.iin_fast."""

from pathlib import Path

import torch

__all__ = ["cpu_isa", "cuda_versions", "libraries", "needed_driver"]

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


_DRIVERS = {12: 525, 13: 580}  # the first driver of each CUDA, by NVIDIA's release notes


def cuda_versions() -> tuple[int, int]:
    """The CUDA that the driver serves and the one that the compiled library needs, as 1000 major + 10 minor.

    0 where there is no driver, or no CUDA library.
    """
    if "cuda" not in libraries:
        return 0, 0
    return torch.ops.iin_fast.cuda_driver(), torch.ops.iin_fast.cuda_runtime()


def needed_driver(runtime: int) -> str:
    """What to tell a user of the driver that a CUDA library needs: every driver of its major version, or a later one."""
    major = runtime // 1000
    number = f" ({_DRIVERS[major]} or later)" if major in _DRIVERS else ""
    return f"a driver for CUDA {major} or later{number}"


def cpu_isa() -> str:
    """The instruction set that the CPU loops use on this machine: avx512, avx2 or baseline.

    The environment variable IIN_FAST_CPU=avx2|baseline, read at the first call of an op, forces a lesser one.
    """
    return torch.ops.iin_fast.cpu_isa()
