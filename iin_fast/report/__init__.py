"""A page about a trained IIN: its swaps, its metrics, its training."""

from .dims import picture_file, plot_dims
from .metrics import COLUMNS
from .write import write_report

__all__ = ["COLUMNS", "picture_file", "plot_dims", "write_report"]
