"""pair_nll: every backend against the definition, and the definition against a density of torch.distributions."""

from functools import partial

import pytest
import torch
from numerics import RHOS, SIZES, check_near_one, compare_with_definition, pairs_near_one
from op_cases import BACKEND, DEFINED, DTYPES, LAYOUTS, PAIR_NLL, cases, pair_inputs
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import iin_fast
from iin_fast.backends import ops
from iin_fast.functional import pair_nll


@pytest.mark.triton
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(normalized: bool, dtype: torch.dtype) -> None:
    for batch, sizes in cases(PAIR_NLL):
        tensors, shared = pair_inputs(batch, sizes, dtype)
        call = partial(pair_nll, shared=shared, sizes=sizes, rho=0.975, normalized=normalized)
        compare_with_definition(call, tensors, float32=5e-6)


def test_normalized_is_the_joint_density_of_the_pair() -> None:
    (za, zb, logdet_a, logdet_b), shared = pair_inputs(6, [2, 3], torch.float64)
    rho = 0.8
    got = pair_nll(za, zb, logdet_a, logdet_b, shared, [2, 3], rho, normalized=True)
    correlation = rho * shared.repeat_interleave(torch.tensor([2, 3]), 1).double()
    for i in range(6):
        covariance = torch.eye(10, dtype=torch.float64)
        covariance[:5, 5:] = covariance[5:, :5] = torch.diag(correlation[i])
        joint = torch.distributions.MultivariateNormal(torch.zeros(10, dtype=torch.float64), covariance)
        assert_close(got[i], -joint.log_prob(torch.cat([za[i], zb[i]])) - logdet_a[i] - logdet_b[i])


@pytest.mark.triton
@pytest.mark.parametrize("normalized", [False, True])
def test_first_and_second_derivatives(normalized: bool) -> None:
    arguments, shared = pair_inputs(3, [2, 1, 2], torch.float64)
    call = partial(pair_nll, shared=shared, sizes=[2, 1, 2], rho=0.9, normalized=normalized)
    leaves = [a.requires_grad_() for a in arguments]
    assert gradcheck(call, leaves, fast_mode=BACKEND == "triton")
    assert gradgradcheck(call, leaves, fast_mode=BACKEND == "triton")


@pytest.mark.triton
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("backend", DEFINED)
def test_correlations_next_to_one(rho: float, backend: str) -> None:
    given, shared = pairs_near_one(rho)
    leaves = [t.requires_grad_() for t in given]
    with iin_fast.backend(backend):
        loss = pair_nll(*leaves, shared, SIZES, rho, normalized=True)
        grads = torch.autograd.grad(loss.sum(), leaves[:2], retain_graph=True)
        with_graph = torch.autograd.grad(loss.sum(), leaves[:2], create_graph=True)
    for found in (grads, with_graph):
        check_near_one(loss.detach(), *(t.detach() for t in (*found, *leaves[:2])), shared, rho)


@pytest.mark.triton
def test_strides_of_every_kind() -> None:
    (za, zb, *logdets), shared = pair_inputs(6, [2, 3], torch.float64)
    expected = pair_nll(za, zb, *logdets, shared, [2, 3], 0.9)
    for turn, layout in enumerate(LAYOUTS.values()):
        other = list(LAYOUTS.values())[turn - 1]
        apart = [torch.stack([t] * (2 + i), 1)[:, 0] for i, t in enumerate(logdets)]
        got = pair_nll(layout(za), other(zb), *apart, shared.t().contiguous().t(), [2, 3], 0.9)
        assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.triton
def test_opcheck() -> None:
    arguments, shared = pair_inputs(4, [2, 3], torch.float32)
    torch.library.opcheck(ops(BACKEND).pair_nll, (*arguments, shared, [2, 3], 0.9, True))
    leaves = [a.requires_grad_() for a in arguments]
    torch.library.opcheck(ops(BACKEND).pair_nll, (*leaves, shared, [2, 3], 0.9, False))
    backward = (torch.ones(4), *(a.detach() for a in leaves[:2]), shared, [2, 3], 0.9)
    torch.library.opcheck(ops(BACKEND).pair_nll_backward, backward)


@pytest.mark.triton
def test_compiles_into_one_graph() -> None:
    arguments, shared = pair_inputs(4, [2, 3], torch.float32)
    leaves = [a.requires_grad_() for a in arguments]
    compiled = torch.compile(lambda *a: pair_nll(*a, shared, [2, 3], 0.9).mean(), fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves), pair_nll(*leaves, shared, [2, 3], 0.9).mean()
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


def test_autocast_computes_in_float32() -> None:
    (za, zb, logdet_a, logdet_b), shared = pair_inputs(4, [2, 3], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pair_nll(za.float(), zb, logdet_a, logdet_b, shared, [2, 3], 0.9)
    assert_close(loss, pair_nll(za.float(), zb.float(), logdet_a, logdet_b, shared, [2, 3], 0.9))


class TestBadInput:
    def check(self, error: type[Exception], message: str, **changed: object) -> None:
        (za, zb, logdet_a, logdet_b), shared = pair_inputs(4, [2, 3], torch.float32)
        named = dict(za=za, zb=zb, logdet_a=logdet_a, logdet_b=logdet_b, shared=shared, sizes=[2, 3], rho=0.9)
        with pytest.raises(error, match=message):
            pair_nll(**{**named, **changed})

    def test_each(self) -> None:
        self.check(ValueError, r"za has shape \[4\], expected \[batch, dim\]", za=torch.randn(4))
        self.check(ValueError, r"zb has shape \[4, 6\], expected \[4, 5\] like za", zb=torch.randn(4, 6))
        self.check(TypeError, "zb has dtype float64", zb=torch.randn(4, 5).double())
        self.check(TypeError, "za has dtype int64", za=torch.ones(4, 5).long())
        self.check(TypeError, "za has dtype complex64", za=torch.ones(4, 5).to(torch.complex64))
        self.check(ValueError, r"logdet_b has shape \[3\]", logdet_b=torch.randn(3))
        self.check(TypeError, "logdet_a has dtype bfloat16", logdet_a=torch.randn(4).bfloat16())
        self.check(TypeError, "shared is torch.float32, expected a bool tensor", shared=torch.ones(4, 2))
        self.check(ValueError, r"shared has shape \[4, 3\]", shared=torch.ones(4, 3).bool())
        self.check(ValueError, "sum to 6, expected sizes that sum to 5", sizes=[2, 4])
        self.check(ValueError, r"sizes\[0\] is -1", sizes=[-1, 6])
        for rho in (0.0, 1.0, -0.5, 2.0, float("nan")):
            self.check(ValueError, "rho is .*, expected a finite number above 0 and below 1", rho=rho)
        self.check(ValueError, "zb is on meta, expected cpu like za", zb=torch.randn(4, 5, device="meta"))
