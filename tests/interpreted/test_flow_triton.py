"""The flow in Triton against the definition: both directions, both ways of memory, all types, odd sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import iin_fast
from iin_fast.nn import Flow
from iin_fast.ops.flow import flow as flow_op
from iin_fast.testing.backends import relative_error

# batch, dim, n_flows, hidden, depth, context (0: none), contexts per block
SHAPES = [
    (0, 4, 1, 8, 1, 0, False),
    (1, 2, 1, 1, 0, 0, False),
    (7, 5, 3, 17, 2, 3, True),
    (20, 9, 2, 70, 1, 2, False),
    (130, 8, 2, 16, 1, 0, False),
    (3, 140, 1, 8, 1, 0, False),
]


def arguments(
    batch: int, dim: int, n: int, hidden: int, depth: int, width: int, own: bool, dtype: torch.dtype
) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    flow = Flow(dim, n, hidden, depth, context_dim=width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        assert flow.loc is not None
        flow.loc.normal_(generator=generator)
        flow.scale.uniform_(0.5, 2, generator=generator)
        flow.scale[:, 0] *= -1
    x = torch.randn(batch, 2 * dim, generator=generator, dtype=torch.float64)
    context = torch.randn(n if own else 1, batch, width, generator=generator, dtype=torch.float64) if width else None
    names = ("weight_in", "bias_in", "weight_hidden", "bias_hidden", "weight_out", "bias_out")
    tensors = [x, context, flow.loc, flow.scale, *(getattr(flow, name) for name in names)]
    given: list[Any] = [None if t is None else t.detach().to(dtype) for t in tensors]
    given[0] = given[0][:, :dim]  # rows further apart than they are long
    return [*given, flow.permutation]


def outputs(given: list[Any], backend: str, **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in given]
    with iin_fast.backend(backend):
        y, logdet = flow_op(*leaves, **options)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
        rows = torch.linspace(-1, 1.5, len(logdet), dtype=torch.float64).to(logdet.dtype)
        torch.autograd.backward([y, logdet], [weights, rows])
    return [y, logdet, *(t.grad for t in leaves if t is not None and t.requires_grad)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_definition_in_float64(shape: tuple[Any, ...], inverse: bool) -> None:
    given = arguments(*shape, torch.float64)
    slope = 0.8 if shape[5] else 1.0
    options = dict(activation_slope=slope, exact_logdet=True, inverse=inverse)
    expected = outputs(given, "reference", **options)
    for memory in ("save", "invert"):
        for got, want in zip(outputs(given, "triton", memory=memory, **options), expected, strict=True):
            assert relative_error(got, want) < 1e-11, (memory, got.shape)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("inverse", [False, True])
def test_other_types_judged_by_float64(dtype: torch.dtype, bound: float, inverse: bool) -> None:
    given = arguments(40, 6, 2, 20, 1, 2, False, dtype)
    judge = outputs(
        [t.double() if t is not None and t.is_floating_point() else t for t in given], "reference", inverse=inverse
    )
    for memory in ("save", "invert"):
        for got, want in zip(outputs(given, "triton", memory=memory, inverse=inverse), judge, strict=True):
            # in the mean: rounding takes single hidden units across the kink of their LeakyReLU
            assert (got.double() - want).norm() < bound * want.norm(), (memory, got.shape)
    with iin_fast.backend("triton"):
        y, logdet = flow_op(*given, inverse=inverse)
    assert y.dtype == dtype and logdet.dtype == torch.float32


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_reaches_every_product_as_given(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward was given holds in backward, whatever torch's setting is by then."""
    from iin_fast.ops.flow import triton as module

    seen = []
    monkeypatch.setattr(module, "_precision", lambda dtype, tf32: seen.append(tf32) or "ieee")
    given = arguments(3, 4, 1, 8, 1, 0, False, torch.float32)
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

    given = arguments(7, 5, 3, 17, 2, 3, True, torch.float64)
    whole = outputs(given, "triton", memory="save")
    monkeypatch.setattr(module, "PENDING_BYTES", 4 * 2 * 7 * (2 + 3 * 17) * 8)  # 4 of 6 steps
    assert_close(outputs(given, "triton", memory="save"), whole, rtol=0, atol=0)


@pytest.mark.parametrize("inverse", [False, True])
def test_derivatives_to_second_order(inverse: bool) -> None:
    given = arguments(2, 3, 1, 2, 1, 1, False, torch.float64)
    wanted = (0, 1, 3, 6)  # x, context, scale, weight_hidden
    leaves = [given[i].detach().clone().requires_grad_() for i in wanted]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        all_of_them = list(given)
        for i, tensor in zip(wanted, tensors, strict=True):
            all_of_them[i] = tensor
        return flow_op(*all_of_them, activation_slope=0.7, inverse=inverse)

    with iin_fast.backend("triton"):
        assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(function, leaves, fast_mode=True)


def test_what_is_not_wanted_is_not_computed() -> None:
    given = arguments(5, 4, 1, 8, 1, 0, False, torch.float64)
    x = given[0].clone().requires_grad_()
    with iin_fast.backend("triton"):
        y, _ = flow_op(x, *given[1:])
        y.sum().backward()
        z, logdet = flow_op(*given)
        assert not z.requires_grad and not logdet.requires_grad
    with iin_fast.backend("reference"):
        expected = torch.autograd.grad(flow_op(x, *given[1:])[0].sum(), x)[0]
    assert_close(x.grad, expected)


def test_traces_whole_and_keeps_the_contract_of_an_op() -> None:
    given = arguments(5, 4, 2, 8, 1, 0, False, torch.float32)
    given[0].requires_grad_()
    compiled: Any = torch.compile(lambda *t: flow_op(*t, memory="save"), fullgraph=True, backend="aot_eager")
    with iin_fast.backend("triton"):
        got, expected = compiled(*given), flow_op(*given)
        grads = [torch.autograd.grad(out[0].sum() + out[1].sum(), given[0]) for out in (got, expected)]
    assert_close(got, expected)
    assert_close(grads[0], grads[1])
    op = torch.ops.iin_fast_triton.flow.default
    options = (0.01, 1.0, False, False, 2)
    torch.library.opcheck(op, (*given, *options), test_utils=("test_schema", "test_faketensor"))


def test_models_compare_with_triton_and_a_wrong_permutation_stays_inside() -> None:
    model = iin_fast.IIN(6, {"color": 2}, n_flows=2, hidden_dim=8, generator=torch.Generator().manual_seed(0))
    model(torch.randn(32, 6))
    comparison = iin_fast.testing.compare_backends(model, torch.randn(5, 6))
    assert comparison.ok and {"cpp", "triton"} == {row.backend for row in comparison.rows}
    given = arguments(5, 4, 2, 8, 1, 0, False, torch.float32)
    given[-1] = torch.full_like(given[-1], 2**40)
    with iin_fast.backend("triton"):
        flow_op(*given)
        flow_op(*given, inverse=True)
