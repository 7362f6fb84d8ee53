"""Whole models of other libraries as flow programs, one file a library.

A root is a module whose call maps a batch through several layers. :mod:`.plan` cuts it into the longest programs that can be
made of it and keeps them until :mod:`.watch` sees a change. What the layers of a library mean stands in the file of its name.
"""

from .plan import Programs, Summary, run, summary
from .watch import Unsupported

__all__ = ["Programs", "Summary", "Unsupported", "run", "summary"]
