"""affine_coupling and pair_nll in Triton against the definition in float64, and their place in torch."""

from typing import Any

import pytest
import torch
from numerics import RHOS, SIZES, at_the_edge_of_overflow, check_near_one, check_sums, long_terms, pairs_near_one
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import iin_fast
from iin_fast.functional import affine_coupling, pair_nll
from iin_fast.ops.affine_coupling import SQUASHES
from iin_fast.ops.triton_common import atan, launch, tanh
from iin_fast.testing.backends import CASES, _compare

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("op", ["affine_coupling", "pair_nll"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition_at_every_shape(op: str, dtype: torch.dtype) -> None:
    cases, slack = CASES[op]
    seen = 0
    for label, call, inputs in cases(dtype, "cpu"):
        rows = [row for row in _compare(call, inputs, {}, label, slack).rows if row.backend == "triton"]
        assert all(row.ok for row in rows), [row for row in rows if not row.ok]
        seen += len(rows)
    assert seen >= 20


def test_long_rows_are_shared_and_summed_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    x, raw, shift = torch.randn(3, 2, 10001, generator=generator, dtype=torch.float64)
    sizes, shared = [6000, 4001], torch.tensor([[True, False], [False, True]])
    results = {}
    for backend in ("reference", "triton"):
        with iin_fast.backend(backend):
            results[backend] = (
                *affine_coupling(x, raw, shift),
                pair_nll(x, raw, shift[:, 0], shift[:, 1], shared, sizes, 0.9, normalized=True),
            )
    assert_close(results["triton"], results["reference"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_are_summed_to_rounding(dtype: torch.dtype) -> None:
    shared = torch.tensor([[True, False]] * 2)
    for terms in long_terms(dtype, most=80_000):
        zeros = torch.zeros_like(terms)
        with iin_fast.backend("triton"):
            _, logdet = affine_coupling(zeros, terms, zeros, squash="identity")
            loss = pair_nll(terms, zeros, zeros[:, 0], zeros[:, 0], shared, [0, terms.shape[1]], 0.9)
        # the interpreter adds a tile's columns as numpy does, 16 of them one by one
        check_sums(logdet, terms, units=4)
        check_sums(loss, terms * terms * 0.5, units=4)


@pytest.mark.parametrize("rho", RHOS)
def test_correlations_next_to_one(rho: float) -> None:
    given, shared = pairs_near_one(rho)
    leaves = [t.requires_grad_() for t in given]
    with iin_fast.backend("triton"):
        loss = pair_nll(*leaves, shared, SIZES, rho, normalized=True)
        grads = torch.autograd.grad(loss.sum(), leaves[:2])
    check_near_one(loss.detach(), *grads, *(t.detach() for t in leaves[:2]), shared, rho)


def test_gradients_at_the_edge_of_overflow() -> None:
    (*arguments, grad), truths = at_the_edge_of_overflow()
    leaves = [a.requires_grad_() for a in arguments]
    with iin_fast.backend("triton"):
        y, _ = affine_coupling(*leaves, squash="identity")
        grads = torch.autograd.grad(y, leaves, grad)
    for got, want in zip(grads, truths, strict=True):
        assert_close(got, want.float(), rtol=1e-5, atol=0)


def test_strides_are_followed() -> None:
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, raw, shift = wide[:, 3:10], wide[:, ::5][:, :7], wide[:1, :7].expand(6, 7)
    with iin_fast.backend("triton"):
        got = affine_coupling(x, raw, shift)
        expected = affine_coupling(x.contiguous(), raw.contiguous(), shift.contiguous())
        images = affine_coupling(x.reshape(6, 7, 1, 1), raw.reshape(6, 7, 1, 1), shift.reshape(6, 7, 1, 1))
    assert_close(got, expected, rtol=0, atol=0)
    assert_close(images[0].flatten(1), got[0], rtol=0, atol=0)


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inverse", [False, True])
def test_derivatives_of_the_coupling(squash: str, inverse: bool) -> None:
    x, raw, shift = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()
    arguments = [t.requires_grad_() for t in ([x, shift] if squash == "none" else [x, raw, shift])]

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        raw_scale = given[1] if len(given) == 3 else None
        return affine_coupling(given[0], raw_scale, given[-1], squash=squash, inverse=inverse)

    with iin_fast.backend("triton"):
        assert gradcheck(function, arguments)
        assert gradgradcheck(function, arguments)


def test_derivatives_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    arguments = [torch.randn(2, *rest, generator=generator, dtype=torch.float64) for rest in ((3,), (3,), (), ())]
    shared = torch.tensor([[True, False], [False, True]])

    def function(*given: Tensor) -> Tensor:
        return pair_nll(*given, shared, [1, 2], 0.7)

    with iin_fast.backend("triton"):
        assert gradcheck(function, [a.requires_grad_() for a in arguments])
        assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_factors_than_a_launch_takes(dtype: torch.dtype) -> None:
    """Factors go 64 a launch; some have no element, one group has none at all, another is long enough to be shared."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(0, 4, (200,), generator=generator).tolist()
    sizes[64:128], sizes[150] = [0] * 64, 9000
    shared = torch.rand(3, len(sizes), generator=generator) < 0.5
    za, zb = torch.randn(2, 3, sum(sizes), generator=generator, dtype=torch.float64).to(dtype)
    logdets = torch.randn(2, 3, generator=generator, dtype=torch.float64).to(dtype)

    def call(*given: Tensor) -> Tensor:
        return pair_nll(*given, shared, sizes, 0.9, normalized=True)

    found = [row for row in _compare(call, [za, zb, *logdets], {}, "").rows if row.backend == "triton"]
    assert len(found) == 5 and all(row.ok for row in found), found


def test_traces_whole_and_keeps_the_contract_of_an_op() -> None:
    x, raw, shift = torch.randn(3, 4, 5).unbind()
    x.requires_grad_()
    compiled: Any = torch.compile(lambda *t: affine_coupling(*t), fullgraph=True, backend="aot_eager")
    with iin_fast.backend("triton"):
        got, expected = compiled(x, raw, shift), affine_coupling(x, raw, shift)
        grads = [torch.autograd.grad(sum(t.sum() for t in out), x) for out in (got, expected)]
    assert_close(got, expected)
    assert_close(grads[0], grads[1])
    op = torch.ops.iin_fast_triton.affine_coupling.default
    torch.library.opcheck(op, (x, raw, shift, 1, 1.0, False), test_utils=("test_schema", "test_faketensor"))


def test_elementary_functions_hold_to_the_last_bits() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, t, a, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + i)
        tl.store(t + i, tanh(v))
        tl.store(a + i, atan(v))

    sides = torch.cat([torch.logspace(-6, 2, 2040, dtype=torch.float64), torch.tensor([0.35, 0.25, 2.4142, 0.4142])])
    edges = torch.tensor([0.0, float("inf"), 1e30, 1e-30], dtype=torch.float64)
    for dtype, ulps in ((torch.float32, 4), (torch.float64, 4)):
        x = torch.cat([sides, edges]).to(dtype)
        x = torch.cat([x, -x])
        t, a = torch.empty_like(x), torch.empty_like(x)
        launch(kernel, (len(x) // 1024,), x, t, a, BLOCK=1024)
        tolerance = dict(rtol=ulps * torch.finfo(dtype).eps, atol=0)
        assert_close(t, x.double().tanh().to(dtype), **tolerance)
        assert_close(a, x.double().atan().to(dtype), **tolerance)
