"""The flow in Triton: what its kernels alone have. The rest is in tests/ops/test_flow.py."""

from functools import partial

import pytest
import torch
from numerics import with_gradients
from op_cases import FLOW_BOUNDS, SMALL_FLOW, flow_inputs
from torch.testing import assert_close

import iin_fast
from iin_fast.ops.flow import flow as flow_op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # float16 has the tiles of bfloat16
@pytest.mark.parametrize("inverse", [False, True])
def test_other_types_judged_by_float64(dtype: torch.dtype, inverse: bool) -> None:
    given = flow_inputs((40, 6, 2, 20, 1, 2), dtype, size=0.3)
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in given]
    judge = with_gradients(partial(flow_op, inverse=inverse), exact, "reference")
    for memory in ("save", "invert"):
        found = with_gradients(partial(flow_op, memory=memory, inverse=inverse), given, "triton")
        for i, (got, want) in enumerate(zip(found, judge, strict=True)):
            assert (got.double() - want).norm() < FLOW_BOUNDS[dtype][i > 1] * want.norm(), (memory, got.shape)
    with iin_fast.backend("triton"):
        y, logdet = flow_op(*given, inverse=inverse)
    assert y.dtype == dtype and logdet.dtype == torch.float32


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_reaches_every_product_as_given(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward was given holds in backward, whatever torch's setting is by then."""
    from iin_fast.ops.flow import triton as module

    seen = []
    monkeypatch.setattr(module, "_precision", lambda dtype, tf32: seen.append(tf32) or "ieee")
    given = flow_inputs((3, 4, 1, 8, 1), torch.float32)
    x = given[0].clone().requires_grad_()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        # on a CPU the flow never asks for TF32, so the setting of the moment alone could bring it
        torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
        with iin_fast.backend("triton"):
            y, logdet = flow_op(x, *given[1:])
            (y.sum() + logdet.sum()).backward()
        assert seen == [False, False]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    seen.clear()
    options = (0.01, 1.0, False, False, 2)
    y, logdet, saved = torch.ops.iin_fast_triton.flow(*given, *options, allowed)
    rest = (0.01, 1.0, False, 2, False, True)
    torch.ops.iin_fast_triton.flow_backward(y, logdet, y, saved, *given[1:], *rest, allowed)
    assert seen == [allowed, allowed]


def test_weight_gradients_in_groups_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from iin_fast.ops.flow import triton as module

    given = flow_inputs(SMALL_FLOW)
    call = partial(flow_op, memory="save")
    whole = with_gradients(call, given, "triton")
    monkeypatch.setattr(module, "PENDING_BYTES", 4 * 2 * 7 * (2 + 3 * 17) * 8)  # 4 of 6 steps
    assert_close(with_gradients(call, given, "triton"), whole, rtol=0, atol=0)


def test_models_compare_with_triton_and_a_wrong_permutation_stays_inside() -> None:
    model = iin_fast.IIN(6, {"color": 2}, n_flows=2, hidden_dim=8, generator=torch.Generator().manual_seed(0))
    model(torch.randn(32, 6))
    comparison = iin_fast.testing.compare_backends(model, torch.randn(5, 6))
    assert comparison.ok and {"cpp", "triton"} == {row.backend for row in comparison.rows}
    given = flow_inputs((5, 4, 2, 8, 1), torch.float32)
    given[-1] = torch.full_like(given[-1], 2**40)
    with iin_fast.backend("triton"):
        flow_op(*given)
        flow_op(*given, inverse=True)
