"""A page about a trained IIN: its swaps, its metrics, its training."""

from .metrics import COLUMNS
from .write import write_report

__all__ = ["COLUMNS", "write_report"]
