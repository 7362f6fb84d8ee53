"""Loads the compiled libraries, so that their ops stand in torch.ops.iin_fast."""

from pathlib import Path

import torch

try:
    from ._build_info import SCHEMAS  # type: ignore[import-not-found,attr-defined,unused-ignore]
except ImportError:  # a source tree that was not built
    SCHEMAS = []

__all__ = ["cpu_isa", "cuda_versions", "libraries", "needed_driver", "registrations"]

_FOLDER = Path(__file__).parent / "lib"


def registrations(namespace: str, kind: str) -> torch.library.Library:
    """Where Python registers for the ops of a namespace. Takes back what an earlier import of this package registered.

    Notebooks and test runners reload modules, or purge them from sys.modules; torch keeps what they registered.
    """
    kept: dict[str, torch.library.Library] = vars(torch.ops).setdefault("_iin_fast_registrations", {})
    name = f"{namespace} {kind}"
    if name in kept:
        kept[name]._destroy()
    kept[name] = torch.library.Library(namespace, kind)
    return kept[name]


def _load() -> dict[str, Path]:
    cpu = _FOLDER / "libiin_fast_cpu.so"
    if SCHEMAS:  # the ops without kernels: what traces and registers finds them, and no call reaches them
        library = registrations("iin_fast", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        return {}
    if not cpu.exists():
        raise ImportError(
            f"iin_fast: the compiled library {cpu.name} is missing from {_FOLDER}; "
            "install the wheel, or build in a source tree with `pip install -e . --no-build-isolation`; "
            "with IIN_FAST_NATIVE=off before that it does without"
        )
    for path in map(Path, torch.ops.loaded_libraries):
        if path.name == cpu.name and path.parent.resolve() != _FOLDER.resolve():
            raise ImportError(
                f"iin_fast: this process has loaded the copy in {path.parents[1]}, and torch cannot load that in "
                f"{_FOLDER.parent} beside it; remove one of the two, or start Python anew"
            )
    loaded = {"cpu": cpu}
    torch.ops.load_library(cpu)
    cuda = _FOLDER / "libiin_fast_cuda.so"
    if cuda.exists():
        torch.ops.load_library(cuda)
        loaded["cuda"] = cuda
    return loaded


libraries: dict[str, Path] = _load()
"""The loaded libraries by name: "cpu", and "cuda" where the build had a CUDA compiler. Empty in a pure package."""


_DRIVERS = {12: 525, 13: 580}  # the first driver of each CUDA, by NVIDIA's release notes


def cuda_versions() -> tuple[int, int]:
    """The CUDA that the driver serves and the one that the compiled library needs, as 1000 major + 10 minor.

    0 where there is no driver, or no CUDA library.
    """
    if "cuda" not in libraries:
        return 0, 0
    return torch.ops.iin_fast.cuda_driver(), torch.ops.iin_fast.cuda_compiler()


def needed_driver(runtime: int) -> str:
    """What to tell a user of the driver that a CUDA library needs: every driver of its major version, or a later one."""
    major = runtime // 1000
    number = f" ({_DRIVERS[major]} or later)" if major in _DRIVERS else ""
    return f"a driver for CUDA {major} or later{number}"


def cpu_isa() -> str:
    """The instruction set that the CPU loops use on this machine: avx512, avx2 or baseline; none in a pure package.

    The environment variable IIN_FAST_CPU=avx2|baseline, read at the first call of an op, forces a lesser one.
    """
    return torch.ops.iin_fast.cpu_isa() if libraries else "none: a pure package, in which plain torch computes"
