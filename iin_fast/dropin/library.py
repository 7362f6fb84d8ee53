"""The libraries that are known, by top-level package. None of them is imported here."""

from . import compvis, freia, nflows, normflows, sbi, zuko
from .base import Library

__all__ = ["ALL", "LIBRARIES", "Library"]

LIBRARIES: dict[str, Library] = {
    library.package: library
    for library in (
        nflows.LIBRARY,
        nflows.GLASFLOW,
        normflows.LIBRARY,
        freia.LIBRARY,
        zuko.LIBRARY,
        *compvis.LIBRARIES,
    )
}

ALL = (*LIBRARIES.values(), sbi.LIBRARY)
"""With those whose models are the others': nothing of them is looked for in a model."""
