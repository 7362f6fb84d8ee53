"""The compiled op ``iin_fast::flow_program`` to torch: autograd, fake kernels, autocast, vmap, and the short way from Python."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, is_fake

from ... import _library  # noqa: F401  (loads the op)
from ...flow import FlowProgram
from ..autograd import autocast_to_float32
from ..vmap import front, mapped_by_autograd
from . import reference
from .checks import check_parameters

__all__ = ["KEEP", "call", "has_values", "in_float32"]

NAME = "iin_fast::flow_program"

# What forward keeps for backward: codes of csrc/flow_program/flow_program_loops.h, and 3 by size (flow_program_cpu.cpp). A
# compiled graph has to know how much that is, so there "auto" keeps nothing.
KEEP = {"auto": 3, "recompute": 0, "checkpoint": 1, "save": 2}


def in_float32(value: Any) -> Any:
    """What autocast to float32 does: tensors of 16 bits are converted, all others stay."""
    narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize == 2
    return value.float() if narrow else value


def _followed() -> bool:
    """Whether something looks at every op of this call: only the registered op will do."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch._C._is_any_autocast_enabled()
    )


def has_values(x: Tensor) -> bool:
    """Whether the values of this call's tensors can be read: not while it is traced or mapped, nor on device meta."""
    return not (_followed() or x.is_meta or is_fake(x))


def call(
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    program: FlowProgram,
    inverse: bool,
    base: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """Run the compiled op."""
    op = torch.ops.iin_fast.flow_program.default
    if _followed():
        tensors = (x, *parameters) if context is None else (x, context, *parameters)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        found = op(
            x, context, list(parameters), program.text, inverse, base, keep if learns and keep != KEEP["auto"] else 0
        )
        return found[0], found[1]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, context, *parameters):
        x, context = _alive(x), context if context is None else _alive(context)
        return _apply(x, context, program, inverse, base, keep, *parameters)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        y, logdet, _ = op(x, context, parameters, program.text, inverse, base, 0)
    return y, logdet


# ---------------------------------------------------------------- autograd


@lru_cache(maxsize=1024)
def _wanted(program: FlowProgram, needed: tuple[bool, ...]) -> str:
    """One digit for each parameter: 1 where its gradient is asked for, and exists."""
    return "".join("1" if n and d else "0" for n, d in zip(needed, program.differentiable, strict=True))


class _Options(NamedTuple):
    """What an op was called with beside its tensors."""

    program: FlowProgram
    inverse: bool
    base: bool
    keep: int


def _gradients(
    options: _Options,
    grads: tuple[Tensor | None, ...],  # of y and of the log-det
    x: Tensor,
    saved: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    needed: tuple[bool, bool, tuple[bool, ...]],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x, context and each parameter; None where none is needed."""
    grad_y, grad_logdet = grads
    need_x, need_context, need_parameters = needed
    program, inverse, base, keep = options
    wanted = _wanted(program, need_parameters)
    if grad_y is None and grad_logdet is None:
        return None, None, [None] * len(parameters)
    # create_graph=True: derivatives of derivatives come from the definition itself
    if torch.is_grad_enabled() or mapped_by_autograd(grad_y, grad_logdet):
        return _by_definition(options, grads, x, context, parameters, need_x, need_context, wanted)
    grad_y = x.new_zeros(x.shape) if grad_y is None else grad_y
    grad_logdet = x.new_zeros(x.shape[0]) if grad_logdet is None else grad_logdet
    grad_x, grad_context, found = torch.ops.iin_fast.flow_program_backward.default(
        grad_y, grad_logdet, x, saved, context, parameters, program.text, inverse, base, keep, need_context, wanted
    )
    return (
        grad_x if need_x else None,
        grad_context if need_context else None,
        [g if w == "1" else None for g, w in zip(found, wanted, strict=True)] if "0" in wanted else found,
    )


def _by_definition(
    options: _Options,
    grads: tuple[Tensor | None, ...],  # of y and of the log-det
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    need_x: bool,
    need_context: bool,
    wanted: str,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    with torch.enable_grad():
        # aliases: what one input owes to another is the business of autograd beyond this op
        x = x.view_as(x)
        context = None if context is None else context.view_as(context)
        parameters = [p.view_as(p) for p in parameters]
        outputs = reference.flow_program(x, context, parameters, options.program, options.inverse, options.base)
    inputs = [x] if need_x else []
    inputs += [context] if need_context and context is not None else []
    inputs += [p for p, w in zip(parameters, wanted, strict=True) if w == "1"]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    by_input = dict(zip(map(id, inputs), found, strict=True))
    return by_input.get(id(x)), by_input.get(id(context)), [by_input.get(id(p)) for p in parameters]


class _Function(torch.autograd.Function):
    """The op with less Python than its registered autograd (benchmarks/overhead.py): parameters are arguments of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: Tensor | None,
        program: FlowProgram,
        inverse: bool,
        base: bool,
        keep: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, logdet, saved = torch.ops.iin_fast.flow_program.default(
                x, context, parameters, program.text, inverse, base, keep
            )
        ctx.options = _Options(program, inverse, base, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, saved, context, *parameters)
        return y, logdet

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, saved, context, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad
        by_input = needed[0], needed[1], needed[6:]
        found = _gradients(ctx.options, grads, x, saved, context, parameters, by_input)
        return found[0], found[1], None, None, None, None, *found[2]


# Function.apply looks in Python at every argument for wrappers of torch.func that outlived it. Parameters are many, and never
# such wrappers, so call() looks at the others alone.
_alive = torch._C._functorch.unwrap_if_dead
_apply = super(torch.autograd.Function, _Function).apply


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, context, parameters, text, inverse, base, keep = inputs
    ctx.options = _Options(FlowProgram.parse(text), inverse, base, keep)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[2], context, *parameters)


def _backward(ctx: Any, grad_y: Tensor | None, grad_logdet: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, saved, context, *parameters = ctx.saved_tensors
    need_x, need_context, need_parameters, *_ = ctx.needs_input_grad
    needed = need_x, need_context, tuple(need_parameters)
    found = _gradients(ctx.options, (grad_y, grad_logdet), x, saved, context, parameters, needed)
    return *found, None, None, None, None


# ---------------------------------------------------------------- fake kernels and vmap


def _fake(
    x: Tensor,
    context: Tensor | None,
    parameters: list[Tensor],
    program: str,
    inverse: bool,
    base: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_parameters(x, parameters, FlowProgram.parse(program))
    try:  # what is kept is the business of the engine
        size = torch.library.get_ctx().new_dynamic_size() if keep else 0
    except DynamicOutputShapeException:  # FakeTensorMode alone knows no unknown sizes
        size = 0
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), x.new_empty(size)


def _fake_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    saved: Tensor,
    context: Tensor | None,
    parameters: list[Tensor],
    program: str,
    inverse: bool,
    base: bool,
    keep: int,
    context_grad: bool,
    wanted: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grad_context = x.new_empty(context.shape if context_grad and context is not None else (0,))
    found = [x.new_empty(p.shape if w == "1" else (0,)) for p, w in zip(parameters, wanted, strict=True)]
    return x.new_empty(x.shape), grad_context, found


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """Rows of x and context go into one batch; programs with several sets of parameters run one by one."""
    (x, context, parameters, *rest), (x_dim, context_dim, parameter_dims, *_), size = args, in_dims, info.batch_size
    op = torch.ops.iin_fast.flow_program
    if any(dim is not None for dim in parameter_dims or ()):
        return _one_by_one(op, info, in_dims, *args)
    batch = front(x, x_dim, size).shape[1]
    context = None if context is None else front(context, context_dim, size).flatten(0, 1)
    y, logdet, saved = op(front(x, x_dim, size).flatten(0, 1), context, parameters, *rest)
    return (y.reshape(size, batch, y.shape[1]), logdet.reshape(size, batch), saved), (0, 0, None)


def _one_by_one(op: Any, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """One mapped index at a time, arguments and results may hold lists."""

    def at(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, list):
            return [at(v, None if dim is None else dim[k], i) for k, v in enumerate(value)]
        return value if dim is None else value.select(dim, i)

    def stack(parts: list[Any]) -> Any:
        return [stack(list(p)) for p in zip(*parts, strict=True)] if isinstance(parts[0], list) else torch.stack(parts)

    def front_of(value: Any) -> Any:
        return [front_of(v) for v in value] if isinstance(value, list) else 0

    calls = [op(*(at(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    results = tuple(stack(list(parts)) for parts in zip(*calls, strict=True))
    return results, tuple(front_of(part) for part in results)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return _one_by_one(torch.ops.iin_fast.flow_program_backward, info, in_dims, *args)


torch.library.register_fake(NAME, _fake)
torch.library.register_fake(f"{NAME}_backward", _fake_backward)
torch.library.register_autograd(NAME, _backward, setup_context=_setup)
torch.library.register_vmap(NAME, _vmap)
torch.library.register_vmap(f"{NAME}_backward", _vmap_backward)
autocast_to_float32(NAME)
