"""iin-fast: normalizing-flow layers at the speed of the hardware, and the Invertible Interpretation Network on them."""

from . import functional
from .backend import backend

__all__ = ["backend", "functional"]
