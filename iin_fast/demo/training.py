"""The loop that trains everything in the demo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["train"]


def train(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int, *, warmup: float = 0.05
) -> Iterator[float]:
    """Takes ``steps`` steps down ``loss``, which draws its own batch at each call, and leaves ``model`` in eval mode.

    The step size rises linearly for the first ``warmup`` share of the steps and then falls to zero along half a cosine.

    Yields:
        the loss of every step
    """
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        yield value.item()
    model.eval()
