"""``accelerate`` and ``restore`` for one model, ``patch`` and ``unpatch`` for a library.

A module is sped up by giving it a generated subclass of its own class: parameters, buffers, hooks, training mode and
state_dict stay untouched, isinstance holds, and restoring is the way back. The generated class pickles as the library's
own, so a saved model opens where iin-fast is not installed.
"""

import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial, wraps
from threading import RLock
from types import TracebackType
from typing import Any

import torch
from torch import nn

from . import registry
from .class_factory import FastClass, generate, original
from .library import ALL, LIBRARIES, Library
from .optimizers import ADAM, OPTIMIZERS, fuse, fused_init, unfuse
from .programs import summary
from .programs.plan import KEPT
from .registry import Entry, qualified
from .report import Line, Report
from .stacks import freeze

__all__ = ["Patch", "accelerate", "patch", "restore", "unpatch"]

MISSING: Any = object()
BY_NAME = {library.name: library for library in ALL}
BACKENDS = {"sbi": ("nflows", "zuko", "sbi")}  # whose models these libraries build


_lock = RLock()  # what is generated, patched and held changes under it
_classes: dict[type, FastClass] = {}
_patched: dict[Any, dict[str, Any]] = {}  # what each patched class or module had of its own
_holders: dict[str, set["Patch"]] = {}  # who keeps a library patched


def _fast(cls: type, known: Entry) -> FastClass:
    """The generated subclass of ``cls``. What a user derives from it runs the library's own code, as it may override any."""
    if cls not in _classes:

        def accept(instance: Any) -> bool:
            return type(instance) is made or _by_torch(type(instance))

        made = generate(cls, known.fast(cls, accept))
        _classes[cls] = made
    return _classes[cls]


def _by_torch(cls: type) -> bool:
    """Whether torch derived ``cls`` from a generated class: for a parametrization, for ``fully_shard``."""
    first = next((base for base in cls.__mro__ if not base.__module__.startswith("torch.")), cls)
    return first is not cls and original(first) is not None


def _why_not(module: Any, cls: type, known: Entry) -> str | None:
    """Why ``module``, an instance of exactly ``cls``, can't be sped up, or None."""
    reason = known.unknown_source(cls)
    if reason is None:
        own = [name for name in known.methods if name in vars(module)]
        if own:
            return f"the instance has its own {own[0]}"
        reason = known.refuse(module) if known.refuse is not None else None
    if reason is None and known.affine and (device := _device(module)) not in registry.AFFINE_DEVICES:
        reason = f"{registry.ALONE}{device.upper()} a fused op gains nothing"
    return reason


def _device(module: nn.Module) -> str:
    """The type of the device that holds what a module computes with."""
    return next((t.device.type for t in (*module.parameters(), *module.buffers())), "cpu")


def accelerate(model: nn.Module | torch.optim.Optimizer, *, frozen: bool = False) -> Report:
    """Speed up all modules of ``model`` that are known, in place; parameters, hooks and results stay.

    Args:
        model: any module tree. Modules whose class is exactly one that is known (docs/dropin.md) get the fast form;
            subclasses, unknown versions and options are left as they are. Or an optimizer: ``torch.optim.Adam`` and ``AdamW``
            become torch's fused ones, with less Python around the kernel, unless another form was asked for.

        frozen: the Parameters will not change. Published stacks (CompVis/iin, net2net, invariances) then lay their weights
            out once for evaluation, not at every call. A change that torch counts is still seen, one through ``.data`` not.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: ``model`` is neither a module nor an optimizer.

    Warns:
        UserWarning: ``model`` holds modules of a known library, and none was replaced.

    Example:
        >>> report = accelerate(nn.Linear(2, 2))
        >>> print(report)
        nothing of a known library found
    """
    if isinstance(model, torch.optim.Optimizer):
        return Report([fuse(model)])
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: model is a {type(model).__name__}, expected a torch.nn.Module or a torch.optim.Optimizer"
        )
    lines = []
    with _lock:
        for path, module in model.named_modules():
            freeze(module, frozen)
            if isinstance(type(module), FastClass):
                name, fast = qualified(type(module)), original(type(module)) is not None or _by_torch(type(module))
                lines.append(Line(path, name, fast, "already" if fast else "derived from an accelerated class"))
                continue
            library = LIBRARIES.get(type(module).__module__.split(".")[0]) or _library_of(module)
            if library is not None:
                lines.extend(_accelerate(path, module, library))
        report = Report(_with_programs(model, lines))
    if report.lines and not report.replaced:
        packages = {line.name.split(".")[0] for line in report.lines}
        for library in [LIBRARIES[package] for package in LIBRARIES if package in packages]:
            _warn("accelerate", library)
    return report


def _with_programs(model: nn.Module, lines: Iterable[Line]) -> Iterator[Line]:
    """The lines with what runs in programs, and why the rest does not."""
    paths = {id(module): path for path, module in model.named_modules()}
    known: dict[str, Entry] = {}
    roots: dict[str, str] = {}
    said: dict[str, str] = {}
    done: set[int] = set()  # modules that a program stands for
    for module in model.modules():
        cls: Any = type(module)
        own = original(cls) or cls
        library = LIBRARIES.get(own.__module__.split(".")[0])
        entry = None if library is None or (own is cls and own not in _patched) else library.by_name.get(qualified(own))
        if library is None or library.programs is None or entry is None:
            continue
        known[paths[id(module)]] = entry
        if not entry.root or id(module) in done:
            continue
        found = summary(library.programs, module)
        cut = {id(part) for layer in found.cuts for part in layer.module.modules()}
        if found.inside:
            done.update(id(part) for part in module.modules() if id(part) not in cut)
            roots[paths[id(module)]] = str(found)
        if entry.whole and original(cls) is not None and all(cut.forever for cut in found.cuts) and not found.inside:
            module.__class__ = own  # the checks of each call would be for nothing
        for layer, why, _ in found.cuts:
            said.setdefault(paths[id(layer)], why)
    inside = {paths[i] for i in done}
    for line in lines:
        path, entry = line.path, known.get(line.path)
        if path in roots:
            yield replace(line, replaced=True, why=roots[path])
        elif path in inside:
            yield replace(line, replaced=True, why="already" if line.why == "already" else "in a program")
        elif entry is not None and entry.whole:
            if path in said:
                yield replace(line, replaced=False, why=said[path])
            elif any(p.startswith(f"{path}." if path else "") for p in inside):
                yield line
        elif path in said and (line.why in ("", "no faster form") or line.why.startswith(registry.ALONE)):
            yield replace(line, why=f"in no program: {said[path]}")
        else:
            yield line


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
    known = library.by_name.get(name)
    if known is not None and cls in _patched:
        yield Line(path, name, True, "by patch")
    elif known is not None:
        reason = _why_not(module, cls, known)
        if reason is None:
            try:
                module.__class__ = _fast(cls, known)  # type: ignore[assignment]
            except TypeError as error:  # another memory layout, such as a class with slots
                reason = str(error)
        yield Line(path, name, reason is None, known.note if reason is None else reason)
    elif name in library.left:
        yield Line(path, name, False, library.left[name])
    else:
        base = next((b for b in cls.__mro__[1:] if (k := library.by_name.get(qualified(b))) and not k.whole), None)
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
        if original(maker):
            yield Line(path, f"{name}.{attribute}", True, "already")
            continue
        label = (
            f"{name}.{attribute} = {qualified(maker) if isinstance(maker, type) else getattr(maker, '__name__', maker)}"
        )
        made = library.by_name.get(qualified(maker)) if isinstance(maker, type) else None
        if made is None:
            if any(qualified(b) in library.bases for b in cls.__mro__):  # and not a distribution
                yield Line(path, label, False, "no faster form")
        elif maker in _patched:
            yield Line(path, label, True, "by patch")
        elif (reason := _why_not(module, maker, made)) is not None:
            yield Line(path, label, False, reason)
        else:
            fast: Any = _fast(maker, made)
            vars(module)[attribute] = partial(fast, *value.args, **value.keywords) if value is not maker else fast
            yield Line(path, label, True, made.note)


def restore(model: nn.Module | torch.optim.Optimizer) -> None:
    """Undo :func:`accelerate`: all modules of ``model``, or an optimizer, get their own classes back.

    Instances of a class that you derived from an accelerated one stay what they are.

    Raises:
        TypeError: ``model`` is neither a module nor an optimizer.
        RuntimeError: torch derived the class of a module from an accelerated one (a parametrization, ``fully_shard``);
            nothing is changed then.
    """
    if isinstance(model, torch.optim.Optimizer):
        return unfuse(model)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"restore: model is a {type(model).__name__}, expected a torch.nn.Module or a torch.optim.Optimizer"
        )
    for path, module in model.named_modules():
        if _by_torch(type(module)):
            raise RuntimeError(
                f"restore: {path or 'model'} is a {type(module).__name__}, a class that torch derived from an accelerated "
                "one; remove its parametrizations first, or restore before fully_shard"
            )
    names = {attribute for library in LIBRARIES.values() for attribute in library.attributes}
    for module in model.modules():
        freeze(module, False)
        vars(module).pop(KEPT, None)
        own: Any = original(type(module))
        if own is not None:
            module.__class__ = own
        for name in names & vars(module).keys():
            value = vars(module)[name]
            back: Any = original(value.func if isinstance(value, partial) else value)
            if back is not None:
                vars(module)[name] = (
                    partial(back, *value.args, **value.keywords) if isinstance(value, partial) else back
                )


class Patch(AbstractContextManager["Patch"]):
    """What :func:`patch` returns: its ``report``, and a context manager.

    The libraries stay patched as long as anybody holds them: a call of ``patch`` until :func:`unpatch`, a block until its
    end. Blocks may overlap, be entered anew, and run in several threads.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._blocks = 0  # that are inside now
        with _lock:
            self.report = Report(_hold(self))

    def __repr__(self) -> str:
        return str(self.report)

    def __enter__(self) -> "Patch":
        with _lock:
            _hold(self)
            self._blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            self._blocks -= 1
            if self._blocks == 0:
                for name in self.names:
                    holders = _holders.get(name, set())
                    holders.discard(self)
                    if not holders:
                        _unpatch(name)


def _libraries(where: str, names: tuple[str, ...]) -> dict[str, Library]:
    for name in names:
        if not isinstance(name, str) or name.lower() not in BY_NAME:
            raise ValueError(f"{where}: library is {name!r}, expected one of {', '.join(BY_NAME)}")
    return {part: BY_NAME[part] for name in names for part in BACKENDS.get(name.lower(), (name.lower(),))}


def patch(*names: str, fused_optimizer: bool = False) -> Patch:
    """Speed up every model of these libraries in this process, present and future.

    ``patch("nflows", "zuko")`` stays until :func:`unpatch`; ``with patch("nflows"):`` until the end of the block, or of
    the last one that overlaps with it, in any thread. An instance whose class is not exactly a known one, whose options
    are not known, or an input of another type runs the library's own code.

    Args:
        names: "nflows", "glasflow", "normflows", "freia", "zuko", "iin", "net2net", "invariances"; "sbi" means nflows, zuko, and how it loads
            batches and clips gradients.
        fused_optimizer: every ``torch.optim.Adam`` and ``AdamW`` that is made meanwhile is torch's fused one, as after
            ``accelerate(optimizer)``, unless its maker asked for another form.

    Returns:
        An object with ``report``, which is also a context manager; ``print`` shows the report.

    Warns:
        UserWarning: nothing of a library was replaced.

    Raises:
        ValueError: no name and no ``fused_optimizer``, or an unknown name.
        ImportError: a library is not installed.
    """
    if not (names or fused_optimizer):
        raise ValueError(f"patch: no library given, expected some of {', '.join(BY_NAME)}")
    libraries = _libraries("patch", names)
    for library in libraries.values():
        for module in library.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ImportError(f"patch: {library.name} can't be imported ({error}); {library.install}") from error
    made = Patch([*libraries, *([OPTIMIZERS] if fused_optimizer else [])])
    for library in libraries.values():
        if not any(line.replaced for line in made.report.lines if line.name in library.by_name):
            _warn("patch", library)
    return made


_warned: set[tuple[str, str]] = set()


def _warn(where: str, library: Library) -> None:
    """Say once that nothing of a library was replaced, and which versions would be."""
    if (where, library.name) in _warned:
        return
    _warned.add((where, library.name))
    try:
        version = importlib.metadata.version(library.package)
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    warnings.warn(
        f"{where}: nothing of {library.package} was replaced. {library.package} {version} is installed; known: "
        f"{', '.join(library.versions)}. The report tells the reasons.",
        stacklevel=3,
    )


def _hold(holder: Patch) -> list[Line]:
    """``holder`` keeps its libraries patched; returns what became of each class."""
    lines = []
    for name in holder.names:
        _holders.setdefault(name, set()).add(holder)
        if name == OPTIMIZERS:
            if ADAM not in _patched:
                own = vars(ADAM)["__init__"]
                _patched[ADAM], ADAM.__init__ = {"__init__": own}, fused_init(own)  # type: ignore[method-assign]
            lines.append(Line("", "torch.optim.Adam, torch.optim.AdamW", True, "those made from now on are fused"))
            continue
        library = BY_NAME[name]
        for cls_name, cls in library.classes().items():
            known = library.by_name[cls_name]
            reason = None if cls in _patched else known.unknown_source(cls)
            if reason is None and cls not in _patched:
                _patch(cls, known)
            lines.append(Line("", cls_name, reason is None, known.note if reason is None else reason))
        for place, fast in library.functions.items():
            path, _, attribute = place.rpartition(".")
            module, found = sys.modules.get(path), registry.lookup(place)
            if found is fast.__wrapped__:  # type: ignore[attr-defined]
                _patched[module] = {attribute: found}
                setattr(module, attribute, fast)
            if found in (fast, fast.__wrapped__):  # type: ignore[attr-defined]
                lines.append(Line("", place, True, "with less Python"))
        lines.extend(Line("", left, False, why) for left, why in library.left.items())
    return lines


def _becoming(cls: type, fast: FastClass) -> Callable[..., None]:
    """An ``__init__`` of ``cls`` that makes instances of exactly ``cls`` fast ones."""
    own = vars(cls)["__init__"]

    @wraps(own)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is not cls:
            own(self, *args, **kwargs)
            return
        self.__class__ = fast
        fast.__init__(self, *args, **kwargs)  # type: ignore[misc]

    init._iin_fast_own = own  # type: ignore[attr-defined]
    return init


def _patch(cls: type, known: Entry) -> None:
    fast: dict[str, Any]
    if known.at_init:
        fast = {"__init__": _becoming(cls, _fast(cls, known))}
    else:
        fast = known.fast(cls, lambda instance: known.inherited or type(instance) is cls)
    _patched[cls] = {name: vars(cls).get(name, MISSING) for name in fast}
    for name, value in fast.items():
        setattr(cls, name, value)


def unpatch(*names: str) -> None:
    """Undo :func:`patch` for these libraries, or for all where none is named.

    Raises:
        ValueError: an unknown name.
    """
    with _lock:
        for name in _libraries("unpatch", names) or tuple(_holders):
            _unpatch(name)


def _unpatch(name: str) -> None:
    """The classes of a library are its own again; nobody holds it."""
    _holders.pop(name, None)
    library = BY_NAME.get(name)
    modules = [] if library is None else [sys.modules.get(place.rpartition(".")[0]) for place in library.functions]
    for owner in [ADAM] if library is None else [*library.classes().values(), *modules]:
        for attribute, value in _patched.pop(owner, {}).items():
            if value is MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, value)
