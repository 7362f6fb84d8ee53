"""glasflow, which holds a copy of nflows: its own flows as programs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import spread
from derivatives import with_gradients
from torch import Tensor, nn

import iin_fast

glasflow = pytest.importorskip("glasflow")
flows = pytest.importorskip("glasflow.flows")
Affine = pytest.importorskip("glasflow.nflows.transforms.coupling").AffineCouplingTransform

DIM, CONTEXT, BATCH = 5, 3, 7
TOLERANCE = dict(rtol=1e-9, atol=1e-9)
OPTIONS = dict(n_inputs=DIM, n_transforms=2, n_neurons=8)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


FLOWS: dict[str, Callable[..., nn.Module]] = {
    "spline": lambda **o: flows.CouplingNSF(**OPTIONS, linear_transform="lu", **o),
    "spline, batch norm": lambda **o: flows.CouplingNSF(
        **OPTIONS, linear_transform="permutation", batch_norm_between_transforms=True, **o
    ),
    "affine": lambda **o: flows.RealNVP(**OPTIONS, scale_activation="nflows", **o),
    "affine of nflows": lambda **o: flows.coupling.CouplingFlow(Affine, **OPTIONS, **o),
    "additive": lambda **o: flows.RealNVP(**OPTIONS, volume_preserving=True, **o),
    "masked affine": lambda **o: flows.autoregressive.MaskedAffineAutoregressiveFlow(**OPTIONS, **o),
    "masked spline": lambda **o: flows.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveFlow(
        **OPTIONS, tails="linear", tail_bound=3.0, **o
    ),
}


def flow(name: str, context: int | None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = FLOWS[name](n_conditional_inputs=context, **options)
    spread(made, 0.3)
    for module in made.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return made.double().eval()


def results(model: Any, x: Tensor, context: Tensor | None, order: int) -> list[Tensor]:
    """Density, both directions, samples, and gradients of x, the context and all parameters."""
    wanted = [x, *model.parameters(), *([] if context is None else [context])]

    def sample() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return (model.sample(BATCH, conditional=context),)

    calls = (
        lambda: (model.log_prob(x, context),),
        lambda: model.forward_and_log_prob(x, context),
        lambda: model.inverse(x, context),
        sample,
    )
    return with_gradients(calls, wanted, order)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("name", FLOWS)
def test_results_and_gradients_are_the_library_s(name: str, context: int | None, order: int, calls: list[int]) -> None:
    own = flow(name, context)
    x = torch.randn(BATCH, DIM, requires_grad=True)
    c = None if context is None else torch.randn(BATCH, context, requires_grad=True)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    assert not report.left, str(report)
    assert "layers run in programs" in str(report)
    got, want = results(fast, x, c, order), results(own, x, c, order)
    torch.testing.assert_close(got, want, **TOLERANCE)
    assert len(calls) >= 3, "a direction ran the library's own code"


def test_a_scale_that_no_program_knows_cuts_it(calls: list[int]) -> None:
    for name in ("affine", "masked affine"):
        own = flow("spline", None)
        own._transform._transforms.append(flow(name, None)._transform._transforms[1 if name == "masked affine" else 0])
        own._transform._transforms[-1].scale_activation = lambda x: x.sigmoid() + 0.5
        fast, x = copy.deepcopy(own), torch.randn(BATCH, DIM)
        report = iin_fast.accelerate(fast)
        assert "scale_activation is not nflows' own" in str(report)
        torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)
        assert calls
        calls.clear()


def test_a_density_of_the_base_instance_is_called() -> None:
    own, x = flow("spline", None), torch.randn(BATCH, DIM)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    for model in (own, fast):
        model._distribution.log_prob = lambda noise, context=None: noise.sum(1)
    torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)


def test_patch(calls: list[int]) -> None:
    own, x = flow("spline", None), torch.randn(BATCH, DIM)
    want = own.log_prob(x)
    assert not calls
    with iin_fast.patch("glasflow") as patched:
        assert not patched.report.left, str(patched)
        torch.testing.assert_close(own.log_prob(x), want, **TOLERANCE)
        assert len(calls) == 1
        with pytest.raises(ValueError, match="must be of size 5"):
            own.log_prob(x[:, :4])
    own.log_prob(x)
    assert len(calls) == 1
