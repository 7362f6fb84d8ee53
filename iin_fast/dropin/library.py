"""The libraries that are known, by top-level package. None of them is imported here."""

from . import compvis, freia, nflows, normflows, zuko
from .base import Library

__all__ = ["LIBRARIES", "Library"]

LIBRARIES: dict[str, Library] = {
    library.package: library
    for library in (nflows.LIBRARY, normflows.LIBRARY, freia.LIBRARY, zuko.LIBRARY, *compvis.LIBRARIES)
}
