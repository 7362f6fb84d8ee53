"""A page about a trained IIN: its swaps, its metrics, its training."""

from .dims import plot_dims
from .metrics import COLUMNS
from .write import write_report

__all__ = ["COLUMNS", "plot_dims", "write_report"]
