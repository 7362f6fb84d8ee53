"""What is not finite among inputs, parameters and gradients shows in the results exactly where the definition shows it."""

import pytest
import torch
from numerics import compare_not_finite, of_gradients
from torch import Tensor

from iin_fast.functional import affine_coupling, pair_nll
from iin_fast.ops.affine_coupling import SQUASHES
from iin_fast.ops.flow import flow, pack

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_coupling(squash: str, inverse: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, raw, shift = torch.randn(3, 4, 37, generator=generator, dtype=torch.float64).to(dtype).clone()

    def call(x: Tensor, raw: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, raw, shift, squash=squash, inverse=inverse)

    given = [x, None if squash == "none" else raw, shift]
    compare_not_finite(call, given, "cpp", of_gradients=of_gradients(squash))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_nll(normalized: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2, 4, 40, generator=generator, dtype=torch.float64).to(dtype)
    logdets = torch.randn(2, 4, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    shared = torch.rand(4, 3, generator=generator) < 0.5

    def call(*given: Tensor) -> tuple[Tensor]:
        return (pair_nll(*given, shared, [3, 20, 17], 0.9, normalized=normalized),)

    compare_not_finite(call, [*samples.clone(), *logdets.clone()], "cpp", of_gradients="places")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("dim", "hidden", "slope"), [(5, 17, 1.0), (8, 64, 0.9), (2, 1, 1.0)])
def test_flow(inverse: bool, dtype: torch.dtype, dim: int, hidden: int, slope: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    half = dim - dim // 2
    tensors = [
        *(randn(6, dim), randn(1, 6, 2), randn(2, dim), 1 + 0.3 * torch.tanh(randn(2, dim))),
        *(pack(randn(2, 2, 2, hidden, half + 2)) / (half + 2) ** 0.5, randn(2, 2, 2, hidden)),
        *(pack(randn(2, 2, 2, 1, hidden, hidden)) / hidden**0.5, randn(2, 2, 2, 1, hidden)),
        *(0.5 * pack(randn(2, 2, 2, dim - half, hidden)) / hidden**0.5, 0.5 * randn(2, 2, 2, dim - half)),
    ]
    permutation = torch.stack([torch.randperm(dim, generator=generator) for _ in range(2)])
    for exact in (False, True) if slope != 1 else (False,):

        def call(*given: Tensor, exact: bool = exact) -> tuple[Tensor, Tensor]:
            return flow(*given, permutation, activation_slope=slope, exact_logdet=exact, inverse=inverse, memory="save")

        compare_not_finite(call, [t.to(dtype) for t in tensors], "cpp")
