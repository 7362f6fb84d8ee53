"""The types of numbers that ops take and compute in."""

import torch

__all__ = ["FLOATING", "FULL", "HALF", "accumulator_type", "tf32_is_allowed"]

FULL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
FLOATING = FULL + HALF


def accumulator_type(dtype: torch.dtype) -> torch.dtype:
    """What log-dets and losses of inputs of ``dtype`` are kept in: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32_is_allowed() -> bool:
    """Whether the user lets torch multiply float32 matrices as TF32 on NVIDIA GPUs."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# torch.compile cannot trace the setting. This is torch.compiler.assume_constant_result without an import of the compiler.
tf32_is_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]
