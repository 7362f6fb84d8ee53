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
    "chosen_compiled",
    "ops",
    "register",
    "register_library",
    "register_triton",
]

NAMES = ("reference", "cpp", "triton")

OLDEST_GPU = (8, 0)
"""The compute capability that the GPU kernels need."""


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
    """Declare the definition of ``op``, and the compiled library's: for the CPU, and for NVIDIA GPUs where the build has it."""
    register(op, "reference", "any")
    if "cpu" in libraries:
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


def available(op: str, device: str, index: int | None = None) -> list[str]:
    """The backends that can run ``op`` on tensors of a device type, in the order of NAMES. ``index``: of which GPU."""
    have = _implemented.get(op, {("reference", "any")})
    found = [name for name in NAMES if (name, device) in have or (name, "any") in have]
    return [name for name in found if _runs_on(name, index)] if device == "cuda" else found


_unfit: dict[int, dict[str, str]] = {}  # GPU -> the backends that it or its driver cannot run, and why


def _runs_on(name: str, index: int | None) -> bool:
    """Whether a GPU and its driver can run a backend; says so once if not. Asked at the first tensor on that GPU."""
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    if index not in _unfit:
        _unfit[index] = _reasons(index)
        for reason in dict.fromkeys(_unfit[index].values()):
            warnings.warn(f"iin_fast: {reason}; other backends run instead", stacklevel=2)
    return name not in _unfit[index]


# torch.compile cannot trace the question. This is torch.compiler.assume_constant_result without an import of the compiler.
_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reasons(index: int) -> dict[str, str]:
    if torch.version.hip is not None:
        return {}
    capability = torch.cuda.get_device_capability(index) if torch.cuda.is_available() else OLDEST_GPU
    if capability < OLDEST_GPU:
        (major, minor), (first, _) = capability, OLDEST_GPU
        reason = f"cuda:{index} has compute capability {major}.{minor}, the GPU kernels need {first}.0 or later"
        return dict.fromkeys(("cpp", "triton"), reason)
    driver, compiler = cuda_versions()
    if 0 < driver and driver // 1000 < compiler // 1000:  # all drivers of a major version serve it
        serves = f"the driver serves CUDA {driver // 1000}.{driver % 1000 // 10}"
        return {"cpp": f"{serves}, the CUDA library of this build needs {needed_driver(compiler)}"}
    return {}


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
    if forced is None and ("cpp", device) in _implemented.get(op, ()):  # the usual case, first
        if device != "cuda" or _runs_on("cpp", x.device.index):
            return "cpp"
    have = available(op, device, x.device.index)
    if forced is not None:
        if forced not in have:
            raise BackendUnavailable(
                f"{op}: backend {forced!r} is forced, but on {device} only {', '.join(have)} can run it"
                + _remedy(forced, x.device)
            )
        return forced
    return "cpp" if "cpp" in have else have[-1]


def chosen_compiled(op: str, x: Tensor) -> bool:
    """Whether the compiled library runs ``op`` on ``x``, where torch.func and torch.compile have no part in the call."""
    contexts, device = _thread.contexts, "cpu" if x.is_cpu else x.device.type
    forced = contexts[-1].name if contexts else _forced
    if forced not in (None, "cpp") or ("cpp", device) not in _implemented.get(op, ()):
        return False
    if forward_ad._current_level >= 0:
        return False
    return device != "cuda" or _runs_on("cpp", x.device.index)


def _remedy(name: str, device: torch.device) -> str:
    if device.type == "cuda" and not _runs_on(name, device.index):
        return f"; {next(reasons[name] for reasons in _unfit.values() if name in reasons)}"
    if name == "cpp" and not libraries:
        return "; this is a pure package: install it without IIN_FAST_NATIVE=off, where there is a C++ compiler"
    if name == "cpp" and device.type == "cuda" and "cuda" in libraries:
        return "; the compiled library has no code for AMD GPUs"
    if name != "triton":
        return ""
    if PathFinder.find_spec("triton") is None:
        return "; Triton is not installed: pip install triton"
    if device.type == "cpu":
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
