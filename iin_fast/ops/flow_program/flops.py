"""Flop formulas of the op ``flow_program``."""

from math import prod
from typing import Any

from ...flow import FlowProgram
from ...flow import layers as L
from ..products import Shape, products
from .checks import KEEP

__all__ = ["backward", "forward"]


def _program_products(batch: int, text: str, inverse: bool) -> int:
    """Flops of one pass. A triangular solve counts nothing, as in torch."""
    program = FlowProgram.parse(text)
    total = 0
    for layer, reads in zip(program.layers, program.reads, strict=True):
        inverted = isinstance(layer, L.Inverse)
        kind = layer.layer if isinstance(layer, L.Inverse) else layer
        if isinstance(kind, (L.Coupling, L.Autoregressive)):
            total += products(batch, *(read.shape for read in reads if read.learned and len(read.shape) == 2))
        elif isinstance(kind, L.Linear) and inverted == inverse:
            total += 2 * products(batch, (program.dim, program.dim))
    return total


def forward(x: Shape, context: Any, parameters: Any, program: str, inverse: bool, *_: Any, **__: Any) -> int:
    return _program_products(x[0], program, inverse)


def backward(
    grad_y: Any, grad_logdet: Any, x: Shape, saved: Shape, context: Any, parameters: Any, program: str, inverse: bool,
    base: bool, keep: int, context_grad: bool, wanted: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Gradients of all activations, of the weights where they are wanted, and the map again where not all was kept."""
    kept = prod(saved) > 0 and keep in (KEEP["auto"], KEEP["save"])
    reads = (read for layer in FlowProgram.parse(program).reads for read in layer)
    weights = any(wanted[read.ref.tensor] == "1" for read in reads if len(read.shape) > 1)
    passes = 1 + weights + (not kept)
    return passes * _program_products(x[0], program, inverse)
