"""Flows that people already have, sped up in place: ``accelerate`` for one model, ``patch`` for a whole library."""

from .accelerate import Patch, accelerate, patch, restore, unpatch
from .library import LIBRARIES
from .report import Line, Report

__all__ = ["LIBRARIES", "Line", "Patch", "Report", "accelerate", "patch", "restore", "unpatch"]
