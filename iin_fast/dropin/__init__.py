"""Flows that people already have, sped up in place: ``accelerate`` for one model, ``patch`` for a whole library."""

from .library import LIBRARIES
from .replace import Patch, accelerate, patch, restore, unpatch
from .report import Line, Report

__all__ = ["LIBRARIES", "Line", "Patch", "Report", "accelerate", "patch", "restore", "unpatch"]
