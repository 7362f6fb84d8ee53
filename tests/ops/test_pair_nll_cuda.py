"""The CUDA kernels of pair_nll, run on the host (tests/cuda_emulator), against the definition."""

import ctypes

import pytest
import torch
from cuda_emulator import DTYPES, LaunchPlan, call, data, load, matrix, type_name
from numerics import RHOS, SIZES, check_near_one, check_not_finite, check_sums, long_terms, pairs_near_one, spoiled
from op_cases import PAIR_NLL, cases, pair_inputs
from torch import Tensor
from torch.testing import assert_close

from iin_fast.ops.pair_nll import reference

MANY_FACTORS = [1, 2, 0, 3] * 33 + [8]  # 133 factors: three launches


def forward(
    za: Tensor,
    zb: Tensor,
    logdet_a: Tensor,
    logdet_b: Tensor,
    shared: Tensor,
    sizes: list[int],
    rho: float,
    normalized: bool,
    plan: LaunchPlan,
) -> Tensor:
    loss = torch.full_like(logdet_a, torch.nan)
    call(
        load("pair_nll").pair_nll,
        *(type_name(za.dtype), matrix(za), matrix(zb), data(logdet_a), data(logdet_b)),
        *(data(shared), (ctypes.c_int64 * max(len(sizes), 1))(*sizes), ctypes.c_int64(len(sizes)), data(loss)),
        *(ctypes.c_int64(za.shape[0]), ctypes.c_int64(za.shape[1])),
        *(ctypes.c_double(rho), ctypes.c_bool(normalized), ctypes.byref(plan)),
    )
    return loss


def backward(
    grad: Tensor, za: Tensor, zb: Tensor, shared: Tensor, sizes: list[int], rho: float, plan: LaunchPlan
) -> tuple[Tensor, Tensor]:
    grad_za, grad_zb = (torch.full(za.shape, torch.nan, dtype=za.dtype) for _ in range(2))
    call(
        load("pair_nll").pair_nll_backward,
        *(type_name(za.dtype), matrix(za), matrix(zb), data(shared)),
        *((ctypes.c_int64 * max(len(sizes), 1))(*sizes), ctypes.c_int64(len(sizes))),
        *(data(grad), data(grad_za), data(grad_zb), ctypes.c_int64(za.shape[0]), ctypes.c_int64(za.shape[1])),
        *(ctypes.c_double(rho), ctypes.byref(plan)),
    )
    return grad_za, grad_zb


def check(
    batch: int, sizes: list[int], dtype: torch.dtype, normalized: bool, rho: float = 0.975, max_blocks: int = 2**31 - 1
) -> LaunchPlan:
    """Forward and backward of a random pair against the definition in float64."""
    tensors, shared = pair_inputs(batch, sizes, dtype)
    return check_tensors(*tensors, shared, sizes, normalized, rho, max_blocks)


def check_tensors(
    za: Tensor,
    zb: Tensor,
    logdet_a: Tensor,
    logdet_b: Tensor,
    shared: Tensor,
    sizes: list[int],
    normalized: bool,
    rho: float = 0.975,
    max_blocks: int = 2**31 - 1,
) -> LaunchPlan:
    leaves = [t.double().requires_grad_() for t in (za, zb, logdet_a, logdet_b)]
    truth = reference.pair_nll(*leaves, shared, sizes, rho, normalized)

    plan = LaunchPlan(max_blocks)
    loss = forward(za, zb, logdet_a, logdet_b, shared, sizes, rho, normalized, plan)
    batch = len(za)
    unit = torch.finfo(loss.dtype).eps * 16
    largest = truth.abs().max().item() if batch else 0.0
    assert_close(loss.double(), truth.detach(), rtol=unit, atol=unit * max(1.0, largest))

    grad = torch.linspace(0.5, 2, max(batch, 1), dtype=loss.dtype)[:batch].clone()
    truths = torch.autograd.grad(truth, leaves[:2], grad.double(), materialize_grads=True)
    grads = backward(grad, za, zb, shared, sizes, rho, LaunchPlan(max_blocks))
    for got, want in zip(grads, truths, strict=True):
        unit = torch.finfo(za.dtype).eps * (16 if za.dtype in (torch.float32, torch.float64) else 1)
        largest = want.abs().max().item() if want.numel() else 0.0
        assert_close(got.double(), want, rtol=unit, atol=unit * max(1.0, largest))
    return plan


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(normalized: bool, dtype: torch.dtype) -> None:
    for batch, sizes in cases(PAIR_NLL, "cuda"):
        check(batch, list(sizes), dtype, normalized)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_read_in_place(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(2, 10, 64, generator=generator, dtype=torch.float64).to(dtype)
    logdets = torch.zeros(2, 10, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    shared = torch.rand(10, 3, generator=generator) < 0.5
    for cut, vector in ((slice(32, 64), 16 // dtype.itemsize), (slice(1, 33), 1)):
        za, zb = wide[:, :, cut]
        assert check_tensors(za, zb, *logdets, shared, [5, 10, 17], True).vector == vector
    za, zb = (t.clone()[:, :32] for t in torch.randn(2, 10, 33, generator=generator, dtype=torch.float64).to(dtype))
    assert check_tensors(za, zb, *logdets, shared, [5, 10, 17], True).vector == 1  # only the first row is aligned


def test_more_factors_than_a_launch_holds() -> None:
    for normalized in (False, True):
        assert check(5, MANY_FACTORS, torch.float32, normalized).launches == 3
    assert check(5, [2] * 64, torch.float32, True).launches == 1
    assert check(5, [2] * 65, torch.float64, True).launches == 2


@pytest.mark.parametrize("sizes", [[4], [22, 11], [600, 8]])
def test_a_grid_smaller_than_the_rows(sizes: list[int]) -> None:
    assert check(70, sizes, torch.float32, True, max_blocks=2).blocks <= 2


def test_an_empty_batch_launches_nothing() -> None:
    assert check(0, [3, 5], torch.float32, True).launches == 0


@pytest.mark.values
def test_losses_of_long_rows() -> None:
    for terms in long_terms(torch.float32, "cuda"):
        zeros, shared = torch.zeros_like(terms), torch.tensor([[True, False]] * 2)
        logdets = (torch.zeros(2), torch.zeros(2))
        loss = forward(terms, zeros, *logdets, shared, [0, terms.shape[1]], 0.9, False, LaunchPlan())
        check_sums(loss, terms * terms * 0.5)


@pytest.mark.values
@pytest.mark.parametrize("rho", RHOS)
def test_correlations_next_to_one(rho: float) -> None:
    given, shared = pairs_near_one(rho)
    loss = forward(*given, shared, SIZES, rho, True, LaunchPlan())
    grads = backward(torch.ones(len(loss)), *given[:2], shared, SIZES, rho, LaunchPlan())
    check_near_one(loss, *grads, *given[:2], shared, rho)


@pytest.mark.values
@pytest.mark.parametrize("normalized", [False, True])
def test_what_is_not_finite(normalized: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    samples, logdets = torch.randn(2, 4, 40, generator=generator), torch.randn(2, 4, generator=generator)
    shared, sizes = torch.rand(4, 3, generator=generator) < 0.5, [3, 20, 17]
    for _, (*given, grad) in spoiled([*samples.clone(), *logdets.clone(), torch.ones(4)]):
        leaves = [t.clone().requires_grad_() for t in given]
        truth = reference.pair_nll(*leaves, shared, sizes, 0.9, normalized)
        truths = torch.autograd.grad(truth, leaves[:2], grad)
        check_not_finite(forward(*given, shared, sizes, 0.9, normalized, LaunchPlan()), truth, "loss")
        for got, want in zip(backward(grad, *given[:2], shared, sizes, 0.9, LaunchPlan()), truths, strict=True):
            check_not_finite(got, want, "gradient", "places")
