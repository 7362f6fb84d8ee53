"""Which programs a GPU walks as a whole (csrc/flow_program/flow_program_kernels.cuh)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...flow import FlowProgram
from ..types import FULL

__all__ = ["runs", "walks"]


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


@lru_cache(maxsize=1024)
def _walks(text: str, item: int, index: int) -> int:
    """The bits of the op ``cuda_program_walks`` for a GPU."""
    return torch.ops.iin_fast.cuda_program_walks.default(text, item, index)  # type: ignore[no-any-return]


# torch.compile cannot trace the questions. This is torch.compiler.assume_constant_result without an import of the compiler.
_walks._dynamo_marked_constant = True  # type: ignore[attr-defined]
