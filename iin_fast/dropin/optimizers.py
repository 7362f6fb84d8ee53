"""torch's fused Adam, with little Python around its one kernel, in place of a dozen kernels for each parameter."""

import ctypes
import weakref
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
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
TURNED = "_iin_fast_turned"  # the options that did not ask for the fused form: defaults and groups
STEPS = (
    "_iin_fast_steps"  # for each group: its parameters, their steps, these as one tensor, and whether they are small
)
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
    own: Any = original(cls) or cls
    reason = _why_not(optimizer, own)
    if reason is not None:
        return Line("", qualified(cls), False, reason)
    open_to = [options for options in (optimizer.defaults, *optimizer.param_groups) if options["fused"] is None]
    if own is not cls and not open_to:
        return Line("", qualified(cls), True, "already")
    for options in open_to:
        options["fused"] = True
    vars(optimizer).setdefault(TURNED, []).extend(open_to)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    optimizer.__class__ = _short[own]  # type: ignore[assignment]
    _rebind(optimizer)
    return Line("", qualified(cls), True, "torch's fused form, with less Python")


def unfuse(optimizer: torch.optim.Optimizer) -> None:
    """Undo :func:`fuse`."""
    own: Any = original(type(optimizer))
    if own is None:
        return
    optimizer.__class__ = own
    vars(optimizer).pop(STEPS, None)
    for options in vars(optimizer).pop(TURNED, ()):
        options["fused"] = None
    optimizer._step_supports_amp_scaling = bool(optimizer.defaults["fused"])  # type: ignore[attr-defined]
    _rebind(optimizer)


def _rebind(optimizer: Any) -> None:
    """A scheduler has put a ``step`` on its optimizer that notes each call; it calls the one of the class that it found."""
    if not _by_a_scheduler(optimizer):
        return
    reference = weakref.ref(optimizer)

    @wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        made: Any = reference()
        made._opt_called = True
        return type(made).step(made, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step


def _by_a_scheduler(optimizer: Any) -> bool:
    return hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched")


def _why_not(optimizer: Any, own: type) -> str | None:
    """Why an optimizer can't become a fused one, or None."""
    if own not in _short:
        return "no faster form"
    if "step" in vars(optimizer) and not _by_a_scheduler(optimizer):
        return "the instance has its own step"
    reasons = map(_why_not_group, optimizer.param_groups)
    reason = next((reason for reason in reasons if reason is not None), None)
    tensors = [(group, t) for group in optimizer.param_groups for t in group["params"]]
    if reason is None and optimizer.state and not all(group["fused"] or t.is_cpu for group, t in tensors):
        reason = "it has counted steps on the CPU, and its parameters are elsewhere"
    return reason


def _why_not_group(group: dict[str, Any]) -> str | None:
    if group["foreach"] is not None:
        return f"foreach={group['foreach']} was asked for"
    for name in ("differentiable", "capturable"):
        if group[name]:
            return f"{name}=True was asked for"
    if group["fused"] is False:
        return "fused=False was asked for"
    tensors = group["params"]
    if not all(t.is_floating_point() and t.device.type in DEVICES for t in tensors):
        return f"torch's fused form takes floating-point parameters on {' and '.join(DEVICES)}"
    if not all(map(_is_dense, tensors)):
        return "torch's fused form takes no parameters with gaps between their elements, or that share elements"
    return None


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill a piece of memory, each in a place of its own."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def _shortened(cls: type[torch.optim.Adam]) -> FastClass:
    """An Adam whose ``step`` does little around the kernel: the lists are read in one go, and all steps counted at once.
    ``zero_grad`` drops the gradients and does nothing else."""
    is_adamw = issubclass(cls, torch.optim.AdamW)

    def step(self: Any, closure: Any = None) -> Any:
        scaled = any(vars(self).get(name) is not None for name in ("grad_scale", "found_inf"))
        plain = closure is None and not scaled and not torch.is_inference_mode_enabled()
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
            return _own_step(self, cls, closure)
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

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        asked = isinstance(param_group, dict) and "fused" in param_group
        cls.add_param_group(self, param_group)
        group, turned = self.param_groups[-1], vars(self).get(TURNED, ())
        if not asked and any(options is self.defaults for options in turned):
            if _why_not_group(group) is None:
                turned.append(group)
            else:
                group["fused"] = None

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps it once more otherwise
    methods: dict[str, Any] = {"step": step, "zero_grad": zero_grad, "add_param_group": add_param_group}
    return generate(cls, {name: wraps(getattr(cls, name))(method) for name, method in methods.items()})


def _own_step(optimizer: Any, cls: type[torch.optim.Adam], closure: Any) -> Any:
    """torch's own step, on gradients and moments that lie as their parameters do."""
    held = []
    for group in optimizer.param_groups if closure is None else ():
        for p in group["params"] if group["fused"] else ():
            if p.grad is not None and not p.grad.is_sparse and p.grad.stride() != p.stride():
                held.append((p, p.grad, ordered := _in_order(p.grad, p)))
                p.grad = ordered
            _order_moments(optimizer, p)
    try:
        return cls.step(optimizer, closure)
    finally:
        for p, grad, ordered in held:
            if p.grad is ordered:  # else a hook has taken it away
                p.grad = grad.copy_(ordered)  # of a GradScaler the kernel takes its scale off


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
    known = _known(optimizer, group) or ((), (), None, False)
    if not (_same(params, known[0]) and _same(steps, known[1])):
        first, once = params[0], len(set(params)) == len(params)
        if not once or any(not p.is_cpu or p.dtype is not first.dtype for p in chain(params, grads)):
            return None
        counted = torch.stack(steps)
        for state, one in zip(states, counted.unbind(), strict=True):
            state["step"] = one
        steps = [state["step"] for state in states]
        small = sum(p.numel() for p in params) < SMALL * len(params)
        known = params, steps, counted, small
        there = {id(other): found for other in optimizer.param_groups if (found := _known(optimizer, other))}
        vars(optimizer)[STEPS] = there | {id(group): known}
    moments = [[state[name] for state in states] for name in MOMENTS[:2]]
    if not all(map(Tensor.is_contiguous, chain(params, grads, *moments))):
        grads = list(map(_in_order, grads, params))
        for p in params:
            _order_moments(optimizer, p)
        moments = [[state[name] for state in states] for name in MOMENTS[:2]]
    return [params, grads, *moments, [], steps], known[2], known[3]


def _known(optimizer: Any, group: dict[str, Any]) -> Any:
    return vars(optimizer).get(STEPS, {}).get(id(group))


def _in_order(values: Tensor, p: Tensor) -> Tensor:
    """Values whose elements lie as those of their parameter: the kernel reads both as they lie."""
    return values if values.stride() == p.stride() else torch.empty_like(p, dtype=values.dtype).copy_(values)


def _order_moments(optimizer: Any, p: Tensor) -> None:
    state = optimizer.state.get(p, {})
    for name in state.keys() & set(MOMENTS):
        state[name] = _in_order(state[name], p)


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


_short = {cls: _shortened(cls) for cls in (torch.optim.Adam, torch.optim.AdamW)}
