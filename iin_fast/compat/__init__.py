"""Published APIs, name for name: ``compat.iin`` and ``compat.net2net``."""
