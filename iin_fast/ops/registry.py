"""The table of ops: all that torch has to know of each. Whatever lists ops reads it here.

A new op is a folder beside the others: reference.py has its definition, ``__init__.py`` checks the arguments and registers an
:class:`Op`, csrc/<op> and triton.py have its kernels. The schema is what csrc/<op> defines; its twin in Triton takes the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._library import registrations
from ..backends import ops, register_library, register_triton
from .autograd import autocast_to_float32, by_definition, differentiated, short_call
from .triton_ops import TWINS, define_twin
from .types import FLOATING
from .vmap import Rule, fold_rows

__all__ = ["OPS", "Op", "eager_call", "gpu_ops", "register"]


def _no_products(*_: Any, **__: Any) -> int:
    return 0


@dataclass(frozen=True)
class Op:
    """An op ``name`` and the op ``name_backward`` of its gradients."""

    name: str
    setup: Callable[..., None]
    """(ctx, inputs, output): saves what backward needs."""
    backward: Callable[..., tuple[Any, ...]]
    """(kernel, ctx, *gradients of the outputs) -> a gradient or None for each input; ``kernel`` is the backward op."""
    definition: Callable[[Any], tuple[Callable[..., Any], Sequence[Any]]]
    """ctx -> the map in plain torch, and its arguments: the first inputs of the op. Gradients of gradients come from it."""
    fake: Callable[..., Any]
    fake_backward: Callable[..., Any]
    fake_triton: Callable[..., Any] | None = None
    """The fake kernel of the twin, where it gives other sizes."""
    vmap: Callable[[Callable[..., Any]], Rule] = fold_rows
    vmap_backward: Callable[[Callable[..., Any]], Rule] = fold_rows
    flops: Callable[..., int] = _no_products
    """(shapes and options of the op) -> flops of its matrix products."""
    flops_backward: Callable[..., int] = _no_products
    cpu_types: tuple[torch.dtype, ...] = FLOATING
    """What the compiled op takes on a CPU."""
    on_gpus: bool = True
    """Has kernels for GPUs, in CUDA C++ and in Triton. One without runs there as a sequence of other ops."""

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends with kernels of this op."""
        return ("cpp", "triton") if self.on_gpus else ("cpp",)


OPS: dict[str, Op] = {}

_COMPILED = registrations("iin_fast", "FRAGMENT")


def gpu_ops() -> list[str]:
    """The names of all ops with kernels for GPUs."""
    return [name for name, op in OPS.items() if op.on_gpus]


def register(op: Op) -> dict[str, Callable[..., Any]]:
    """Tell torch all of it; gives the short way from Python to the op, for each backend that has it."""
    OPS[op.name] = op
    register_library(op.name)
    register_triton(op.name)
    if op.on_gpus:
        define_twin(op.name)
    return {backend: _register(op, backend) for backend in op.backends}


def _register(op: Op, backend: str) -> Callable[..., Any]:
    namespace, library = ops(backend), torch.library
    lib = _COMPILED if backend == "cpp" else TWINS
    forward, kernel = getattr(namespace, op.name), getattr(namespace, f"{op.name}_backward")
    name, name_backward = f"{namespace.name}::{op.name}", f"{namespace.name}::{op.name}_backward"

    backward = _backward_of(op, kernel.default)
    library.register_fake(name, (backend == "triton" and op.fake_triton) or op.fake, lib=lib)
    library.register_fake(name_backward, op.fake_backward, lib=lib)
    library.register_autograd(name, backward, setup_context=op.setup, lib=lib)
    library.register_vmap(name, op.vmap(forward), lib=lib)
    library.register_vmap(name_backward, op.vmap_backward(kernel), lib=lib)
    autocast_to_float32(name, lib)
    return short_call(name.replace("::", "_"), forward.default, op.setup, backward)


def eager_call(op: Op, name: str, forward: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Another way to run ``op``, in eager mode alone. ``forward`` and ``kernel`` take what the op and its backward take."""
    return short_call(name, forward, op.setup, _backward_of(op, kernel))


def _backward_of(op: Op, kernel: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if differentiated(*grads):
            found = by_definition(*op.definition(ctx), grads)
            return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))
        return op.backward(kernel, ctx, *grads)

    return backward
