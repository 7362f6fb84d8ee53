"""What is known of one library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .programs import Programs
from .registry import Entry, lookup

__all__ = ["Library"]


@dataclass(frozen=True)
class Library:
    """A library and its classes.

    Args:
        name: as ``patch`` takes it.
        package: its top-level package.
        modules: that hold the known classes.
        install: what to do where it is missing.
        entries: the known classes.
        versions: that were read and tested.
        left: qualified names of classes that are looked at and left, with the reason.
        bases: classes whose instances are transforms of this library; those without an entry are reported.
        containers: transforms that only hold others, and are not reported.
        programs: how whole models become programs, if they do.
        attributes: of modules, that may hold a known class or a partial of one.
        functions: of torch, that ``patch`` replaces in modules of the library: qualified names there, and the fast one, which
            wraps its own.
    """

    name: str
    package: str
    modules: tuple[str, ...]
    install: str
    entries: tuple[Entry, ...]
    versions: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    bases: frozenset[str] = frozenset()
    containers: frozenset[str] = frozenset()
    attributes: tuple[str, ...] = ()
    programs: Programs | None = None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def classes(self) -> dict[str, type]:
        """The known classes that are loaded."""
        found = {name: lookup(name) for name in self.by_name}
        return {name: cls for name, cls in found.items() if isinstance(cls, type)}
