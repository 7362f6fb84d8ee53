"""Training of an IIN on latents: one call, one folder with all that came of it, and a resume that loses nothing."""

from .batches import Batches, estimate_sizes, split_rows
from .logs import held_out_rise
from .loop import train
from .settings import Settings

__all__ = ["Batches", "Settings", "estimate_sizes", "held_out_rise", "split_rows", "train"]
