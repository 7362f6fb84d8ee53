"""torch's fused Adam for optimizers that are made within a block: one kernel instead of a dozen for each parameter."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

__all__ = ["ADAM", "OPTIMIZERS", "fused_init"]

OPTIMIZERS = "torch.optim"  # takes the place of a library's name
ADAM = torch.optim.Adam  # AdamW is derived from it
DEVICES = ("cpu", "cuda")
CHOSEN = ("fused", "foreach", "differentiable", "capturable")


def fused_init(own: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` of Adam that takes the fused form where nothing else was asked for."""

    @wraps(own)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        known = type(self) in (torch.optim.Adam, torch.optim.AdamW)
        free = all(
            group[name] in (None, False) and group["fused"] is None for group in self.param_groups for name in CHOSEN
        )
        if known and free and all(t.is_floating_point() and t.device.type in DEVICES for t in tensors):
            for options in (self.defaults, *self.param_groups):
                options["fused"] = True
            self._step_supports_amp_scaling = True

    return init
