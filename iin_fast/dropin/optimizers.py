"""torch's fused Adam for optimizers that are made within a block: one kernel instead of a dozen for each parameter."""

import ctypes
from collections.abc import Callable
from functools import cache, wraps
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
STEPS = "_iin_fast_steps"  # for each group: its parameters, their steps, these as one tensor, and whether it is small
# The kernel starts torch's threads once for each tensor. 50 tensors take, on two threads and on one: 83 and 30 us where
# they have 500 elements, 128 and 106 with 4000; 30 tensors of 20,000 elements 179 and 264.
SMALL = 5000  # elements, the mean of a group's tensors


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
    is_adamw = issubclass(cls, torch.optim.AdamW)

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
            for group, (lists, counted, small) in zip(self.param_groups, found, strict=True):  # type: ignore[misc]
                counted += 1
                options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
                beta1, beta2 = group["betas"]
                decoupled = group.get("decoupled_weight_decay", is_adamw)
                kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
                threads = torch.get_num_threads()
                set_threads = _thread_setter() if small and threads > 1 else _nothing
                set_threads(1)
                try:
                    kernel(*lists, beta1=beta1, beta2=beta2, grad_scale=None, found_inf=None, **options)
                finally:
                    set_threads(threads)
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps it once more otherwise
    return generate(cls, {"step": wraps(cls.step)(step)})


@cache
def _thread_setter() -> Callable[[int], Any]:
    """OpenMP's omp_set_num_threads, which counts for the calling thread alone.

    torch.set_num_threads(1) would count for every thread that starts before it is put back, for as long as that lives.
    """
    try:
        return ctypes.PyDLL(torch._C.__file__).omp_set_num_threads  # found in the OpenMP that torch itself loads
    except (OSError, AttributeError):  # a torch without OpenMP
        return _nothing


def _nothing(threads: int) -> None:
    pass


def _lists(optimizer: Any, group: dict[str, Any]) -> tuple[list[Any], Any, bool] | None:
    """What the kernel takes for a group, the tensor of its steps, and whether its parameters are small.

    None where torch's own code has to run.
    """
    params, options = group["params"], (group["lr"], *group["betas"])
    if not group["fused"] or group["amsgrad"] or not params or any(type(option) is not float for option in options):
        return None
    grads = [p.grad for p in params]
    states = [optimizer.state.get(p) for p in params]
    if any(g is None or g.is_sparse for g in grads) or not all(states):
        return None
    steps = [state["step"] for state in states]
    known = vars(optimizer).setdefault(STEPS, {}).get(id(group), ((), (), None, False))
    if not (_same(params, known[0]) and _same(steps, known[1])):
        first = params[0]
        if any(not p.is_cpu or p.dtype is not first.dtype for p in chain(params, grads)):
            return None
        counted = torch.stack(steps)
        for state, one in zip(states, counted.unbind(), strict=True):
            state["step"] = one
        steps = [state["step"] for state in states]
        small = sum(p.numel() for p in params) < SMALL * len(params)
        known = vars(optimizer)[STEPS][id(group)] = list(params), steps, counted, small
    lists = [params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], steps]
    return lists, *known[2:]


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


_short = {cls: _shortened(cls) for cls in (torch.optim.Adam, torch.optim.AdamW)}
