"""Compiles the CUDA kernels of an op for the host and loads them. How they run: include/emulator.h."""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from op_cases import DTYPES
from sanitizers import WITHOUT_SCOPES
from torch import Tensor

__all__ = [
    "DTYPES",
    "ONLY_TYPE",
    "RACES",
    "SANITIZE",
    "LaunchPlan",
    "Matrix",
    "call",
    "data",
    "load",
    "matrix",
    "sanitizer_environment",
    "type_name",
]

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "cuda_emulator"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"),
    "-U_FORTIFY_SOURCE",  # which takes a jump to another stack for a mistake
    *(f"-I{Path(__file__).parent / 'include'}", f"-I{ROOT / 'csrc'}"),  # first what stands in for csrc's own
    *("-isystem", str(Path(torch.__file__).parent / "include")),  # for its headers without a library
]
# each library with shared memory of its own, not that of the first one which a process loads; no guards of statics, which are
# atomic
RACE_FLAGS = ["-DEMULATOR_RACES", "-fno-gnu-unique", "-fno-threadsafe-statics"]
SANITIZER_FLAGS = [
    "-fsanitize=address,alignment,bounds",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    WITHOUT_SCOPES,
]

RACES = os.environ.get("IIN_FAST_TEST_RACES") == "1"
"""Whether the kernels run under the race checker (races.cpp)."""

SANITIZE = os.environ.get("IIN_FAST_TEST_SANITIZE") == "1"
"""Whether this process runs the kernels under AddressSanitizer; it must then run in sanitizer_environment()."""

ONLY_TYPE = os.environ.get("IIN_FAST_TEST_TYPE", "")
"""The one type that kernels are compiled for, "" for all of them. A checker takes a minute for each; make sanitize has all."""


@functools.cache
def _sources() -> bytes:
    """All that a compiled kernel may depend on, digested."""
    digest = hashlib.sha256()
    for folder in (ROOT / "csrc", Path(__file__).parent):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp") and not path.name.endswith(("_cpu.cpp", "_loops.cpp")):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    digest.update(subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout)
    return digest.digest()


@functools.cache
def load(name: str, races: bool = RACES) -> ctypes.CDLL:
    """The library of tests/cuda_emulator/<name>.cpp, compiled if anything has changed since the last time."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host")
    flags = FLAGS + (SANITIZER_FLAGS if SANITIZE else []) + (RACE_FLAGS if races else [])
    if ONLY_TYPE:
        flags = [*flags, f'-DONLY_TYPE="{only_type(name)}"']
    key = hashlib.sha256(_sources() + repr((name, flags)).encode()).hexdigest()[:16]
    library = CACHE / f"{name}-{key}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        if not library.exists():
            unfinished = library.with_suffix(".tmp")
            # not with a sanitizer in the compiler's own process
            compile = functools.partial(subprocess.run, check=True, env=os.environ | {"LD_PRELOAD": ""})
            sources = [str(Path(__file__).parent / f"{name}.cpp")]
            if races:  # the checker takes the place of the library that -fsanitize=thread would link
                instrumented = str(CACHE / f"{name}-{key}.o")
                compile(["g++", *flags, "-fsanitize=thread", "-c", *sources, "-o", instrumented])
                sources = ["-O2", instrumented, str(Path(__file__).parent / "races.cpp")]
            compile(["g++", *flags, *sources, "-o", str(unfinished)])
            unfinished.rename(library)
    return ctypes.CDLL(str(library))


def call(function: "ctypes._NamedFuncPointer", *arguments: object) -> None:
    """Calls a function of such a library, whose faults come back as text.

    Raises:
        RuntimeError: the emulator's report.
    """
    function.restype = ctypes.c_char_p
    fault = function(*arguments)
    if fault is not None:
        raise RuntimeError(fault.decode())


class Matrix(ctypes.Structure):
    """Rows of a [rows, features] tensor whose features are contiguous (binding.h)."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class LaunchPlan(ctypes.Structure):
    """What a test asks of a launch, and learns of it (binding.h)."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("max_blocks", "multiprocessors", "vector", "lanes", "blocks", "parts", "launches")
    ]

    def __init__(self, max_blocks: int = 2**31 - 1, multiprocessors: int = 8) -> None:
        super().__init__(max_blocks, multiprocessors)


def matrix(t: Tensor | None) -> Matrix:
    if t is None:
        return Matrix(None, 0)
    assert t.dim() == 2 and (t.shape[1] < 2 or t.stride(1) == 1)
    return Matrix(t.data_ptr(), t.stride(0) if len(t) > 1 else 0)


def data(t: Tensor | None) -> ctypes.c_void_p:
    assert t is None or t.is_contiguous()
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def only_type(library: str) -> str:
    """ONLY_TYPE, of the library of programs float64, which its tests are in."""
    return "float64" if ONLY_TYPE and library == "flow_program" else ONLY_TYPE


def type_name(dtype: torch.dtype, library: str = "") -> bytes:
    name, only = str(dtype).removeprefix("torch."), only_type(library)
    if only not in ("", name):
        pytest.skip(f"the kernels are compiled for {only} alone")
    return name.encode()


def sanitizer_environment() -> dict[str, str]:
    """The environment of a Python process that can load sanitized libraries."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host")
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    return os.environ | {
        "IIN_FAST_TEST_SANITIZE": "1",
        "LD_PRELOAD": found.stdout.strip(),
        # Python and torch leave memory to the end of the process
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    }
