"""The op ``affine_coupling``: argument checks, choice of the backend, autograd.

Files: reference.py (plain torch, the definition), csrc/affine_coupling (CPU and CUDA) and triton.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...backends import chosen, ops, register_library
from ...checks import check_floating, check_like, checked_choice, checked_flag, checked_number
from ..autograd import autocast_to_float32, differentiable, saved_tensors
from ..triton_ops import define_triton
from ..vmap import fold_rows, mapped_by_autograd
from . import reference

__all__ = ["SQUASHES", "affine_coupling", "check_options"]

# Codes of csrc/affine_coupling/affine_coupling.h, and the default clamp of each.
SQUASHES: dict[str, tuple[int, float]] = {
    "identity": (0, 1.0),
    "tanh": (1, 1.0),
    "atan": (2, 2.0),
    "sigmoid": (3, 1.0),
    "none": (4, 1.0),
}
_NAMES = {code: name for name, (code, _) in SQUASHES.items()}

register_library("affine_coupling")
define_triton("affine_coupling")


def affine_coupling(
    x: Tensor,
    raw_scale: Tensor | None,
    shift: Tensor,
    *,
    squash: str = "tanh",
    clamp: float | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The affine coupling of one half of the features, and its log-determinant, in one pass.

    Forward: :math:`y = x \exp(s) + t`, :math:`\log|\det| = \sum_j s_j`; inverse: :math:`x = (y - t)\exp(-s)`,
    :math:`\log|\det| = -\sum_j s_j`, with :math:`s` = squash(``raw_scale``) and :math:`t` = ``shift``:

    ============  =========================================  =================
    squash        s                                          used by
    ============  =========================================  =================
    ``tanh``      clamp · tanh(raw), clamp 1 by default      IIN, FrEIA
    ``atan``      clamp · 0.636 · atan(raw), clamp 2         FrEIA's soft clamp
    ``sigmoid``   log(sigmoid(raw + 2) + 0.001)              nflows
    ``identity``  raw                                        RealNVP, Glow
    ``none``      0 (additive coupling)                      NICE
    ============  =========================================  =================

    Args:
        x: ``[batch, ...]``, float32, float64, bfloat16 or float16, any strides; batch may be 0.
        raw_scale: like ``x``; None, and only None, for squash "none".
        shift: like ``x``.
        squash: name of the function that maps ``raw_scale`` to the log-scale.
        clamp: bound of \|s\|, above 0; only for tanh and atan.
        inverse: compute x from y.

    Returns:
        ``y`` like ``x``, and the log-determinant ``[batch]`` in nats of the map that was computed, in float32 for
        inputs of 16 bits. Both are differentiable, to any order. The backward of the inverse reads its output: change a
        copy of it, not itself.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ; a clamp that is no number.
        ValueError: shapes or devices that differ, an unknown squash, a clamp that is not positive and finite or has no
            meaning.

    References:
        Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2017, Eq. 7-8.
        Esser, Rombach, Ommer: A disentangling invertible interpretation network, CVPR 2020, Sec. 3.1.

    Example:
        >>> import torch, iin_fast
        >>> x, raw, shift = torch.randn(3, 5, 8)
        >>> y, logdet = iin_fast.functional.affine_coupling(x, raw, shift)
        >>> back, _ = iin_fast.functional.affine_coupling(y, raw, shift, inverse=True)
        >>> torch.allclose(back, x, atol=1e-5)
        True
    """
    op = "affine_coupling"
    code, bound = check_options(op, squash, clamp)
    inverse = checked_flag(op, "inverse", inverse)
    check_floating(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x has shape [], expected [batch, ...]")
    if (raw_scale is None) != (squash == "none"):
        got = "None" if raw_scale is None else "a tensor"
        raise ValueError(
            f"{op}: raw_scale is {got}, expected {'None' if squash == 'none' else 'a tensor'} for {squash}"
        )
    if raw_scale is not None:
        check_like(op, "raw_scale", raw_scale, x.shape, "like x", x)
    check_like(op, "shift", shift, x.shape, "like x", x)
    backend = chosen(op, x)
    if backend == "reference":
        return reference.affine_coupling(x, raw_scale, shift, squash, bound, inverse)
    return _calls[backend](x, raw_scale, shift, code, bound, inverse)


def check_options(op: str, squash: str, clamp: float | None) -> tuple[int, float]:
    """Refuse options that make no coupling; gives the code of the squash, and its clamp.

    Raises:
        TypeError: a clamp that is no number.
        ValueError: an unknown squash, a clamp that is not positive and finite or has no meaning.
    """
    checked_choice(op, "squash", squash, tuple(SQUASHES))
    code, default = SQUASHES[squash]
    if clamp is None:
        return code, default
    if squash not in ("tanh", "atan"):
        raise ValueError(f"{op}: clamp is {clamp!r}, expected None: squash {squash!r} takes none")
    return code, checked_number(op, "clamp", clamp, above=0)


def _fake(
    x: Tensor, raw_scale: Tensor | None, shift: Tensor, squash: int, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=wide)


def _fake_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    value: Tensor,
    raw_scale: Tensor | None,
    squash: int,
    clamp: float,
    inverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    grad_raw = None if raw_scale is None else value.new_empty(value.shape)
    return value.new_empty(value.shape), grad_raw, value.new_empty(value.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, raw_scale, shift, ctx.squash, ctx.clamp, ctx.inverse = inputs
    ctx.save_for_backward(x, raw_scale, shift, output[0] if ctx.inverse else None)


def _backward(backend: str, ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
    x, raw_scale, shift, y = saved_tensors(ctx, "affine_coupling")
    # create_graph=True: derivatives of derivatives come from the definition itself
    if torch.is_grad_enabled() or mapped_by_autograd(grad_y, grad_logdet):
        with torch.enable_grad():
            # aliases: what one input owes to another is the business of autograd beyond this op
            x, shift = x.view_as(x), shift.view_as(shift)
            raw_scale = None if raw_scale is None else raw_scale.view_as(raw_scale)
            inputs = [t for t in (x, raw_scale, shift) if t is not None]
            outputs = reference.affine_coupling(x, raw_scale, shift, _NAMES[ctx.squash], ctx.clamp, ctx.inverse)
        differentiable = [(o, g) for o, g in zip(outputs, (grad_y, grad_logdet), strict=True) if o.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in differentiable], wanted, [g for _, g in differentiable], create_graph=True, allow_unused=True
        )
        grads = dict(zip(map(id, wanted), found, strict=True))
        return grads.get(id(x)), grads.get(id(raw_scale)), grads.get(id(shift)), None, None, None
    value = y if ctx.inverse else x
    grad_x, grad_raw, grad_shift = ops(backend).affine_coupling_backward(
        grad_y, grad_logdet, value, raw_scale, ctx.squash, ctx.clamp, ctx.inverse
    )
    return grad_x, grad_raw, grad_shift, None, None, None


_calls: dict[str, Callable[..., Any]] = {}
for _backend, _name in (("cpp", "iin_fast::affine_coupling"), ("triton", "iin_fast_triton::affine_coupling")):
    torch.library.register_fake(_name, _fake)
    torch.library.register_fake(f"{_name}_backward", _fake_backward)
    _calls[_backend] = differentiable(_name, _setup, partial(_backward, _backend))
    torch.library.register_vmap(_name, fold_rows(ops(_backend).affine_coupling))
    torch.library.register_vmap(f"{_name}_backward", fold_rows(ops(_backend).affine_coupling_backward))
    autocast_to_float32(_name)
