"""Training of an IIN on latents: one call, one folder with all that came of it, and a resume that loses nothing."""

from .batches import Batches, estimate_sizes, split_rows
from .findings import Findings, inspect_latents
from .logs import early_end, held_out_rise, loss_rise
from .loop import train
from .settings import Settings

__all__ = [
    "Batches",
    "Findings",
    "Settings",
    "early_end",
    "estimate_sizes",
    "held_out_rise",
    "loss_rise",
    "inspect_latents",
    "split_rows",
    "train",
]
