"""Which implementation of an op runs: chosen by device, or forced by the user."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._library import cuda_versions, libraries, needed_driver

__all__ = [
    "BackendUnavailable",
    "available",
    "backend",
    "chosen",
    "ops",
    "register",
    "register_library",
    "register_triton",
]

NAMES = ("reference", "cpp", "triton")


class BackendUnavailable(RuntimeError):
    """A backend is forced that has no implementation of an op on a device."""


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: got {name!r}, expected one of {', '.join(NAMES)}")
    return name


_forced: str | None = None  # for the whole process
if os.environ.get("IIN_FAST_BACKEND"):
    _forced = _checked(os.environ["IIN_FAST_BACKEND"], "IIN_FAST_BACKEND")


class _Context:
    """An open ``with backend(name)``, told from others of the same name."""

    def __init__(self, name: str) -> None:
        self.name = name


_of_all_threads: list[_Context] = []


class _Thread(threading.local):
    """The open contexts of one thread, the innermost last.

    A thread that Python did not start, such as autograd's for a GPU, has no contexts of its own and runs the work of
    others (activation checkpoints call modules there), so it follows the innermost context of the process.
    """

    def __init__(self) -> None:
        started_elsewhere = isinstance(threading.current_thread(), threading._DummyThread)
        self.contexts = _of_all_threads if started_elsewhere else []


_thread = _Thread()

_implemented: dict[str, set[tuple[str, str]]] = {}


def register(op: str, name: str, device: str) -> None:
    """Declare that ``op`` has an implementation ``name`` for tensors on ``device`` (a device type such as "cpu")."""
    _implemented.setdefault(op, {("reference", "any")}).add((name, device))


def register_library(op: str) -> None:
    """Declare the compiled library's implementation of ``op``: for the CPU, and for NVIDIA GPUs where the build has it."""
    register(op, "cpp", "cpu")
    if "cuda" in libraries and torch.version.hip is None:  # to a ROCm torch an AMD GPU is "cuda", too
        register(op, "cpp", "cuda")


def register_triton(op: str) -> None:
    """Declare the Triton implementation of ``op``, where Triton is installed; on the CPU only for its interpreter."""
    if PathFinder.find_spec("triton") is None:
        return
    for device in ("cuda", "xpu", *(["cpu"] if os.environ.get("TRITON_INTERPRET") == "1" else [])):
        register(op, "triton", device)


def ops(name: str) -> Any:
    """The namespace of torch ops that a backend lives in: "cpp" or "triton"."""
    return torch.ops.iin_fast if name == "cpp" else torch.ops.iin_fast_triton


def available(op: str, device: str) -> list[str]:
    """The backends that can run ``op`` on tensors of a device type, in the order of NAMES."""
    have = _implemented.get(op, {("reference", "any")})
    found = [name for name in NAMES if (name, device) in have or (name, "any") in have]
    if device == "cuda" and "cpp" in found and _driver_is_too_old():
        found.remove("cpp")
    return found


_too_old: bool | None = None  # not asked yet: the question loads the driver


def _driver_is_too_old() -> bool:
    """Whether the driver is older than the compiled library needs; says so once.

    A torch of CUDA 12 runs on drivers that the library's CUDA runtime refuses. Asked at the first tensor on a GPU.
    """
    global _too_old
    if _too_old is None:
        driver, runtime = cuda_versions()
        _too_old = 0 < driver and driver // 1000 < runtime // 1000  # all drivers of a major version serve it
        if _too_old:
            warnings.warn(
                f"iin_fast: the driver serves CUDA {driver // 1000}.{driver % 1000 // 10}, the CUDA library of this build "
                f"needs {needed_driver(runtime)}; other backends run instead",
                stacklevel=2,
            )
    return _too_old


# torch.compile cannot trace the question. This is torch.compiler.assume_constant_result without an import of the compiler.
_driver_is_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_definition() -> bool:
    """Whether torch.func or forward-mode AD differentiates this call: only plain torch can follow, in any nesting.

    A call that is only mapped (torch.vmap) has batching rules instead.
    """
    if not torch._C._are_functorch_transforms_active():
        return forward_ad._current_level >= 0
    if torch.compiler.is_dynamo_compiling():  # the compiler cannot look at which transforms
        return True
    kinds = torch._C._functorch.TransformType
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in torch._C._functorch.get_interpreter_stack())


def chosen(op: str, x: Tensor) -> str:
    """The backend for this call of ``op``: the forced one, else cpp, triton, reference.

    Raises:
        BackendUnavailable: a backend is forced that has no implementation of ``op`` on the device of ``x``, or none for
            torch.func and forward-mode AD, where only "reference" has one.
    """
    device = x.device.type
    contexts = _thread.contexts
    forced = contexts[-1].name if contexts else _forced
    if needs_definition():
        if forced not in (None, "reference"):
            raise BackendUnavailable(
                f"{op}: backend {forced!r} is forced, but under torch.func and forward-mode AD only 'reference' can "
                f"run it; use iin_fast.backend('reference') there, or torch.autograd"
            )
        return "reference"
    if forced is None and ("cpp", device) in _implemented.get(op, ()):  # the usual, in one look
        if device != "cuda" or not _driver_is_too_old():
            return "cpp"
    have = available(op, device)
    if forced is not None:
        if forced not in have:
            raise BackendUnavailable(
                f"{op}: backend {forced!r} is forced, but on {device} only {', '.join(have)} can run it"
                + _remedy(forced, device)
            )
        return forced
    return "cpp" if "cpp" in have else have[-1]


def _remedy(name: str, device: str) -> str:
    if name == "cpp" and device == "cuda" and "cuda" in libraries:
        if torch.version.hip is not None:
            return "; the compiled library has no code for AMD GPUs"
        return f"; the compiled library needs {needed_driver(cuda_versions()[1])}"
    if name != "triton":
        return ""
    if PathFinder.find_spec("triton") is None:
        return "; Triton is not installed: pip install triton"
    if device == "cpu":
        return "; set TRITON_INTERPRET=1 before Python starts to run the Triton kernels on the CPU, for tests"
    return ""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for all ops that this thread calls in this context.

    Like ``torch.no_grad``, it holds for one thread: threads that run or start meanwhile choose for themselves. What was
    computed in the context also runs its backward on that backend, wherever ``backward()`` is called. Contexts may
    close in any order, as those in generators do; the innermost that is open counts.

    Args:
        name: "reference" (plain torch, the executable definition), "cpp" (the compiled library, CPU and CUDA) or
            "triton" (GPUs; CPU tensors only with TRITON_INTERPRET=1 in the environment, for tests). The environment
            variable IIN_FAST_BACKEND does the same for a whole process, where no context is open.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> import iin_fast
        >>> with iin_fast.backend("reference"):
        ...     pass
    """
    context = _Context(_checked(name, "backend"))
    lists = (_thread.contexts, _of_all_threads)
    for contexts in lists:
        contexts.append(context)
    try:
        yield
    finally:
        for contexts in lists:
            contexts.remove(context)


def registered() -> dict[str, set[tuple[str, str]]]:
    """All implementations: op -> {(backend, device type)}."""
    return {op: set(have) for op, have in _implemented.items()}
