"""Flops of matrix products, the only ones that torch's flop counter counts."""

from collections.abc import Sequence
from math import prod

__all__ = ["Shape", "products"]

Shape = Sequence[int]


def products(batch: int, *weights: Shape) -> int:
    """Flops of the rows' products with all weights of all nets."""
    return 2 * batch * sum(map(prod, weights))
