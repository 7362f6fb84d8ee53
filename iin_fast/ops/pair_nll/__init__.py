"""The op ``pair_nll``: argument checks, choice of the backend, autograd.

Files: reference.py (plain torch, the definition), csrc/pair_nll (CPU and CUDA) and triton.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...backends import chosen, ops, register_library
from ...checks import (
    autocast_enabled,
    check_device,
    check_dtype,
    check_floating,
    check_like,
    check_rank,
    check_shape,
    checked_flag,
    checked_ints,
    checked_number,
)
from ..autograd import autocast_to_float32, differentiable
from ..triton_ops import define_triton
from ..vmap import fold_rows
from . import reference

__all__ = ["pair_nll"]

register_library("pair_nll")
define_triton("pair_nll")


def pair_nll(
    za: Tensor,
    zb: Tensor,
    logdet_a: Tensor,
    logdet_b: Tensor,
    shared: Tensor,
    sizes: Sequence[int],
    rho: float,
    *,
    normalized: bool = False,
) -> Tensor:
    r"""The factor loss of pairs that share factors, both samples in one pass.

    .. math::
        \ell = \tfrac12\|\tilde z^a\|^2 - \log|\det|_a
             + \sum_k \tfrac12 \frac{\|\tilde z^b_k - m_k\rho\,\tilde z^a_k\|^2}{1 - m_k\rho^2} - \log|\det|_b

    with :math:`m_k = 1` if the pair shares factor k: sample a is standard normal, and b given a has correlation
    :math:`\rho` in the shared factors.

    Args:
        za, zb: ``[batch, dim]``, the transformed samples, float32, float64, bfloat16 or float16.
        logdet_a, logdet_b: ``[batch]``, nats, float64 for float64 samples, else float32.
        shared: ``[batch, factors]`` bool, which factors the pair shares.
        sizes: size of each factor, in order; they sum to ``dim``.
        rho: correlation of a shared factor, in (0, 1).
        normalized: add the constants (dim log 2π, and ½ N log(1 - ρ²) for every shared factor of size N), so that the
            value is the true negative log-likelihood of the pair.

    Returns:
        ``[batch]`` losses in nats, in the dtype of the log-dets. Differentiable to any order in the four tensors.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ; ``shared`` not bool; sizes that are no integers.
        ValueError: wrong rank or shape, tensors on two devices, sizes that do not sum to dim, rho outside (0, 1).

    References:
        Esser, Rombach, Ommer: A disentangling invertible interpretation network, CVPR 2020, Sec. 3.2 (the loss of a pair).
    """
    op = "pair_nll"
    check_floating(op, "za", za)
    check_rank(op, "za", za, "[batch, dim]", 2)
    check_like(op, "zb", zb, za.shape, "like za", za, "za")
    autocast = autocast_enabled(za)
    wide = torch.float64 if za.dtype == torch.float64 else torch.float32
    for name, logdet in (("logdet_a", logdet_a), ("logdet_b", logdet_b)):
        check_floating(op, name, logdet)
        check_shape(op, name, logdet, za.shape[:1], "(one number a pair)")
        if logdet.dtype != wide and not autocast:
            check_dtype(op, name, logdet, wide, f"for samples of {str(za.dtype).removeprefix('torch.')}")
    if not isinstance(shared, Tensor) or shared.dtype != torch.bool:
        got = shared.dtype if isinstance(shared, Tensor) else type(shared).__name__
        raise TypeError(f"{op}: shared is {got}, expected a bool tensor [batch, factors]")
    sizes = checked_ints(op, "sizes", sizes, least=0)
    check_shape(op, "shared", shared, (za.shape[0], len(sizes)), "([batch, factors], one column for each of sizes)")
    if sum(sizes) != za.shape[1]:
        raise ValueError(
            f"{op}: sizes are {sizes}, which sum to {sum(sizes)}, expected sizes that sum to {za.shape[1]}"
        )
    rho = checked_number(op, "rho", rho, above=0, below=1)
    normalized = checked_flag(op, "normalized", normalized)
    for name, value in (("logdet_a", logdet_a), ("logdet_b", logdet_b), ("shared", shared)):
        check_device(op, name, value, za, "za")
    backend = chosen(op, za)
    if backend == "reference":
        return reference.pair_nll(za, zb, logdet_a, logdet_b, shared, sizes, rho, normalized)
    return _calls[backend](za, zb, logdet_a, logdet_b, shared, sizes, rho, normalized)


def _fake(
    za: Tensor,
    zb: Tensor,
    logdet_a: Tensor,
    logdet_b: Tensor,
    shared: Tensor,
    sizes: Sequence[int],
    rho: float,
    normalized: bool,
) -> Tensor:
    return torch.empty_like(logdet_a, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor, za: Tensor, zb: Tensor, shared: Tensor, sizes: Sequence[int], rho: float
) -> tuple[Tensor, Tensor]:
    return za.new_empty(za.shape), za.new_empty(za.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    za, zb, logdet_a, logdet_b, shared, ctx.sizes, ctx.rho, ctx.normalized = inputs
    ctx.save_for_backward(za, zb, shared)


def _backward(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    za, zb, shared = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: plain torch, which autograd follows
        rho, wide = ctx.rho, grad.dtype
        m = shared.to(wide).repeat_interleave(torch.tensor(ctx.sizes, device=za.device), 1)
        a, b = za.to(wide), zb.to(wide)
        difference, precision = reference.difference_and_precision(a, b, m, rho)
        pull = difference * precision
        grad_a, grad_b = grad[:, None] * (a - m * rho * pull), grad[:, None] * pull
        return grad_a.to(za.dtype), grad_b.to(zb.dtype), -grad, -grad, None, None, None, None
    grad_a, grad_b = ops(backend).pair_nll_backward(grad, za, zb, shared, ctx.sizes, ctx.rho)
    return grad_a, grad_b, -grad, -grad, None, None, None, None


_calls: dict[str, Callable[..., Any]] = {}
for _backend, _name in (("cpp", "iin_fast::pair_nll"), ("triton", "iin_fast_triton::pair_nll")):
    torch.library.register_fake(_name, _fake)
    torch.library.register_fake(f"{_name}_backward", _fake_backward)
    _calls[_backend] = differentiable(_name, _setup, partial(_backward, _backend))
    torch.library.register_vmap(_name, fold_rows(ops(_backend).pair_nll))
    torch.library.register_vmap(f"{_name}_backward", fold_rows(ops(_backend).pair_nll_backward))
    autocast_to_float32(_name)
