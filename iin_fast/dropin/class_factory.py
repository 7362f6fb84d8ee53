"""The classes that sped-up modules get: generated subclasses of the library's own."""

import copyreg
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ["FastClass", "generate", "original"]

_originals: dict[type, type] = {}


class FastClass(type):
    """The type of generated classes, and so of every class that somebody derives from one: see :func:`original`."""


@cache
def _metaclass(own: type) -> Any:
    """The type of generated classes for classes of type ``own``, such as abstract ones."""
    if own is type:
        return FastClass
    made = type(FastClass.__name__, (FastClass, own), {})
    copyreg.pickle(made, _reduce)
    return made


def generate(cls: type, namespace: dict[str, Any]) -> FastClass:
    """A subclass of ``cls`` that goes by the same name."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made: FastClass = _metaclass(type(cls))(cls.__name__, (cls,), namespace | named)
    _originals[made] = cls
    return made


def original(cls: Any) -> type | None:
    """The class that ``cls`` was generated from, or None: also where ``cls`` is derived from a generated one."""
    return _originals.get(cls) if isinstance(cls, FastClass) else None


def _reduce(cls: FastClass) -> str | tuple[Callable[[str], Any], tuple[str]]:
    """Pickles hold the library's own class; one that somebody derived is found by its own name."""
    own = original(cls)
    return cls.__qualname__ if own is None else (pkgutil.resolve_name, (f"{own.__module__}:{own.__qualname__}",))


copyreg.pickle(FastClass, _reduce)  # type: ignore[arg-type]
