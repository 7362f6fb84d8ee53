"""torch's fused Adam for optimizers that are made within a block: one kernel instead of a dozen for each parameter."""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from .class_factory import FastClass, generate

__all__ = ["ADAM", "OPTIMIZERS", "fused_init"]

OPTIMIZERS = "torch.optim"  # takes the place of a library's name
ADAM = torch.optim.Adam  # AdamW is derived from it
DEVICES = ("cpu", "cuda")
CHOSEN = ("fused", "foreach", "differentiable", "capturable")
STEPS = "_iin_fast_steps"  # for each group: its parameters, their counts of steps, and the one tensor that holds these


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
            self.__class__ = _short[type(self)]

    return init


def _shortened(cls: type[torch.optim.Adam]) -> FastClass:
    """An Adam whose ``step`` does little around the kernel: the lists are read in one go, and all steps counted at once."""
    kernel = torch._fused_adamw_ if issubclass(cls, torch.optim.AdamW) else torch._fused_adam_

    def step(self: Any, closure: Any = None) -> Any:
        plain = closure is None and not (vars(self).get("grad_scale") or vars(self).get("found_inf"))
        hooked = any(
            (
                self._optimizer_step_pre_hooks,
                self._optimizer_step_post_hooks,
                torch_optimizer._global_optimizer_pre_hooks,
                torch_optimizer._global_optimizer_post_hooks,
            )
        )
        found = []
        if plain and not hooked and not torch.compiler.is_compiling():
            found = [_lists(self, group) for group in self.param_groups]
        if not found or None in found:
            return cls.step(self, closure)  # type: ignore[arg-type]
        with torch.no_grad():
            for group, (lists, counted) in zip(self.param_groups, found, strict=True):  # type: ignore[misc]
                counted += 1
                options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
                beta1, beta2 = group["betas"]
                kernel(*lists, beta1=beta1, beta2=beta2, grad_scale=None, found_inf=None, **options)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps it once more otherwise
    return generate(cls, {"step": wraps(cls.step)(step)})


def _lists(optimizer: Any, group: dict[str, Any]) -> tuple[list[Any], Any] | None:
    """What the kernel takes for a group, and the tensor of its steps; None where torch's own code has to run."""
    params, options = group["params"], (group["lr"], *group["betas"])
    if not group["fused"] or group["amsgrad"] or not params or any(type(option) is not float for option in options):
        return None
    grads = [p.grad for p in params]
    states = [optimizer.state.get(p) for p in params]
    if any(g is None or g.is_sparse for g in grads) or not all(states):
        return None
    steps = [state["step"] for state in states]
    known = vars(optimizer).setdefault(STEPS, {}).get(id(group), ((), (), None))
    if not (_same(params, known[0]) and _same(steps, known[1])):
        first = params[0]
        if any(not p.is_cpu or p.dtype is not first.dtype for p in chain(params, grads)):
            return None
        counted = torch.stack(steps)
        for state, one in zip(states, counted.unbind(), strict=True):
            state["step"] = one
        steps = [state["step"] for state in states]
        known = vars(optimizer)[STEPS][id(group)] = list(params), steps, counted
    lists = [params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], steps]
    return lists, known[2]


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


_short = {cls: _shortened(cls) for cls in (torch.optim.Adam, torch.optim.AdamW)}
