"""The op ``flow``: a whole stack of flow blocks in one call. Argument checks, choice of the backend, autograd.

On a CPU it is a program of the engine (program.py, op ``flow_program``); the op ``iin_fast::flow`` has the kernels for GPUs.

Files: reference.py (plain torch, the definition), layout.py (how weights lie), saved.py (what a GPU keeps for backward),
flops.py, csrc/flow (CUDA), torch_products.py (wide nets at large batches) and triton.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends import chosen
from ...checks import (
    autocast_enabled,
    check_device,
    check_dtype,
    check_floating,
    check_kind,
    check_rank,
    check_shape,
    checked_choice,
    checked_flag,
    checked_number,
)
from ...flow import FlowProgram
from ..autograd import followed, has_values
from ..flow_program import engine
from ..flow_program.walk import walks
from ..inversion import check_inverse
from ..registry import OPS, Op, eager_call, register
from ..types import FLOATING, FULL, accumulator_type, tf32_is_allowed
from ..vmap import Rule, front, one_by_one
from . import flops, reference, torch_products
from .layout import pack, unpack
from .program import TENSORS, flow_as_program
from .saved import saved_bytes

__all__ = ["AUTO_SAVE_BYTES", "KEEP", "MEMORY", "flow", "pack", "unpack"]

KEEP = {"invert": 0, "checkpoint": 1, "save": 2}  # csrc/common/keep.h
MEMORY = ("auto", "save", "checkpoint", "invert")

AUTO_SAVE_BYTES = 512 * 2**20
"""On a CPU ``memory="auto"`` saves activations of large nets up to this many bytes and keeps inputs of layers beyond.

automatic_wide_bytes in csrc/flow_program/flow_program_cpu.cpp; here for compiled graphs, which choose beforehand.
"""

_PARAMETERS = TENSORS[:-1]


def flow(
    x: Tensor,  # [batch, dim]
    context: Tensor | None,  # [1 or n_flows, batch, context_dim]
    loc: Tensor,  # [n_flows, dim]
    scale: Tensor,  # [n_flows, dim]
    weight_in: Tensor,  # [n_flows, 2 (half), 2 (s, t), (c + context_dim) * hidden]
    bias_in: Tensor,  # [n_flows, 2, 2, hidden]
    weight_hidden: Tensor,  # [n_flows, 2, 2, depth, hidden * hidden]
    bias_hidden: Tensor,  # [n_flows, 2, 2, depth, hidden]
    weight_out: Tensor,  # [n_flows, 2, 2, hidden * (dim - c)]
    bias_out: Tensor,  # [n_flows, 2, 2, dim - c]
    permutation: Tensor,  # [n_flows, dim] int64
    *,
    leaky_slope: float = 0.01,
    activation_slope: float = 1.0,
    exact_logdet: bool = False,
    inverse: bool = False,
    memory: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""A stack of flow blocks, forward or inverse, with its log-determinant, in one pass.

    A block is an ActNorm :math:`h = \text{scale}\,(x + \text{loc})`, an optional leaky activation, two affine couplings
    :math:`y_2 = x_2 \exp(\tanh S(u)) + T(u)` with the halves swapped in between, where u is the other half and the
    context, and a fixed permutation. reference.py is the definition, c = ceil(dim / 2).

    Args:
        x: ``[batch, dim]``, float32 or float64, any strides; dim of at least 2, batch may be 0. On GPUs, and with the
            backends triton and reference, also bfloat16 or float16: couplings, log-det and what lies between blocks stay in float32.
        context: ``[1, batch, context_dim]`` for all blocks or ``[n_flows, batch, context_dim]``; None for none.
        loc, scale: ``[n_flows, dim]``, ActNorm; scale not 0.
        weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out: the nets S and T of every half of every
            block, stacked, each weight packed in panels by :func:`pack`; shapes as in the signature.
        permutation: ``[n_flows, dim]`` int64; ``y[:, j] = h[:, permutation[j]]``.
        leaky_slope: slope of the nets' LeakyReLU below 0, at least 0.
        activation_slope: slope of the activation after ActNorm below 0, above 0; 1 is no activation.
        exact_logdet: count the activation in the log-det (the published net2net code does not).
        inverse: compute x from y.
        memory: what is kept for backward. "save": all activations. "checkpoint": the input of every layer, a few percent
            of that, and backward computes the nets again, at about a third more time; on CPUs alone. "auto": "save", on
            CPUs up to ``AUTO_SAVE_BYTES`` of activations and "checkpoint" beyond; flows of small nets save up to 16 MiB,
            and beyond that keep ``x`` alone and compute the flow again. All three give the same gradients. "invert": only
            the output, from which backward inverts block by block, so that memory does not grow with depth. Its gradients are as wrong as the inverse is in the precision of ``x``; backward warns
            where it finds that. Where backward starts from the output ("invert", and the inverse on GPUs), change a
            copy of it, not itself.

    Returns:
        The mapped ``[batch, dim]`` and the log-determinant ``[batch]``, in nats, of the map that was computed, in
        float32 for inputs of 16 bits.

    Raises:
        TypeError: a dtype that the backend does not take, or dtypes that differ.
        ValueError: shapes or devices that don't fit, slopes out of range, an unknown ``memory``, "checkpoint" on a GPU.

    Warns:
        RuntimeWarning: with "invert", once, where the inverse misses the input by more than the root of the precision of ``x``.

    References:
        Esser, Rombach, Ommer: A disentangling invertible interpretation network, CVPR 2020, Sec. 3.1.
        Gomez, Ren, Urtasun, Grosse: The reversible residual network, 2017 (backward by inversion).

    See also:
        ``iin_fast.ops.affine_coupling`` for a single coupling with conditioners of your own.
    """
    parameters = (loc, scale, weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out)
    backend = _check(x, context, parameters, permutation)
    memory = checked_choice("flow", "memory", memory, MEMORY)
    leaky_slope = checked_number("flow", "leaky_slope", leaky_slope, least=0)
    activation_slope = checked_number("flow", "activation_slope", activation_slope, above=0)
    exact_logdet = checked_flag("flow", "exact_logdet", exact_logdet)
    inverse = checked_flag("flow", "inverse", inverse)
    tensors = (x, context, *parameters, permutation)
    if backend == "reference":
        return reference.flow(*tensors, leaky_slope, activation_slope, exact_logdet, inverse)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    tf32 = x.is_cuda and tf32_is_allowed()
    products = (
        backend == "cpp"
        and (memory in ("auto", "save") or not learns)
        and torch_products.takes_products(x, bias_in.shape[3])
    )
    slopes = leaky_slope, activation_slope, exact_logdet
    if backend == "cpp" and not products:
        if x.device.type == "cpu" or _walked(tensors, slopes, inverse, memory, learns, tf32):
            return _by_program(tensors, slopes, inverse, memory, learns)
    if memory == "checkpoint":
        raise ValueError(
            f"flow: memory is 'checkpoint' for {backend} on {x.device.type}, expected 'auto', 'save' or 'invert': only the "
            f"compiled op on a CPU has it; to save memory, use torch.utils.checkpoint around parts of the flow"
        )
    keep = KEEP["save" if memory == "auto" else memory] if learns else KEEP["invert"]
    options = leaky_slope, activation_slope, exact_logdet, inverse, keep, tf32
    y, logdet, _ = _calls["products" if products else backend](*tensors, *options)
    return y, logdet


WALKED = {64: 0, 128: 2048}
"""Flows that a GPU runs as programs, a block for some rows, in plain float32 or float64: width of the nets, at most, and rows of the
batch, at least. Blocks share the layers of wider nets. Measured on an H100 (docs/performance.md)."""


Slopes = tuple[float, float, bool]  # leaky_slope, activation_slope, exact_logdet


def _walked(
    tensors: Sequence[Tensor | None], slopes: Slopes, inverse: bool, memory: str, learns: bool, tf32: bool
) -> bool:
    """Whether a GPU takes this call as a program."""
    hidden, batch = tensors[5].shape[3], tensors[0].shape[0]  # type: ignore[union-attr]
    fits = any(hidden <= most and batch >= least for most, least in WALKED.items())
    if tf32 or not fits or followed() or (learns and memory not in ("auto", "save")):
        return False
    x, context, parameters, program = _as_program(tensors, slopes)
    return not autocast_enabled(x) and walks(x, context, parameters, program, inverse)


def _as_program(
    tensors: Sequence[Tensor | None], slopes: Slopes
) -> tuple[Tensor, Tensor | None, list[Tensor], FlowProgram]:
    x, context, *rest = tensors
    assert x is not None
    parameters = [t for t in rest if t is not None]
    loc, bias_in, bias_hidden = parameters[0], parameters[3], parameters[5]
    contexts, context_dim = (1, 0) if context is None else (context.shape[0], context.shape[2])
    sizes: tuple[int, ...] = x.shape[1], loc.shape[0], bias_in.shape[3], bias_hidden.shape[3], context_dim, contexts
    if followed():  # a graph holds for these numbers; writing them down makes them constants to torch.compile
        sizes, slopes = tuple(int(f"{n}") for n in sizes), (float(f"{slopes[0]}"), float(f"{slopes[1]}"), slopes[2])
    if context is not None:
        context = context[0] if contexts == 1 else context.transpose(0, 1).flatten(1)
        context = context if context_dim else None
    return x, context, parameters, flow_as_program(*sizes, *slopes)


def _by_program(
    tensors: Sequence[Tensor | None], slopes: Slopes, inverse: bool, memory: str, learns: bool
) -> tuple[Tensor, Tensor]:
    """The flow as a program of the engine."""
    x, context, parameters, program = _as_program(tensors, slopes)
    if autocast_enabled(x):
        x, context, *parameters = (engine.in_float32(t) for t in (x, context, *parameters))
    if memory == "auto" and learns and followed():  # a compiled graph has to know
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

        blocks, hidden, depth = (tensors[place].shape[at] for place, at in ((2, 0), (5, 3), (7, 3)))  # type: ignore[union-attr]
        saved = 4 * int(f"{blocks}") * (int(f"{depth}") + 1) * int(f"{hidden}") * x.shape[0] * x.element_size()
        memory = "save" if statically_known_true(saved <= AUTO_SAVE_BYTES) else "checkpoint"  # for a batch of any size
    keep = engine.INVERT if memory == "invert" else engine.KEEP[memory]
    try:
        return engine.call(x, context, parameters, program, inverse, False, keep)
    except RuntimeError:
        if has_values(x):
            _check_permutation(parameters[-1])
        raise


def _check_permutation(permutation: Tensor) -> None:
    for block, index in enumerate(permutation):
        if index.sort().values.ne(torch.arange(len(index), device=index.device)).any():
            raise RuntimeError(f"flow: permutation[{block}] is not a permutation of 0 .. {len(index) - 1}")


def _check(x: Tensor, context: Tensor | None, parameters: tuple[Tensor, ...], permutation: Tensor) -> str:
    """Refuse what does not fit; gives the backend."""
    op = "flow"
    check_floating(op, "x", x)
    backend = chosen(op, x)
    dtype, device = x.dtype, x.device
    types = FULL if backend == "cpp" and device.type == "cpu" else FLOATING
    alike = dtype in types  # the usual, in one look; what differs is looked at closely
    for value in parameters if context is None else (*parameters, context):
        if not isinstance(value, Tensor) or value.dtype != dtype or value.device != device:
            alike = False
    if not alike:
        _check_types(op, x, context, parameters, types)
    if x.dim() != 2 or x.shape[1] < 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [batch, dim] with dim of at least 2")
    loc, _, _, bias_in, _, bias_hidden, _, _ = parameters
    dim = x.shape[1]
    if loc.dim() != 2 or loc.shape[0] < 1:
        raise ValueError(f"{op}: loc has shape {list(loc.shape)}, expected [n_flows, {dim}] with at least one flow")
    n_flows = loc.shape[0]
    # Messages are made where they are needed alone: they take time, and in a compiled call they fix the batch size.
    if bias_in.dim() != 4:
        check_rank(op, "bias_in", bias_in, f"[{n_flows}, 2, 2, hidden]", 4)
    if bias_hidden.dim() != 5:
        check_rank(op, "bias_hidden", bias_hidden, f"[{n_flows}, 2, 2, depth, hidden]", 5)
    hidden, depth = bias_in.shape[3], bias_hidden.shape[3]
    if hidden < 1:
        raise ValueError(f"{op}: bias_in has shape {list(bias_in.shape)}, expected a hidden width of at least 1")
    wide = 0
    if context is not None:
        if context.dim() != 3:
            check_rank(op, "context", context, f"[1 or {n_flows}, {x.shape[0]}, context_dim]", 3)
        if context.shape[0] not in (1, n_flows) or context.shape[1] != x.shape[0]:
            raise ValueError(
                f"{op}: context has shape {list(context.shape)}, expected [1 or {n_flows}, {x.shape[0]}, context_dim]"
            )
        wide = context.shape[2]
    out = dim // 2
    shapes = (
        (n_flows, dim),
        (n_flows, dim),
        (n_flows, 2, 2, (dim - out + wide) * hidden),
        (n_flows, 2, 2, hidden),
        (n_flows, 2, 2, depth, hidden * hidden),
        (n_flows, 2, 2, depth, hidden),
        (n_flows, 2, 2, hidden * out),
        (n_flows, 2, 2, out),
    )
    for place, value in enumerate(parameters):
        if value.shape != shapes[place]:
            like = f"for dim {dim}, context {wide}, {n_flows} flows, hidden {hidden}, depth {depth}"
            check_shape(op, _PARAMETERS[place], value, shapes[place], like)
    check_kind(op, "permutation", permutation, torch.int64, "an int64 tensor")
    if permutation.device != device:
        check_device(op, "permutation", permutation, x, "x")
    if permutation.shape != shapes[0]:
        check_shape(op, "permutation", permutation, shapes[0], "like loc")
    return backend


def _check_types(
    op: str, x: Tensor, context: Tensor | None, parameters: tuple[Tensor, ...], types: tuple[torch.dtype, ...]
) -> None:
    autocast = autocast_enabled(x)
    given = [("x", x), *zip(_PARAMETERS, parameters, strict=True)]
    if context is not None:
        given.append(("context", context))
    for name, value in given:
        if not isinstance(value, Tensor) or not autocast:
            check_floating(op, name, value, types)
        if not autocast:
            check_dtype(op, name, value, x.dtype, "like x")
        check_device(op, name, value, x, "x")


def _fake(
    x: Tensor,
    context: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_hidden: Tensor,
    bias_hidden: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    permutation: Tensor,
    leaky_slope: float,
    activation_slope: float,
    exact_logdet: bool,
    inverse: bool,
    keep: int,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gpu(x, loc.shape[0], bias_in.shape[3], bias_hidden.shape[3], inverse, keep)


def _fake_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    y: Tensor,
    saved: Tensor,
    context: Tensor | None,
    loc: Tensor,
    scale: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_hidden: Tensor,
    bias_hidden: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    permutation: Tensor,
    leaky_slope: float,
    activation_slope: float,
    inverse: bool,
    keep: int,
    context_grad: bool,
    weight_grads: bool,
    tf32: bool = False,
) -> tuple[Tensor | None, ...]:
    def like(t: Tensor) -> Tensor:
        return t.new_empty(t.shape)

    weights = (weight_in, bias_in, weight_hidden, bias_hidden, weight_out, bias_out)
    return (
        like(y),
        like(context) if context_grad and context is not None else None,
        like(loc),
        like(scale),
        *(like(t) if weight_grads else None for t in weights),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options, ctx.keep, ctx.tf32 = inputs[11:15], inputs[15], inputs[16]
    y, _, saved = output
    # Saved activations make the output needless; a GPU's inverse reads it still. What is read is a copy: the user may
    # change the output in place.
    inverse, keep = inputs[14:16]
    needless = keep and not (inverse and saved.dtype == torch.uint8)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(None if needless else y.clone(), saved, *inputs[:11])


def _definition(ctx: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
    return reference.flow, (*ctx.saved_tensors[2:], *ctx.options)


def _backward(
    kernel: Any, ctx: Any, grad_y: Tensor | None, grad_logdet: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    if grad_y is None and grad_logdet is None:
        return (None,) * len(needed)
    y, saved, *tensors = ctx.saved_tensors
    y = tensors[0] if y is None else y  # for its shape
    leaky_slope, activation_slope, _, inverse = ctx.options
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    grad_logdet = y.new_zeros(y.shape[0], dtype=accumulator_type(y.dtype)) if grad_logdet is None else grad_logdet
    if ctx.keep == KEEP["invert"]:
        _check_inverse(y, tensors, ctx.options)
    context_grad, weight_grads = tensors[1] is not None and needed[1], any(needed[4:10])
    options = leaky_slope, activation_slope, inverse, ctx.keep, context_grad, weight_grads, ctx.tf32
    found = kernel(grad_y, grad_logdet, y, saved, *tensors[1:], *options)
    return *(g if n else None for g, n in zip(found, needed, strict=False)), *(None,) * (len(needed) - len(found))


def _check_inverse(y: Tensor, tensors: list[Any], options: tuple[float, float, bool, bool]) -> None:
    x, context, *rest = tensors
    leaky_slope, activation_slope, _, inverse = options

    def back(rows: Tensor) -> Tensor:
        given = y[rows], None if context is None else context[:, rows], *rest
        return flow(*given, leaky_slope=leaky_slope, activation_slope=activation_slope, inverse=not inverse)[0]

    check_inverse("flow", x, back)


def _fake_triton(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loc, bias_in, bias_hidden, inverse, keep = rest[1], rest[4], rest[6], rest[13], rest[14]
    return _fake_gpu(x, loc.shape[0], bias_in.shape[3], bias_hidden.shape[3], inverse, keep)


def _fake_gpu(
    x: Tensor, n_flows: int, hidden: int, depth: int, inverse: bool, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    size = saved_bytes(x, hidden, depth, n_flows, inverse) if keep else 0
    logdet = x.new_empty(x.shape[:1], dtype=accumulator_type(x.dtype))
    return x.new_empty(x.shape), logdet, x.new_empty(size, dtype=torch.uint8)


def _vmap(op: Callable[..., Any]) -> Rule:
    """Rows of x and context go into one batch; flows of several sets of parameters run one by one."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        (x, context, *rest), (x_dim, context_dim, *rest_dims), size = args, in_dims, info.batch_size
        if any(dim is not None for dim in rest_dims):
            return one_by_one(op)(info, in_dims, *args)
        batch = front(x, x_dim, size).shape[1]
        if context is not None:  # [size, 1 or n_flows, batch, context_dim]
            context = front(context, context_dim, size).transpose(0, 1).flatten(1, 2)
        y, logdet, saved = op(front(x, x_dim, size).flatten(0, 1), context, *rest)
        return (y.reshape(size, batch, y.shape[1]), logdet.reshape(size, batch), saved), (0, 0, None)

    return rule


_calls = register(
    Op(
        "flow",
        _setup,
        _backward,
        _definition,
        _fake,
        _fake_backward,
        _fake_triton,
        vmap=_vmap,
        vmap_backward=one_by_one,
        flops=flops.forward,
        flops_backward=flops.backward,
        cpu_types=FULL,
    )
)
_calls["products"] = eager_call(
    OPS["flow"], "flow_in_torch_products", torch_products.forward, torch_products.flow_backward
)
