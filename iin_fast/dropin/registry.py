"""One class of a library that has a faster form, and the conditions under which that form computes the same."""

import ast
import hashlib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..backends import chosen
from .sources import ALL_SOURCES, PROGRAM_SOURCES, SOURCES

__all__ = [
    "AFFINE_DEVICES",
    "ALONE",
    "Entry",
    "eligible",
    "fingerprint",
    "fingerprint_of",
    "in_dynamo_onnx_export",
    "lookup",
    "made_in",
    "qualified",
    "unknown_functions",
    "worth_it",
]

AFFINE_DEVICES = ("cuda",)
"""Where an affine layer outside of a program takes a fused op. On a CPU one call of it costs as much as the few kernels that
it replaces. The fast form of ActNorm spares a GPU's synchronisation, of which a CPU has none."""
ALONE = "alone on the "  # so that a reason begins


def qualified(cls: type) -> str:
    """``module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def lookup(name: str) -> Any:
    """The object of a qualified name, in modules that are loaded already; None where there is none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        if found is not None:
            for part in parts[end:]:
                found = vars(found).get(part) if isinstance(found, type) else getattr(found, part, None)
            return found
    return None


def made_in(function: Any, maker: str) -> CodeType | None:
    """The code of a function that a function of this qualified name makes, or None for one of the user's."""
    code, made_by = getattr(function, "__code__", None), getattr(lookup(maker), "__code__", None)
    known = isinstance(made_by, CodeType) and any(code is const for const in made_by.co_consts)
    return code if known and isinstance(code, CodeType) else None


@dataclass(frozen=True)
class Entry:
    """A class that can be sped up.

    Args:
        name: its qualified name.
        methods: for each method that is replaced, ``fast(original, self, *args)``, which may call ``original(self, …)``
            for an input that it does not take.
        relies_on: qualified names of further functions whose behaviour the fast methods reproduce.
        refuse: why an instance can't be replaced, or None.
        rechecks: ask ``refuse`` at every call, so that an option that changes later is seen.
        note: what a reader of the report should know.
        attributes: class attributes that the fast form adds.
        at_init: instances are short-lived and no modules: ``patch`` lets them become fast ones in their ``__init__``,
            so that they stay whole when the patch ends before they do.
        root: instances run what they hold, or themselves, as programs.
        whole: the fast methods do nothing but run programs.
        affine: a fused op pays on the ``AFFINE_DEVICES`` alone.
        inherited: instances of classes that are derived take the methods that they inherit, too.
    """

    name: str
    methods: Mapping[str, Callable[..., Any]]
    relies_on: tuple[str, ...] = ()
    refuse: Callable[[Any], str | None] | None = None
    rechecks: bool = True
    note: str = ""
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    at_init: bool = False
    root: bool = False
    whole: bool = False
    affine: bool = False
    inherited: bool = False

    def unknown_source(self, cls: type) -> str | None:
        """Why the source of ``cls`` is not one that is known, or None."""
        found = fingerprint(cls, self)
        if found is None:
            return "its source can't be read, or was changed at run time"
        if found not in SOURCES.get(self.name, ()):
            return f"a version of its source that is not known ({found})"
        return None

    def fast(self, cls: type, accept: Callable[[Any], bool]) -> dict[str, Any]:
        """The attributes of the fast form of ``cls``; an instance that is not accepted runs the library's own code."""
        made: dict[str, Any] = dict(self.attributes)
        for name, function in self.methods.items():
            own = _own(getattr(cls, name))
            made[name] = _method(function, own, self.refuse if self.rechecks else None, accept)
            made[name]._iin_fast_own = own
        return made


def _method(
    function: Callable[..., Any],
    original: Callable[..., Any],
    refuse: Callable[[Any], str | None] | None,
    accept: Callable[[Any], bool],
) -> Callable[..., Any]:
    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not accept(self) or (refuse is not None and refuse(self) is not None):
            return original(self, *args, **kwargs)
        return function(original, self, *args, **kwargs)

    return method


def fingerprint(cls: type, known: Entry) -> str | None:
    """A hash of the source of all functions that a fast form stands for; comments at the end, spaces and docstrings aside.

    None where a source can't be read, or where a function was put in at run time.
    """
    return _digest(_functions(cls, (*known.methods, *known.relies_on)))


def fingerprint_of(cls: type, functions: tuple[str, ...]) -> str | None:
    """The same for what a program stands for: attributes of ``cls``, and functions by their qualified names."""
    return _digest(_functions(cls, functions))


def _functions(cls: type, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The library's own functions, also while its classes are patched."""
    return tuple(_own(lookup(name) if "." in name else getattr(cls, name, None)) for name in names)


def _own(function: Any) -> Any:
    """What ``patch`` put another function in the place of, in a class or in one that it derives from."""
    return getattr(function, "_iin_fast_own", function)


def unknown_functions(name: str, cls: type, names: tuple[str, ...]) -> str | None:
    """Why a program can't stand for these functions of a class, or None."""
    found = _digest(_functions(cls, names))
    if found is None:
        return "its source can't be read, or was changed at run time"
    return None if found in PROGRAM_SOURCES.get(name, ()) else f"a version of its source that is not known ({found})"


@cache
def _digest(functions: tuple[Any, ...]) -> str | None:
    """One reading of the sources serves every model and every patch."""
    plain = []
    for function in functions:
        if isinstance(function, staticmethod):
            function = function.__func__
        if isinstance(function, property):
            function = function.fget
        if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            return None
        plain.append(function)
    quick = _hash(map(_lines, plain))
    return quick if quick in ALL_SOURCES else _hash(map(_source, plain))


def _hash(sources: Iterable[str | None]) -> str | None:
    digest = hashlib.sha256()
    for source in sources:
        if source is None:
            return None
        digest.update("".join(source.split()).encode())
    return digest.hexdigest()[:12]


@cache
def _lines(function: FunctionType) -> str:
    """The source of a function without its docstring, by indentation alone.

    A hundred times as fast as a parser. Where it is not what a parser finds, its hash is none that is known.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    depth, found = 0, []
    for line in lines:  # the header
        found.append(line)
        depth += line.count("(") - line.count(")")
        if depth == 0 and line.partition("#")[0].rstrip().endswith(":"):
            break
    margin = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    quotes = ""
    for number, line in enumerate(lines[len(found) :]):
        text = line.lstrip()
        if number == 0 and text.lstrip("r").startswith(('"""', "'''")):
            quotes = text.lstrip("r")[:3]
            text = text.lstrip("r")[3:]
        if quotes:
            quotes = "" if quotes in text else quotes
        elif text and len(line) - len(text) <= margin:
            break
        else:
            found.append(line)
    return "".join(found)


def _source(function: FunctionType) -> str | None:
    """The source of a function without its docstring."""
    try:
        source = textwrap.dedent(inspect.getsource(function.__code__))
        tree = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    first, lines = tree.body[0], source.splitlines()
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines[first.lineno - 1 : first.end_lineno] = []
    return "\n".join(lines)


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# torch.compile, which one of the exporters uses, would take it for False. This is torch.compiler.assume_constant_result
# without an import of the compiler.
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_dynamo_onnx_export() -> bool:
    """Whether torch.onnx's newer exporter traces this call; it can't follow code that branches on values."""
    return torch.compiler.is_compiling() and _in_onnx_export()


def eligible(*tensors: Any) -> bool:
    """Whether the ops take these: float32 or float64, all alike, on a CPU or an NVIDIA GPU.

    Under torch.func transforms and forward-mode differentiation the library's own code runs. So it does in an export to
    ONNX, which knows none of the ops, unless the definition in plain torch is forced.
    """
    first = tensors[0]
    if not isinstance(first, Tensor) or first.dtype not in (torch.float32, torch.float64):
        return False
    if first.device.type not in ("cpu", "cuda") or torch.is_autocast_enabled(first.device.type):
        return False
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dtype != first.dtype or tensor.device != first.device:
            return False
    if (torch.compiler.is_compiling() or torch.jit.is_tracing()) and _in_onnx_export():
        return chosen("spline_coupling", first) == "reference"
    if torch.compiler.is_compiling():
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not any(wrapped(tensor) for tensor in tensors)


def worth_it(x: Tensor) -> bool:
    """Whether an affine layer outside of a program takes its fast form on the device of ``x``."""
    return x.device.type in AFFINE_DEVICES
