"""torch's fused Adam, with little Python around its one kernel, in place of a dozen kernels for each parameter."""

import ctypes
from collections.abc import Callable
from functools import cache, wraps
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from .class_factory import FastClass, generate, original
from .registry import qualified
from .report import Line

__all__ = ["ADAM", "OPTIMIZERS", "fuse", "fused_init", "unfuse"]

OPTIMIZERS = "torch.optim"  # takes the place of a library's name
ADAM = torch.optim.Adam  # AdamW is derived from it
DEVICES = ("cpu", "cuda")
CHOSEN = ("foreach", "differentiable", "capturable")
TURNED = "_iin_fast_turned"  # set where the fused form was not asked for
STEPS = "_iin_fast_steps"  # for each group: its parameters, their steps, these as one tensor, and whether they are small and contiguous
# The kernel starts torch's threads once for each tensor. 50 tensors take, on two threads and on one: 83 and 30 us where
# they have 500 elements, 128 and 106 with 4000; 30 tensors of 20,000 elements 179 and 264.
SMALL = 5000  # elements, the mean of a group's tensors


def fused_init(own: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` of Adam that takes the fused form where no other was asked for."""

    @wraps(own)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        fuse(self)

    return init


def fuse(optimizer: torch.optim.Optimizer) -> Line:
    """An Adam or AdamW becomes torch's fused one, unless another form was asked for. Returns what became of it."""
    cls: Any = type(optimizer)
    if original(cls) in _short:
        return Line("", qualified(cls), True, "already")
    reason = _why_not(optimizer)
    if reason is None:
        groups = optimizer.defaults, *optimizer.param_groups
        if any(group["fused"] is None for group in groups):
            vars(optimizer)[TURNED] = True
            for group in groups:
                group["fused"] = True
            optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        optimizer.__class__ = _short[cls]  # type: ignore[assignment]
    return Line("", qualified(cls), reason is None, reason or "torch's fused form, with less Python")


def unfuse(optimizer: torch.optim.Optimizer) -> None:
    """Undo :func:`fuse`."""
    own: Any = original(type(optimizer))
    if own is None:
        return
    optimizer.__class__ = own
    vars(optimizer).pop(STEPS, None)
    if vars(optimizer).pop(TURNED, False):
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["fused"] = None
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def _why_not(optimizer: Any) -> str | None:
    """Why an optimizer can't become a fused one, or None."""
    if type(optimizer) not in _short:
        return "no faster form"
    groups = optimizer.param_groups
    for name in CHOSEN:
        if any(group[name] for group in groups):
            return f"{name}=True was asked for"
    if any(group["fused"] is False for group in groups):
        return "fused=False was asked for"
    tensors = [tensor for group in groups for tensor in group["params"]]
    if not all(t.is_floating_point() and t.device.type in DEVICES for t in tensors):
        return f"torch's fused form takes floating-point parameters on {' and '.join(DEVICES)}"
    if optimizer.state and not all(group["fused"] or t.is_cpu for group in groups for t in group["params"]):
        return "it has counted steps on the CPU, and its parameters are elsewhere"
    return None


def _shortened(cls: type[torch.optim.Adam]) -> FastClass:
    """An Adam whose ``step`` does little around the kernel: the lists are read in one go, and all steps counted at once.
    ``zero_grad`` drops the gradients and does nothing else."""
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
        if torch.compiler.is_compiling():
            return cls.step(self, closure)  # type: ignore[arg-type]
        found = [_lists(self, group) for group in self.param_groups] if plain and not hooked else [None]
        if None in found:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None and not p.grad.is_sparse:
                        p.grad = _in_order(p.grad, p)
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

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        if not set_to_none or torch.compiler.is_compiling():
            return cls.zero_grad(self, set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps it once more otherwise
    return generate(cls, {"step": wraps(cls.step)(step), "zero_grad": wraps(cls.zero_grad)(zero_grad)})


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
    params = [p for p in group["params"] if p.grad is not None]
    options = group["lr"], *group["betas"]
    if not group["fused"] or group["amsgrad"] or not params or any(type(option) is not float for option in options):
        return None
    grads = [p.grad for p in params]
    states = [optimizer.state.get(p) for p in params]
    if any(g.is_sparse for g in grads) or not all(states):
        return None
    steps = [state["step"] for state in states]
    known = vars(optimizer).setdefault(STEPS, {}).get(id(group), ((), ()))
    if not (_same(params, known[0]) and _same(steps, known[1])):
        first = params[0]
        if any(not p.is_cpu or p.dtype is not first.dtype for p in chain(params, grads)):
            return None
        counted = torch.stack(steps)
        for state, one in zip(states, counted.unbind(), strict=True):
            state["step"] = one
        steps = [state["step"] for state in states]
        small = sum(p.numel() for p in params) < SMALL * len(params)
        contiguous = all(map(Tensor.is_contiguous, params))
        known = vars(optimizer)[STEPS][id(group)] = params, steps, counted, small, contiguous
    _, _, counted, small, contiguous = known
    if not (contiguous and all(map(Tensor.is_contiguous, grads))):
        grads = list(map(_in_order, grads, params))
    lists = [params, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], steps]
    return lists, counted, small


def _in_order(grad: Tensor, p: Tensor) -> Tensor:
    """A gradient whose elements lie as those of its parameter: the kernel reads both as they lie."""
    return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


_short = {cls: _shortened(cls) for cls in (torch.optim.Adam, torch.optim.AdamW)}
