"""The CUDA kernels of affine_coupling, run on the host (tests/cuda_emulator), against the definition."""

import ctypes

import pytest
import torch
from cuda_emulator import DTYPES, LaunchPlan, call, data, load, matrix, type_name
from numerics import at_the_edge_of_overflow, check_not_finite, check_sums, long_terms, of_gradients, spoiled
from op_cases import AFFINE_COUPLING, LONG_ROWS, cases, coupling_inputs
from torch import Tensor
from torch.testing import assert_close

from iin_fast.ops.affine_coupling import SQUASHES, reference


def forward(
    x: Tensor, raw: Tensor | None, shift: Tensor, squash: str, clamp: float, inverse: bool, plan: LaunchPlan
) -> tuple[Tensor, Tensor]:
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    logdet = torch.full(x.shape[:1], torch.nan, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    call(
        load("affine_coupling").coupling_forward,
        *(type_name(x.dtype), matrix(x), matrix(raw), matrix(shift), data(y), data(logdet)),
        *(ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]), ctypes.c_double(clamp)),
        *(ctypes.c_int64(SQUASHES[squash].code), ctypes.c_bool(inverse), ctypes.byref(plan)),
    )
    return y, logdet


def backward(
    value: Tensor,
    raw: Tensor | None,
    grad_y: Tensor,
    grad_logdet: Tensor,
    squash: str,
    clamp: float,
    inverse: bool,
    plan: LaunchPlan,
) -> list[Tensor]:
    grad_x, grad_raw, grad_shift = torch.full((3, *value.shape), torch.nan, dtype=value.dtype).clone()
    grad_raw = None if raw is None else grad_raw.clone()
    call(
        load("affine_coupling").coupling_backward,
        *(type_name(value.dtype), matrix(value), matrix(raw), matrix(grad_y), data(grad_logdet)),
        *(data(grad_x), data(grad_raw), data(grad_shift)),
        *(ctypes.c_int64(value.shape[0]), ctypes.c_int64(value.shape[1]), ctypes.c_double(clamp)),
        *(ctypes.c_int64(SQUASHES[squash].code), ctypes.c_bool(inverse), ctypes.byref(plan)),
    )
    return [grad for grad in (grad_x, grad_raw, grad_shift) if grad is not None]


def check(
    arguments: list[Tensor | None], squash: str, inverse: bool, plan: LaunchPlan | None = None, clamp: float = 1.5
) -> tuple[LaunchPlan, LaunchPlan]:
    """Forward and backward of these tensors against the definition in float64."""
    x, raw, shift = arguments
    plans = (plan or LaunchPlan(), LaunchPlan(*((plan.max_blocks, plan.multiprocessors) if plan else ())))
    leaves = [None if t is None else t.double().requires_grad_() for t in arguments]
    truth, truth_logdet = reference.affine_coupling(*leaves, squash, clamp, inverse)
    y, logdet = forward(x, raw, shift, squash, clamp, inverse, plans[0])

    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    grad_logdet = torch.randn(len(x), generator=generator, dtype=torch.float64).to(logdet.dtype)
    outputs = [(truth, grad_y.double()), (truth_logdet, grad_logdet.double())]
    outputs = [(output, grad) for output, grad in outputs if output.requires_grad]
    wanted = [leaf for leaf in leaves if leaf is not None]
    truths = torch.autograd.grad([o for o, _ in outputs], wanted, [g for _, g in outputs])
    grads = backward(y if inverse else x, raw, grad_y, grad_logdet, squash, clamp, inverse, plans[1])

    # one rounding to the type of the result; in backward also that of y, which the inverse map starts from
    unit = torch.finfo(x.dtype).eps * (4 if x.dtype in (torch.float32, torch.float64) else 1)
    for got, want, units in [
        (y, truth, 1),
        (logdet, truth_logdet, 8),
        *((g, t, 4) for g, t in zip(grads, truths, strict=True)),
    ]:
        tolerance = units * (torch.finfo(got.dtype).eps * 4 if got is logdet else unit)
        largest = want.abs().max().item() if want.numel() else 0.0
        assert_close(got.double(), want.detach(), rtol=tolerance, atol=tolerance * max(1.0, largest))
    return plans


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(squash: str, dtype: torch.dtype) -> None:
    for inverse in (False, True):
        for shape in cases(AFFINE_COUPLING, "cuda"):
            check(coupling_inputs(shape, dtype, squash), squash, inverse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(dtype: torch.dtype) -> None:
    for shape in cases(LONG_ROWS, "cuda"):
        check(coupling_inputs(shape, dtype, "tanh"), "tanh", inverse=False)
        check(coupling_inputs(shape, dtype, "none"), "none", inverse=True)


@pytest.mark.values
@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_not_finite(squash: str, inverse: bool) -> None:
    for _, (x, raw, shift, grad_y, grad_logdet) in spoiled(
        [*coupling_inputs((4, 37), torch.float32, squash), torch.ones(4, 37), torch.ones(4)]
    ):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, raw, shift)]
        truth, truth_logdet = reference.affine_coupling(*leaves, squash, 1.5, inverse)
        pairs = [(o, g) for o, g in ((truth, grad_y), (truth_logdet, grad_logdet)) if o.requires_grad]
        wanted = [leaf for leaf in leaves if leaf is not None]
        truths = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs])
        y, logdet = forward(x, raw, shift, squash, 1.5, inverse, LaunchPlan())
        grads = backward(y if inverse else x, raw, grad_y, grad_logdet, squash, 1.5, inverse, LaunchPlan())
        for i, (got, want) in enumerate(zip([y, logdet, *grads], [truth, truth_logdet, *truths], strict=True)):
            check_not_finite(got, want, (squash, inverse, i), "kinds" if i < 2 else of_gradients(squash))


@pytest.mark.values
def test_gradients_at_the_edge_of_overflow() -> None:
    (x, raw, _, grad), truths = at_the_edge_of_overflow()
    grads = backward(x, raw, grad, torch.zeros(1), "identity", 1.0, False, LaunchPlan())
    for got, want in zip(grads, truths, strict=True):
        assert_close(got, want.float(), rtol=1e-5, atol=0)


@pytest.mark.values
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logdets_of_long_rows(dtype: torch.dtype) -> None:
    for raw in long_terms(dtype, "cuda"):
        for multiprocessors in (1, 108):  # a block a row, and many
            zeros = torch.zeros_like(raw)
            _, logdet = forward(zeros, raw, zeros, "identity", 1.0, True, LaunchPlan(multiprocessors=multiprocessors))
            check_sums(-logdet, raw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_read_in_place(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(3, 10, 64, generator=generator, dtype=torch.float64).to(dtype)
    vector = 16 // dtype.itemsize
    halves = [t[:, 32:] for t in wide]  # the second half of the features: aligned
    for plan in check(halves, "tanh", inverse=False):
        assert plan.vector == vector
    for skewed in ([halves[0], wide[1, :, 1:33], halves[2]], [t[:, 3:20] for t in wide], [t[::2, :7] for t in wide]):
        for plan in check(skewed, "tanh", inverse=True):
            assert plan.vector == 1
    uneven = torch.randn(3, 10, 33, generator=generator, dtype=torch.float64).to(dtype)
    for plan in check([t.clone()[:, :32] for t in uneven], "tanh", inverse=False):
        assert plan.vector == 1  # the first row is aligned, the second is not
    repeated = [halves[0][:1].expand(10, 32), *halves[1:]]  # stride 0
    check(repeated, "tanh", inverse=False)


def test_every_mapping_of_rows_to_threads_is_used() -> None:
    found = set()
    for features in (4, 8, 16, 32, 64, 128, 512, 516, 600, 8192):
        forward_plan, backward_plan = check(
            coupling_inputs((3, features), torch.float32, "identity"), "identity", False
        )
        found.add((forward_plan.lanes, forward_plan.parts))
        assert forward_plan.vector == backward_plan.vector == 4
        assert forward_plan.launches == 1 + (forward_plan.parts > 1)
        assert backward_plan.launches == 1
    assert found == {(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (256, 1), (256, 2)}


@pytest.mark.parametrize("features", [4, 33, 600])
def test_a_grid_smaller_than_the_rows(features: int) -> None:
    for plan in check(coupling_inputs((50, features), torch.float32, "tanh"), "tanh", False, LaunchPlan(max_blocks=3)):
        assert plan.blocks <= 3


def test_an_empty_batch_launches_nothing() -> None:
    for plan in check(coupling_inputs((0, 8), torch.float32, "tanh"), "tanh", False):
        assert plan.launches == 0


@pytest.mark.values
def test_the_same_bits_every_time() -> None:
    arguments = coupling_inputs((2, 40000), torch.float32, "tanh")
    first, second = (forward(*arguments, "tanh", 1.0, False, LaunchPlan()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
