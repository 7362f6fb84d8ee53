"""The compiled op ``iin_fast::flow_program`` to torch: autograd, fake kernels, autocast, vmap, and the short way from Python."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from ...flow import FlowProgram
from ..autograd import by_definition, differentiated, followed
from ..inversion import check_inverse
from ..registry import Op, register
from ..types import FULL
from ..vmap import Rule, front, one_by_one
from . import ahead, direct, flops, reference
from .checks import KEEP, check_parameters
from .walk import tf32_products

__all__ = ["INVERT", "call", "in_float32", "nll_backward"]

INVERT = 4
"""Keep the output alone: backward inverts layer by layer. For programs without autoregressive layers (csrc/common/keep.h)."""


def in_float32(value: Any) -> Any:
    """What autocast to float32 does: tensors of 16 bits are converted, all others stay."""
    narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize == 2
    return value.float() if narrow else value


def call(
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    program: FlowProgram,
    inverse: bool,
    base: bool,
    keep: int,
    tf32: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the compiled op. tf32: see ``walk.tf32_products``, which None asks."""
    tf32 = tf32_products(x) if tf32 is None else tf32
    op = torch.ops.iin_fast.flow_program.default
    if followed():
        tensors = (x, *parameters) if context is None else (x, context, *parameters)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        keep = keep if learns and keep != KEEP["auto"] else 0
        found = op(x, context, list(parameters), program.text, inverse, base, keep, tf32)
        return found[0], found[1]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, context, *parameters):
        x, context = _alive(x), context if context is None else _alive(context)
        if direct.asked() and direct.possible(x, parameters):
            options = _Options(program, inverse, base, keep, tf32)
            passed = [i for i, on in enumerate(direct.passed_on(parameters)) if on]
            inputs = x, context, direct.ANCHOR, options, parameters, passed, *[parameters[i] for i in passed]
            return _apply_direct(*inputs)  # type: ignore[no-any-return]
        return _apply(x, context, program, inverse, base, keep, tf32, *parameters)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        y, logdet, _ = op(x, context, parameters, program.text, inverse, base, 0, tf32)
    return y, logdet


def nll_backward(
    x: Tensor, context: Tensor | None, parameters: Sequence[Tensor], program: FlowProgram
) -> Tensor | None:
    """The mean negative log-likelihood, its gradients added to ``.grad``, in one walk and without a graph.

    None, and nothing done, where that is not to be had, or gains nothing.
    """
    learning = direct.learning(parameters)
    if not (direct.allowed(x) and any(learning)) or any(direct.passed_on(parameters)):
        return None
    if not ahead.gains(program, x.shape[0], x.dtype.itemsize, False):
        return None
    if ahead.watched() or x.requires_grad or (context is not None and context.requires_grad):
        return None
    wanted = _wanted(program, learning)
    with torch._C._AutoDispatchBelowAutograd():
        loss, grads = torch.ops.iin_fast.flow_program_nll.default(x, context, parameters, program.text, wanted)
    direct.add_to_grad(parameters, _some(grads, wanted), False)
    return loss  # type: ignore[no-any-return]


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
    tf32: int


def _gradients(
    options: _Options,
    grads: tuple[Tensor | None, ...],  # of y and of the log-det
    x: Tensor,
    saved: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    needed: ahead.Needed,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x, context and each parameter; None where none is needed."""
    grad_y, grad_logdet = grads
    _, need_context, need_parameters = needed
    if grad_y is None and grad_logdet is None:
        return None, None, [None] * len(parameters)
    program, inverse, base, keep, tf32 = options
    if keep == INVERT:
        op = torch.ops.iin_fast.flow_program.default

        def back(rows: Tensor) -> Tensor:
            y, here = saved.view(x.shape)[rows], None if context is None else context[rows]
            return op(y, here, parameters, program.text, not inverse, False, 0)[0]  # type: ignore[no-any-return]

        check_inverse("flow", x, back)
    wanted = _wanted(program, need_parameters)
    grad_logdet = x.new_zeros(x.shape[0]) if grad_logdet is None else grad_logdet
    found = torch.ops.iin_fast.flow_program_backward.default(
        *(grad_y, grad_logdet, x, saved, context, parameters, program.text),
        *(inverse, base, keep, need_context, wanted, tf32),
    )
    return _asked(program, found, needed)


def _asked(
    program: FlowProgram, found: Sequence[Any], needed: ahead.Needed
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Of the gradients that an op gives those that were asked for."""
    need_x, need_context, need_parameters = needed
    grad_x, grad_context, grads = found
    wanted = _wanted(program, need_parameters)
    return (
        grad_x if need_x else None,
        grad_context if need_context else None,
        _some(grads, wanted),
    )


def _some(grads: list[Tensor], wanted: str) -> list[Tensor | None]:
    """Of the gradients of parameters those that were asked for."""
    if "0" not in wanted:
        return grads  # type: ignore[return-value]
    return [g if w == "1" else None for g, w in zip(grads, wanted, strict=True)]


def _needed(ctx: Any) -> ahead.Needed:
    """What this backward asks for: ``torch.autograd.grad(…, [x])`` wants no gradients of parameters that require them."""
    needed = ctx.needs_input_grad
    of_parameters = needed[FIRST:]
    if any(of_parameters):
        nodes = [node for node, _ in ctx.next_functions]  # of the tensors among the arguments
        last = nodes[len(nodes) - len(of_parameters) :]
        if not _runs(last[of_parameters.index(True)]):  # no backward for all of them
            x, *context = map(_runs, nodes[: len(nodes) - len(of_parameters)])
            return x, context == [True], tuple(map(_runs, last))
    return needed[0], needed[1], of_parameters


def _runs(node: Any) -> bool:
    """Whether the backward that is under way comes to a node of its graph."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad returns
        return True


def _ready(ctx: Any, grads: tuple[Tensor | None, Tensor | None], needed: ahead.Needed) -> Sequence[Any] | None:
    """What forward has computed ahead, if that is what this backward asks for. It is given away once."""
    if ctx.habit is None:
        return None
    same = ctx.habit.learn(*grads, needed)
    guess, found = ctx.__dict__.pop("ahead", (None, None))
    return found if same and guess is ctx.habit.grad else None


def _definition(ctx: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
    x, _, context, *parameters = ctx.saved_tensors
    program, inverse, base, *_ = ctx.options
    return partial(reference.flow_program, program=program, inverse=inverse, base=base), (x, context, parameters)


FIRST = 7
"""Where parameters begin among the arguments of ``_Function``."""


def _forward(
    ctx: Any,
    x: Tensor,
    context: Tensor | None,
    options: _Options,
    parameters: Sequence[Tensor],
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """The op, and what its backward reads. needed: which tensors are asked for their gradients, for the habit's name alone."""
    program, inverse, base, keep, tf32 = options
    habit = guess = None
    if keep == KEEP["auto"]:
        habit = ahead.habit(x, parameters, program, inverse, base, needed)
        guess = None if habit is None else habit.guess()
    with torch._C._AutoDispatchBelowAutograd():
        if habit is None or guess is None:
            y, logdet, saved = torch.ops.iin_fast.flow_program.default(
                x, context, parameters, program.text, inverse, base, keep, tf32
            )
        else:
            _, of_context, of_parameters = habit.needed
            options, wanted = options._replace(keep=KEEP["recompute"]), _wanted(program, of_parameters)
            y, logdet, *found = torch.ops.iin_fast.flow_program_ahead.default(
                guess, x, context, parameters, program.text, inverse, base, of_context, wanted
            )
            saved, ctx.ahead = None, (guess, found)
    ctx.options, ctx.habit = options, habit
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, saved, context, *parameters)
    return y, logdet


def _found(ctx: Any, grads: tuple[Any, ...], needed: ahead.Needed) -> Sequence[Any]:
    """The gradients of x, of context and of a list of parameters."""
    x, saved, context, *parameters = ctx.saved_tensors
    ready = _ready(ctx, grads, needed)
    if ready is not None:
        return _asked(ctx.options.program, ready, needed)
    saved = x.new_empty(0) if saved is None else saved
    return _gradients(ctx.options, grads, x, saved, context, parameters, needed)  # type: ignore[arg-type]


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
        tf32: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        options = _Options(program, inverse, base, keep, tf32)
        return _forward(ctx, x, context, options, parameters, ctx.needs_input_grad)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if differentiated(*grads):
            found: Sequence[Any] = by_definition(*_definition(ctx), grads)
        else:
            found = _found(ctx, grads, _needed(ctx))
        return found[0], found[1], None, None, None, None, None, *found[2]


class _Direct(torch.autograd.Function):
    """As ``_Function``, but parameters are no inputs of its node: backward adds to their ``.grad`` itself (direct.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: Tensor | None,
        anchor: Tensor,
        options: _Options,
        parameters: Sequence[Tensor],
        passed: Sequence[int],  # which of them torch's own nodes take on
        *_: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.parameters, ctx.passed = parameters, passed  # themselves: hooks of saved tensors give copies back
        ctx.learning = direct.learning(parameters)
        return _forward(ctx, x, context, options, parameters, (x.requires_grad, *ctx.learning))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        parameters, passed = ctx.parameters, ctx.passed
        need_x, need_context, *_ = ctx.needs_input_grad
        # frozen at either end: no gradient
        wanted = tuple([was and p.requires_grad for was, p in zip(ctx.learning, parameters, strict=True)])
        # of x, of context where there is one, of the anchor, of parameters that are passed on
        nodes = [node for node, _ in ctx.next_functions]
        anchor = len(nodes) - len(passed) - 1
        # torch.autograd.grad, and backward(inputs=…), add to no .grad but of what they are asked for
        lands = _runs(nodes[anchor])
        if not lands:
            need_x, need_context = need_x and _runs(nodes[0]), need_context and _runs(nodes[anchor - 1])
            further = {i for i, node in zip(passed, nodes[anchor + 1 :], strict=True) if _runs(node)}
            wanted = tuple(i in further for i in range(len(parameters)))
        if differentiated(*grads):
            found: Sequence[Any] = by_definition(*_definition(ctx), grads)
        else:
            found = _found(ctx, grads, (need_x, need_context, wanted))
        on = [found[2][i] for i in passed]
        if lands:
            own = list(found[2])
            for i in passed:
                own[i] = None
            direct.add_to_grad(parameters, own, torch.is_grad_enabled())
        return found[0], found[1], None, None, None, None, *on


# Function.apply looks in Python at every argument for wrappers of torch.func that outlived it. Parameters are many, and never
# such wrappers, so call() looks at the others alone.
_alive = torch._C._functorch.unwrap_if_dead
_apply = super(torch.autograd.Function, _Function).apply
_apply_direct = super(torch.autograd.Function, _Direct).apply


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, context, parameters, text, *options = inputs
    ctx.options = _Options(FlowProgram.parse(text), *options)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[2], context, *parameters)


def _backward(kernel: Any, ctx: Any, grad_y: Tensor | None, grad_logdet: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, saved, context, *parameters = ctx.saved_tensors
    need_x, need_context, need_parameters, *_ = ctx.needs_input_grad
    needed = need_x, need_context, tuple(need_parameters)
    found = _gradients(ctx.options, (grad_y, grad_logdet), x, saved, context, parameters, needed)
    return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))  # torch leaves a default of the schema out


# ---------------------------------------------------------------- fake kernels and vmap


def _fake(
    x: Tensor,
    context: Tensor | None,
    parameters: list[Tensor],
    program: str,
    inverse: bool,
    base: bool,
    keep: int,
    tf32: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    check_parameters(x, parameters, FlowProgram.parse(program))
    try:  # what is kept is the business of the engine
        size = torch.library.get_ctx().new_dynamic_size() if keep else 0
    except DynamicOutputShapeException:  # FakeTensorMode alone knows no unknown sizes
        size = 0
    return x.new_empty(x.shape), x.new_empty(x.shape[:1]), x.new_empty(size)


def _fake_backward(
    grad_y: Tensor | None,
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
    tf32: int = 0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grad_context = x.new_empty(context.shape if context_grad and context is not None else (0,))
    found = [x.new_empty(p.shape if w == "1" else (0,)) for p, w in zip(parameters, wanted, strict=True)]
    return x.new_empty(x.shape), grad_context, found


def _vmap(op: Callable[..., Any]) -> Rule:
    """Rows of x and context go into one batch; programs with several sets of parameters run one by one."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        (x, context, parameters, *rest), (x_dim, context_dim, parameter_dims, *_), size = args, in_dims, info.batch_size
        if any(dim is not None for dim in parameter_dims or ()):
            return one_by_one(op)(info, in_dims, *args)
        batch = front(x, x_dim, size).shape[1]
        context = None if context is None else front(context, context_dim, size).flatten(0, 1)
        y, logdet, saved = op(front(x, x_dim, size).flatten(0, 1), context, parameters, *rest)
        return (y.reshape(size, batch, y.shape[1]), logdet.reshape(size, batch), saved), (0, 0, None)

    return rule


register(
    Op(
        "flow_program",
        _setup,
        _backward,
        _definition,
        _fake,
        _fake_backward,
        vmap=_vmap,
        vmap_backward=one_by_one,
        flops=flops.forward,
        flops_backward=flops.backward,
        cpu_types=FULL,
        on_gpus=False,
    )
)
