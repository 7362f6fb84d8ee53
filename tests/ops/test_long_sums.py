"""Sums over rows of up to a million terms are as right as torch.sum."""

import numpy as np
import pytest
import torch
from numerics import check_sums, long_terms

from iin_fast.functional import affine_coupling, pair_nll

DTYPES = [torch.float32, torch.float64]


def test_a_sum_one_by_one_fails_the_check() -> None:
    terms = next(t for t in long_terms(torch.float32) if t.shape[1] == 196_608)
    check_sums(terms.sum(1), terms)
    with pytest.raises(AssertionError, match="196608 terms"):
        check_sums(torch.from_numpy(np.cumsum(terms.numpy(), 1)[:, -1]), terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_logdets_of_couplings(dtype: torch.dtype, inverse: bool) -> None:
    for raw in long_terms(dtype):
        zeros = torch.zeros_like(raw)
        _, logdet = affine_coupling(zeros, raw, zeros, squash="identity", inverse=inverse)
        check_sums(-logdet if inverse else logdet, raw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_pairs(dtype: torch.dtype) -> None:
    for terms in long_terms(dtype):
        zeros = torch.zeros_like(terms)
        shared = torch.tensor([[True, False]] * 2)
        loss = pair_nll(terms, zeros, zeros[:, 0], zeros[:, 0], shared, [0, terms.shape[1]], 0.9)
        check_sums(loss, terms * terms * 0.5)
