"""What is not finite among inputs, parameters and gradients shows in the results exactly where the definition shows it."""

from functools import partial

import pytest
import torch
from numerics import compare_not_finite, of_gradients
from op_cases import BACKEND, DTYPES, FlowShape, coupling_inputs, few, flow_inputs, pair_inputs
from torch import Tensor

from iin_fast.functional import affine_coupling, pair_nll
from iin_fast.ops.affine_coupling import SQUASHES
from iin_fast.ops.flow import flow

pytestmark = pytest.mark.triton
INTERPRETED = BACKEND == "triton"


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", few(DTYPES))
def test_affine_coupling(squash: str, inverse: bool, dtype: torch.dtype) -> None:
    call = partial(affine_coupling, squash=squash, inverse=inverse)
    compare_not_finite(call, coupling_inputs((4, 37), dtype, squash), of_gradients=of_gradients(squash))


@pytest.mark.parametrize("normalized", few([True, False]))
@pytest.mark.parametrize("dtype", few(DTYPES))
def test_pair_nll(normalized: bool, dtype: torch.dtype) -> None:
    sizes = [3, 20, 17]
    tensors, shared = pair_inputs(4, sizes, dtype)
    call = partial(pair_nll, shared=shared, sizes=sizes, rho=0.9, normalized=normalized)
    compare_not_finite(call, tensors, of_gradients="places")


@pytest.mark.parametrize("dtype", few([torch.float64, torch.float32]))
@pytest.mark.parametrize("inverse", few([True, False]))
@pytest.mark.parametrize(
    ("shape", "slope"),
    [(FlowShape(3, 5, 1, 8, 1, 2), 0.9)]
    if INTERPRETED
    else [(FlowShape(6, 5, 2, 17, 1, 2), 1.0), (FlowShape(6, 8, 2, 64, 1, 2), 0.9), (FlowShape(6, 2, 2, 1, 1, 2), 1.0)],
)
def test_flow(inverse: bool, dtype: torch.dtype, shape: FlowShape, slope: float) -> None:
    *tensors, permutation = flow_inputs(shape, dtype)
    # Triton's backward of the inverse has ActNorm's input as its output + loc: nothing finite comes of a loc that is not
    gradients = "none lost" if INTERPRETED and inverse else "kinds"
    for exact in (False, True) if slope != 1 else (False,):

        def call(*given: Tensor, exact: bool = exact) -> tuple[Tensor, Tensor]:
            return flow(*given, permutation, activation_slope=slope, exact_logdet=exact, inverse=inverse, memory="save")

        compare_not_finite(call, tensors, of_gradients=gradients, every=not INTERPRETED)
