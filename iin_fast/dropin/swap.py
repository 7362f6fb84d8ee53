"""``accelerate`` and ``restore`` for one model, ``patch`` and ``unpatch`` for a library.

A module is sped up by giving it a generated subclass of its own class: parameters, buffers, hooks, training mode and
state_dict stay untouched, isinstance holds, and restoring is the way back. The generated class pickles as the library's
own, so a saved model opens where iin-fast is not installed.
"""

import copyreg
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import TracebackType
from typing import Any

from torch import nn

from .known import Known, qualified
from .library import LIBRARIES, Library
from .report import Line, Report

__all__ = ["Patch", "accelerate", "patch", "restore", "unpatch"]

MISSING: Any = object()


class Swapped(type):
    """The type of generated classes; ``original`` is the library's own class."""

    original: type


def _reduce(cls: Swapped) -> tuple[Callable[[str], Any], tuple[str]]:
    return pkgutil.resolve_name, (f"{cls.original.__module__}:{cls.original.__qualname__}",)


copyreg.pickle(Swapped, _reduce)  # type: ignore[arg-type]

_classes: dict[type, Swapped] = {}
_patched: dict[type, dict[str, Any]] = {}  # what each patched class had of its own


def _swapped(cls: type, known: Known) -> Swapped:
    """The generated subclass of ``cls``."""
    if cls not in _classes:
        namespace = known.fast(cls, lambda instance: True) | {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        made = Swapped(cls.__name__, (cls,), namespace)
        made.original = cls
        _classes[cls] = made
    return _classes[cls]


def _why_not(module: Any, cls: type, known: Known) -> str | None:
    """Why ``module``, an instance of exactly ``cls``, can't be sped up, or None."""
    reason = known.unknown_source(cls)
    if reason is None:
        own = [name for name in known.methods if name in vars(module)]
        reason = f"the instance has its own {own[0]}" if own else known.refuse(module)
    return reason


def accelerate(model: nn.Module) -> Report:
    """Speed up all modules of ``model`` that are known, in place; parameters, hooks and results stay.

    Args:
        model: any module tree. Modules whose class is exactly one that is known (docs/dropin.md) get the fast form;
            subclasses, unknown versions and options are left as they are.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> report = accelerate(nn.Linear(2, 2))
        >>> print(report)
        nothing of a known library found
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}, expected a torch.nn.Module")
    lines = []
    for path, module in model.named_modules():
        if isinstance(type(module), Swapped):
            lines.append(Line(path, qualified(type(module)), True, "already"))
            continue
        library = LIBRARIES.get(type(module).__module__.split(".")[0]) or _library_of(module)
        if library is not None:
            lines.extend(_accelerate(path, module, library))
    return Report(lines)


def _library_of(module: nn.Module) -> Library | None:
    """The library of a class that the user derived from one that is known."""
    for base in type(module).__mro__[1:]:
        library = LIBRARIES.get(base.__module__.split(".")[0])
        if library is not None:
            return library
    return None


def _accelerate(path: str, module: nn.Module, library: Library) -> Iterator[Line]:
    cls: type = type(module)
    name = qualified(cls)
    known = library.known.get(name)
    if known is not None and cls in _patched:
        yield Line(path, name, True, "by patch")
    elif known is not None:
        reason = _why_not(module, cls, known)
        if reason is None:
            try:
                module.__class__ = _swapped(cls, known)  # type: ignore[assignment]
            except TypeError as error:  # another memory layout, such as a class with slots
                reason = str(error)
        yield Line(path, name, reason is None, known.note if reason is None else reason)
    elif name in library.left:
        yield Line(path, name, False, library.left[name])
    else:
        base = next((b for b in cls.__mro__[1:] if qualified(b) in library.known), None)
        if base is not None:
            yield Line(path, name, False, f"a subclass of {base.__name__}")
        elif not any(vars(module).get(attribute) is not None for attribute in library.attributes) and any(
            qualified(b) in library.bases for b in cls.__mro__[1:]
        ):
            if name not in library.containers:
                yield Line(path, name, False, "no faster form")
    for attribute in library.attributes:
        value = vars(module).get(attribute)
        if value is None:
            continue
        maker: Any = value.func if isinstance(value, partial) else value
        if isinstance(maker, Swapped):
            yield Line(path, f"{name}.{attribute}", True, "already")
            continue
        label = (
            f"{name}.{attribute} = {qualified(maker) if isinstance(maker, type) else getattr(maker, '__name__', maker)}"
        )
        made = library.known.get(qualified(maker)) if isinstance(maker, type) else None
        if made is None:
            yield Line(path, label, False, "no faster form")
        elif maker in _patched:
            yield Line(path, label, True, "by patch")
        elif (reason := made.unknown_source(maker)) is not None:
            yield Line(path, label, False, reason)
        else:
            swapped: Any = _swapped(maker, made)
            if isinstance(value, partial):
                swapped = partial(swapped, *value.args, **value.keywords)
            vars(module)[attribute] = swapped
            yield Line(path, label, True, made.note)


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: all modules of ``model`` get their own classes back.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model is a {type(model).__name__}, expected a torch.nn.Module")
    names = {attribute for library in LIBRARIES.values() for attribute in library.attributes}
    for module in model.modules():
        cls: Any = type(module)
        if isinstance(cls, Swapped):
            module.__class__ = cls.original  # type: ignore[assignment]
        for name in names & vars(module).keys():
            value = vars(module)[name]
            maker = value.func if isinstance(value, partial) else value
            if isinstance(maker, Swapped):
                back = maker.original
                vars(module)[name] = partial(back, *value.args, **value.keywords) if value is not maker else back


class Patch(AbstractContextManager["Patch"]):
    """What :func:`patch` returns: its ``report``, and a context manager that undoes it at the end."""

    def __init__(self, names: tuple[str, ...], report: Report) -> None:
        self.names = names
        self.report = report

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.names:
            unpatch(*self.names)


def _libraries(where: str, names: tuple[str, ...]) -> dict[str, Library]:
    by_name = {library.name: library for library in LIBRARIES.values()}
    for name in names:
        if not isinstance(name, str) or name.lower() not in by_name:
            raise ValueError(f"{where}: library is {name!r}, expected one of {', '.join(by_name)}")
    return {name.lower(): by_name[name.lower()] for name in names}


def patch(*names: str) -> Patch:
    """Speed up every model of these libraries in this process, present and future.

    ``patch("nflows", "zuko")`` stays until :func:`unpatch`; ``with patch("nflows"):`` until the end of the block. An
    instance whose class is not exactly a known one, whose options are not known, or an input of another type runs the
    library's own code.

    Args:
        names: "nflows", "normflows", "freia", "zuko", "iin", "net2net", "invariances".

    Returns:
        An object with ``report``, which is also a context manager.

    Raises:
        ValueError: no name, or an unknown one.
        ImportError: a library is not installed.
    """
    if not names:
        raise ValueError(
            f"patch: no library given, expected some of {', '.join(lib.name for lib in LIBRARIES.values())}"
        )
    libraries = _libraries("patch", names)
    for library in libraries.values():
        for module in library.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ImportError(f"patch: {library.name} can't be imported ({error}); {library.install}") from error
    lines, fresh = [], []
    for name, library in libraries.items():
        already = any(cls in _patched for cls in library.classes().values())
        for cls_name, cls in library.classes().items():
            known = library.known[cls_name]
            reason = None if cls in _patched else known.unknown_source(cls)
            if reason is None and cls not in _patched:
                _patch(cls, known)
            lines.append(Line("", cls_name, reason is None, known.note if reason is None else reason))
        lines.extend(Line("", left, False, why) for left, why in library.left.items())
        if not already:
            fresh.append(name)
    return Patch(tuple(fresh), Report(lines))


def _becoming(cls: type, swapped: Swapped) -> Callable[..., None]:
    """An ``__init__`` of ``cls`` that makes instances of exactly ``cls`` fast ones."""
    original = vars(cls)["__init__"]

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is not cls:
            original(self, *args, **kwargs)
            return
        self.__class__ = swapped
        swapped.__init__(self, *args, **kwargs)  # type: ignore[misc]

    return init


def _patch(cls: type, known: Known) -> None:
    fast: dict[str, Any]
    if known.at_init:
        fast = {"__init__": _becoming(cls, _swapped(cls, known))}
    else:
        fast = known.fast(cls, lambda instance: type(instance) is cls)
    _patched[cls] = {name: vars(cls).get(name, MISSING) for name in fast}
    for name, value in fast.items():
        setattr(cls, name, value)


def unpatch(*names: str) -> None:
    """Undo :func:`patch` for these libraries, or for all where none is named.

    Raises:
        ValueError: an unknown name.
    """
    chosen = _libraries("unpatch", names) if names else {library.name: library for library in LIBRARIES.values()}
    for library in chosen.values():
        for cls in library.classes().values():
            for name, value in _patched.pop(cls, {}).items():
                if value is MISSING:
                    delattr(cls, name)
                else:
                    setattr(cls, name, value)
