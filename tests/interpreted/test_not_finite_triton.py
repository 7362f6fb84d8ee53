"""What is not finite, in Triton: the masks of tests/ops/test_not_finite.py."""

import pytest
import torch
from numerics import compare_not_finite, of_gradients
from torch import Tensor

from iin_fast.functional import affine_coupling, pair_nll
from iin_fast.ops.affine_coupling import SQUASHES
from iin_fast.ops.flow import flow, pack


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inverse", [False, True])
def test_affine_coupling(squash: str, inverse: bool) -> None:
    x, raw, shift = torch.randn(3, 4, 37, generator=torch.Generator().manual_seed(0)).clone()

    def call(x: Tensor, raw: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, raw, shift, squash=squash, inverse=inverse)

    given = [x, None if squash == "none" else raw, shift]
    compare_not_finite(call, given, "triton", of_gradients=of_gradients(squash))


def test_pair_nll() -> None:
    generator = torch.Generator().manual_seed(0)
    samples, logdets = torch.randn(2, 4, 40, generator=generator), torch.randn(2, 4, generator=generator)
    shared = torch.rand(4, 3, generator=generator) < 0.5

    def call(*given: Tensor) -> tuple[Tensor]:
        return (pair_nll(*given, shared, [3, 20, 17], 0.9, normalized=True),)

    compare_not_finite(call, [*samples.clone(), *logdets.clone()], "triton", of_gradients="places")


@pytest.mark.parametrize("inverse", [False, True])
def test_flow(inverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [
        *(randn(3, 5), randn(1, 3, 2), randn(1, 5), 1 + 0.3 * torch.tanh(randn(1, 5))),
        *(pack(randn(1, 2, 2, 8, 5)) / 5**0.5, randn(1, 2, 2, 8)),
        *(pack(randn(1, 2, 2, 1, 8, 8)) / 8**0.5, randn(1, 2, 2, 1, 8)),
        *(0.5 * pack(randn(1, 2, 2, 2, 8)) / 8**0.5, 0.5 * randn(1, 2, 2, 2)),
    ]
    permutation = torch.randperm(5, generator=generator)[None]

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return flow(*given, permutation, activation_slope=0.9, inverse=inverse, memory="save")

    # backward of the inverse has ActNorm's input as its output + loc: nothing finite comes of a loc that is not
    gradients = "none lost" if inverse else "kinds"
    compare_not_finite(call, tensors, "triton", of_gradients=gradients, every=False)
