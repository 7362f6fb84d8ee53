"""Which programs a GPU walks as a whole (csrc/flow_program/flow_program_kernels.cuh)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...flow import FlowProgram
from ..types import FULL, HALF, tf32_is_allowed

__all__ = ["runs", "tf32_products", "walks"]


def runs(x: Tensor, context: Tensor | None, parameters: Sequence[Tensor], program: FlowProgram, inverse: bool) -> bool:
    """Whether the compiled library runs the whole program as one op: on the CPU any."""
    return x.is_cpu or walks(x, context, parameters, program, inverse)


def walks(x: Tensor, context: Tensor | None, parameters: Sequence[Tensor], program: FlowProgram, inverse: bool) -> bool:
    """Whether a GPU takes the whole program in one launch: nets that fit a block's memory, float32 or float64, no backward
    through the sampling direction of an autoregressive layer."""
    if x.device.type != "cuda" or x.dtype not in FULL:
        return False
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, context, *parameters))
    needed = (5 if learns else 1) << inverse
    return _walks(program.text, x.dtype.itemsize, x.device.index) & needed == needed


FLOAT32_PRODUCTS = 0
"""What ``tf32_products`` says of float32 for any batch: 0, or 3 for three products on tensor cores, of about the same error. On an H100
three gain 5 % of a density of 65,536 rows, and cost 10 to 27 % of training steps of 50 to 4096 (docs/performance.md)."""

TENSOR_CORE_ROWS = 4096
"""Rows of a batch from which one product of TF32 pays; a step of 256 takes 18 % longer with it (the same benchmark)."""


def tf32_products(x: Tensor) -> int:
    """How many products of TF32, on tensor cores, make one of float32 in a walk on a GPU; 0: its plain multiply-adds. Of 16 bits all
    numbers are exact in TF32, whose sums are float32."""
    if not x.is_cuda:
        return 0
    allowed = x.dtype in HALF or (x.dtype == torch.float32 and tf32_is_allowed())
    return 1 if allowed and x.shape[0] >= TENSOR_CORE_ROWS else FLOAT32_PRODUCTS


@lru_cache(maxsize=1024)
def _walks(text: str, item: int, index: int) -> int:
    """The bits of the op ``cuda_program_walks`` for a GPU."""
    return torch.ops.iin_fast.cuda_program_walks.default(text, item, index)  # type: ignore[no-any-return]


# torch.compile cannot trace the questions. This is torch.compiler.assume_constant_result without an import of the compiler.
_walks._dynamo_marked_constant = True  # type: ignore[attr-defined]
