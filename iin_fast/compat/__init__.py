"""Published APIs, name for name: ``compat.iin`` and ``compat.net2net``."""

from .optimizer_state import convert_optimizer_state

__all__ = ["convert_optimizer_state"]
