"""Sums over rows of up to a million terms are as right as torch.sum."""

import math

import numpy as np
import pytest
import torch
from numerics import check_sums, long_terms
from op_cases import few

from iin_fast.functional import affine_coupling, pair_nll
from iin_fast.ops.flow import flow

DTYPES = [torch.float32, torch.float64]


def test_a_sum_one_by_one_fails_the_check() -> None:
    terms = next(t for t in long_terms(torch.float32) if t.shape[1] == 196_608)
    check_sums(terms.sum(1), terms)
    with pytest.raises(AssertionError, match="196608 terms"):
        check_sums(torch.from_numpy(np.cumsum(terms.numpy(), 1)[:, -1]), terms)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", few([False, True]))
def test_logdets_of_couplings(dtype: torch.dtype, inverse: bool) -> None:
    for raw in long_terms(dtype):
        zeros = torch.zeros_like(raw)
        _, logdet = affine_coupling(zeros, raw, zeros, squash="identity", inverse=inverse)
        check_sums(-logdet if inverse else logdet, raw)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_pairs(dtype: torch.dtype) -> None:
    for terms in long_terms(dtype):
        zeros = torch.zeros_like(terms)
        shared = torch.tensor([[True, False]] * 2)
        loss = pair_nll(terms, zeros, zeros[:, 0], zeros[:, 0], shared, [0, terms.shape[1]], 0.9)
        check_sums(loss, terms * terms * 0.5)


@pytest.mark.parametrize("inverse", [False, True])
def test_logdets_of_flows(inverse: bool) -> None:
    """Twelve blocks of 20,001 features, each with s = tanh(0.3), scale 0.9 and, below 0, slope 0.9."""
    n, dim = 12, 20_001
    weights = [torch.zeros(n, 2, 2, size) for size in ((dim - dim // 2), 1, dim // 2, dim // 2)]
    weight_in, bias_in, weight_out, bias_out = weights
    bias_out[:, :, 0] = 0.3
    x, loc, scale = torch.full((3, dim), -1.0), torch.zeros(n, dim), torch.full((n, dim), 0.9)
    hidden = [torch.zeros(n, 2, 2, 0, 1)] * 2
    permutation = torch.arange(dim).expand(n, dim).contiguous()
    options = {"activation_slope": 0.9, "exact_logdet": True, "inverse": inverse}
    _, logdet = flow(x, None, loc, scale, weight_in, bias_in, *hidden, weight_out, bias_out, permutation, **options)
    s = torch.tensor(0.3, dtype=torch.float32).double().tanh()
    want = n * (2 * (dim // 2) * s + dim * (scale[0, 0].double().log() + math.log(0.9)))
    error = (logdet.double() - (-want if inverse else want)).abs()
    # the ends are close to each other, and a tanh of float32 is within 3 units
    assert (error <= 4 * torch.finfo(torch.float32).eps * n * dim * s).all(), error
