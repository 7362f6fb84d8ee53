"""What calls of a model give, with their gradients, in one list to compare."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["with_gradients"]


def with_gradients(calls: Iterable[Callable[[], Any]], wanted: Sequence[Tensor], order: int = 1) -> list[Tensor]:
    """The outputs of each call, which are tensors, and their gradients by ``wanted``; of order 2 the second ones too."""
    found: list[Tensor] = []
    for call in calls:
        outputs = call()
        loss = sum(output.sin().sum() for output in outputs)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True, create_graph=order > 1)
        found += [*outputs, *grads]
        if order > 1:
            loss = sum(g.sin().sum() for g in grads)
            found += torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [f.detach() for f in found]
