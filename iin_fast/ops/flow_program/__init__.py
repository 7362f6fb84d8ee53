"""The op ``flow_program``: any flow, given as a program, in one call. Argument checks, choice of the backend, autograd.

Files: reference.py (plain torch, the definition), checks.py, walk.py (what GPUs take whole), engine.py (autograd and fake kernels of
the compiled op), ahead.py (gradients that come with the results), and csrc/flow_program (CPU, CUDA). What a GPU cannot walk as a
whole, and Triton, run layer by layer through the ops of couplings and splines.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from ...backends import chosen, chosen_compiled
from ...checks import autocast_enabled, checked_choice, checked_flag, version
from ...flow import FlowProgram
from ...flow import layers as L
from ..affine_coupling import SQUASHES
from ..affine_coupling import affine_coupling as fused_affine
from ..autograd import followed, has_values
from ..spline_coupling import spline_coupling as fused_spline
from ..types import FLOATING, FULL, HALF
from . import engine, reference
from .checks import KEEP, check_data, check_parameters, check_rows
from .walk import runs, tf32_products, walks

__all__ = ["flow_program", "nll_backward"]


def flow_program(
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    program: FlowProgram,
    *,
    inverse: bool = False,
    base: bool = False,
    memory: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""A whole flow, forward or inverse, with its log-determinant, in one call.

    reference.py is the definition of every layer.

    Args:
        x: ``[batch, dim]``, float32 or float64, any strides; batch may be 0. On GPUs, and with the backends triton and
            reference, also bfloat16 or float16.
        context: ``[batch, context]`` like ``x``, or None for a program without one.
        parameters: the tensors that the program names, each contiguous or copied; masks are bool or like ``x``, all others like ``x``.
        program: what to compute.
        inverse: compute x from y.
        base: add the log-density of a standard normal at the result, so that the second result of the forward direction
            is the log-likelihood in nats.
        memory: what is kept for backward. "save": all values of all nets; "checkpoint": the input of every layer, and
            backward computes a net again before its gradients; "recompute": x alone, and backward computes the flow
            again; "auto": the library chooses, and computes gradients along with the results where the last backwards were
            given the same gradient (ahead.py). Gradients are the same, and exact. Only the compiled op can choose.

    Returns:
        The mapped ``[batch, dim]`` and the log-determinant ``[batch]``, in nats, of the map that was computed, in
        float32 for inputs of 16 bits. Both are differentiable, to any order; masks have no gradient.

    Raises:
        TypeError: a dtype that the backend does not take, or dtypes that differ.
        ValueError: shapes or devices that don't fit; a context that is missing or not wanted; masks that let a feature
            depend on itself; a plain scale that holds 0; an unknown ``memory``. The message names the layer by number and kind.

    Example:
        >>> import torch
        >>> from iin_fast.flow import FlowProgram
        >>> program = FlowProgram.parse("flow 1 2 0 1 2 affine 0 1 0.0 0 0 0 2 permute 1 0")
        >>> x, parameters = torch.randn(5, 2), [torch.tensor([0.0, 1.0, 0.5, -0.5])]
        >>> y, logdet = flow_program(x, None, parameters, program)
        >>> back, _ = flow_program(y, None, parameters, program, inverse=True)
        >>> torch.allclose(back, x, atol=1e-6)
        True
    """
    checked_choice("flow_program", "memory", memory, tuple(KEEP))
    for name, value, kind in (("x", x, Tensor), ("program", program, FlowProgram)):
        if not isinstance(value, kind):
            raise TypeError(f"flow_program: {name} is a {type(value).__name__}, expected a {kind.__name__}")
    inverse, base = checked_flag("flow_program", "inverse", inverse), checked_flag("flow_program", "base", base)
    if autocast_enabled(x):  # a density is no place for products of 8 bits of precision
        x, context = engine.in_float32(x), engine.in_float32(context)
        parameters = [engine.in_float32(p) for p in parameters]
        with torch.autocast(x.device.type, enabled=False):
            return flow_program(x, context, parameters, program, inverse=inverse, base=base, memory=memory)
    backend = chosen("flow_program", x)
    if backend == "cpp" and runs(x, context, parameters, program, inverse):
        check_rows(x, context, program, FULL)
        return _run(x, context, parameters, program, inverse, base, KEEP[memory])
    check_rows(x, context, program, FLOATING)
    if has_values(x):
        _check_once(x, parameters, program)
    else:
        check_parameters(x, parameters, program)
    if backend == "cpp" and x.dtype in HALF:  # what computes them in float32 is the walk, where there is one
        wide, around, *values = map(engine.in_float32, (x, context, *parameters))
        if walks(wide, around, values, program, inverse):
            y, logdet = engine.call(wide, around, values, program, inverse, base, KEEP[memory], tf32_products(x))
            return y.to(x.dtype), logdet
    plain = backend == "reference" and (backends.needs_definition() or backends._forced == "reference")
    return reference.flow_program(
        x, context, parameters, program, inverse, base, reference.DEFINITION if plain else LAYER_BY_LAYER
    )


# Programs and parameters that were checked: a repeated call pays for one look at the identities of its parameters, and at the
# versions of masks and indices. What changes in place otherwise is caught by the compiled op itself, and then looked at closely.
_checked: dict[tuple[object, ...], list[weakref.ref[Tensor]]] = {}
_MOST_CHECKED = 64


def _check_once(x: Tensor, parameters: Sequence[Tensor], program: FlowProgram) -> None:
    """Look at sizes and values of parameters when they come for the first time."""
    key = (program, x.dtype, *map(id, parameters), *(version(parameters[i]) for i in program.fixed))
    if key not in _checked:
        check_parameters(x, parameters, program)
        check_data(parameters, program)
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        # another tensor may get the identity of one that is gone
        _checked[key] = [weakref.ref(p, lambda _: _checked.pop(key, None)) for p in parameters]


def _run(
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    program: FlowProgram,
    inverse: bool,
    base: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    if not has_values(x):  # traced or mapped: the fake kernel checks
        return engine.call(x, context, parameters, program, inverse, base, keep)
    _check_once(x, parameters, program)
    try:
        return engine.call(x, context, parameters, program, inverse, base, keep)
    except RuntimeError:
        check_parameters(x, parameters, program)  # a better message, if the parameters are to blame
        raise


def nll_backward(
    x: Tensor, context: Tensor | None, parameters: Sequence[Tensor], program: FlowProgram
) -> Tensor | None:
    """The mean over a batch of the negative log-likelihood in nats, its gradients added to each parameter's ``.grad``.

    One walk through the program gives both. None, and nothing has happened, where the compiled op can't, or gains nothing.
    The rows are those that a module has checked.
    """
    if type(x) is not Tensor or not x.is_cpu or x.dtype not in FULL or followed() or not torch.is_grad_enabled():
        return None
    if not chosen_compiled("flow_program", x):
        return None
    _check_once(x, parameters, program)
    try:
        return engine.nll_backward(x, context, parameters, program)
    except RuntimeError:
        check_parameters(x, parameters, program)
        raise


def _affine(
    x: Tensor, raw: Tensor | None, shift: Tensor, squash: str, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    bound = None if SQUASHES[squash].clamp_is == "no option" else clamp
    return fused_affine(x, raw, shift, squash=squash, clamp=bound, inverse=inverse)


def _spline(x: Tensor, raw: Tensor, t: L.SplineTransformer, inverse: bool) -> tuple[Tensor, Tensor]:
    tails, box = (None, t.box) if t.tails == "none" else (t.tails, None)
    return fused_spline(
        x,
        raw,
        bins=t.bins,
        inverse=inverse,
        tails=tails,
        tail_bound=1.0 if box else t.right,
        box=box,
        min_bin_width=t.min_width,
        min_bin_height=t.min_height,
        min_derivative=t.min_derivative,
        parameterization=t.form,
    )


LAYER_BY_LAYER = reference.Maps(_affine, _spline)
