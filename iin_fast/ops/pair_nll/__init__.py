"""The op ``pair_nll``: argument checks, choice of the backend, autograd.

Files: reference.py (plain torch, the definition), csrc/pair_nll (CPU and CUDA) and triton.py.
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
    check_like,
    check_rank,
    check_shape,
    checked_flag,
    checked_ints,
    checked_number,
)
from ..registry import Op, register
from ..types import accumulator_type
from . import reference

__all__ = ["pair_nll"]


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
    wide = accumulator_type(za.dtype)
    for name, logdet in (("logdet_a", logdet_a), ("logdet_b", logdet_b)):
        check_floating(op, name, logdet)
        check_shape(op, name, logdet, za.shape[:1], "(one number a pair)")
        if logdet.dtype != wide and not autocast:
            check_dtype(op, name, logdet, wide, f"for samples of {str(za.dtype).removeprefix('torch.')}")
    check_kind(op, "shared", shared, torch.bool, "a bool tensor [batch, factors]")
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
    za, zb, _, _, shared, ctx.sizes, ctx.rho, _ = inputs
    ctx.save_for_backward(za, zb, shared)


def _definition(ctx: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
    za, zb, shared = ctx.saved_tensors
    zeros = za.new_zeros(len(za), dtype=accumulator_type(za.dtype)).requires_grad_()  # log-dets: only their sign counts
    return reference.pair_nll, (za, zb, zeros, zeros, shared, ctx.sizes, ctx.rho, False)


def _backward(kernel: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *kernel(grad, *ctx.saved_tensors, ctx.sizes, ctx.rho), -grad, -grad, None, None, None, None


_calls = register(Op("pair_nll", _setup, _backward, _definition, _fake, _fake_backward))
