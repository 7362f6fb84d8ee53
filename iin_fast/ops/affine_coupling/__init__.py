"""The op ``affine_coupling``: argument checks, choice of the backend, autograd.

Files: reference.py (plain torch, the definition), csrc/affine_coupling (CPU and CUDA) and triton.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...backends import chosen
from ...checks import check_floating, check_like, checked_choice, checked_flag, checked_number
from ..autograd import saved_tensors
from ..registry import Op, register
from ..types import accumulator_type
from . import reference
from .reference import SQUASHES

__all__ = ["SQUASHES", "affine_coupling", "check_options"]

_NAMES = {squash.code: name for name, squash in SQUASHES.items()}


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

    ============  ============================================  ==================
    squash        s                                             used by
    ============  ============================================  ==================
    ``tanh``      clamp · tanh(raw), clamp 1 by default         IIN, FrEIA
    ``atan``      clamp · 0.636 · atan(raw), clamp 2            FrEIA's soft clamp
    ``sigmoid``   log(sigmoid(raw + 2) + 0.001)                 nflows
    ``softplus``  log(softplus(raw) + clamp), clamp 0.001       nflows
    ``softclip``  raw / (1 + \|raw\| / clamp), clamp log(1000)  zuko
    ``identity``  raw                                           RealNVP, Glow
    ``none``      0 (additive coupling)                         NICE
    ============  ============================================  ==================

    Args:
        x: ``[batch, ...]``, float32, float64, bfloat16 or float16, any strides; batch may be 0.
        raw_scale: like ``x``; None, and only None, for squash "none".
        shift: like ``x``.
        squash: name of the function that maps ``raw_scale`` to the log-scale.
        clamp: the number of that name in the table, above 0 (of softplus from 0); None for the one that stands there.
        inverse: compute x from y.

    Returns:
        ``y`` like ``x``, and the log-determinant ``[batch]`` in nats of the map that was computed, in float32 for
        inputs of 16 bits. Both are differentiable, to any order. The backward of the inverse reads its output: change a
        copy of it, not itself.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ; a clamp that is no number.
        ValueError: shapes or devices that differ, an unknown squash, a clamp that is out of range or has no meaning.

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
        ValueError: an unknown squash, a clamp that is out of range or has no meaning.
    """
    checked_choice(op, "squash", squash, tuple(SQUASHES))
    code, _, default, meaning = SQUASHES[squash]
    if clamp is None:
        return code, default
    if meaning == "no option":
        raise ValueError(f"{op}: clamp is {clamp!r}, expected None: squash {squash!r} takes none")
    bounds = {"least": 0.0} if meaning == "least scale" else {"above": 0.0}
    return code, checked_number(op, "clamp", clamp, **bounds)


def _fake(
    x: Tensor, raw_scale: Tensor | None, shift: Tensor, squash: int, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    wide = accumulator_type(x.dtype)
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
    x, raw_scale, shift, *ctx.options = inputs
    inverse = ctx.options[2]
    ctx.save_for_backward(x, raw_scale, shift, output[0] if inverse else None)


def _definition(ctx: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
    squash, clamp, inverse = ctx.options
    tensors = saved_tensors(ctx, "affine_coupling")[:3]
    return reference.affine_coupling, (*tensors, _NAMES[squash], clamp, inverse)


def _backward(kernel: Any, ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
    x, raw_scale, _, y = saved_tensors(ctx, "affine_coupling")
    value = x if y is None else y
    return *kernel(grad_y, grad_logdet, value, raw_scale, *ctx.options), None, None, None


_calls = register(Op("affine_coupling", _setup, _backward, _definition, _fake, _fake_backward))
