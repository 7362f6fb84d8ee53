"""The types of numbers that ops take and compute in."""

import torch

__all__ = ["FLOATING", "FULL", "HALF", "accumulator_type"]

FULL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
FLOATING = FULL + HALF


def accumulator_type(dtype: torch.dtype) -> torch.dtype:
    """What log-dets and losses of inputs of ``dtype`` are kept in: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32
