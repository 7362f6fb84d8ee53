"""Flop formulas of the op ``flow``."""

from typing import Any

from ..products import Shape, products

__all__ = ["backward", "forward"]


def forward(
    x: Shape, context: Any, loc: Any, scale: Any, weight_in: Shape, bias_in: Any, weight_hidden: Shape,
    bias_hidden: Any, weight_out: Shape, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return products(x[0], weight_in, weight_hidden, weight_out)


def backward(
    grad_y: Shape, grad_logdet: Any, y: Any, saved: Shape, context: Any, loc: Any, scale: Any, weight_in: Shape,
    bias_in: Any, weight_hidden: Shape, bias_hidden: Any, weight_out: Shape, bias_out: Any, permutation: Any,
    leaky_slope: float, activation_slope: float, inverse: bool, keep: int, context_grad: bool,
    weight_grads: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Gradients of all activations, of the weights where they are wanted, and the map again where not all was kept."""
    passes = 1 + weight_grads + (keep != 2)  # KEEP["save"]
    return passes * products(grad_y[0], weight_in, weight_hidden, weight_out)
