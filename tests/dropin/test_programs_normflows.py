"""Whole flows of normflows as programs: the same results, both directions, with and without context."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Net, spread
from derivatives import with_gradients
from torch import Tensor, nn

import iin_fast

nf = pytest.importorskip("normflows")

DIM, CONTEXT, BATCH = 5, 3, 7
TOLERANCE = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def _doubles() -> Any:
    """normflows starts its log-dets as zeros of the usual type."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp(inputs: int, outputs: int, **options: Any) -> nn.Module:
    return nf.nets.MLP([inputs, 8, 8, outputs], leaky=0.1, **options)


MASK = torch.tensor([1.0, 0, 1, 0, 0])
LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "affine": lambda: [nf.flows.AffineCouplingBlock(mlp(3, 4)), nf.flows.Permute(DIM, mode="swap")],
    "affine inverted": lambda: [
        nf.flows.AffineCouplingBlock(mlp(2, 6), split_mode="channel_inv"),
        nf.flows.AffineCouplingBlock(nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2)), scale=False),
    ],
    "masked": lambda: [nf.flows.MaskedAffineFlow(MASK, mlp(DIM, DIM), mlp(DIM, DIM, output_fn="tanh"))],
    "masked shift": lambda: [nf.flows.MaskedAffineFlow(MASK, mlp(DIM, DIM)), nf.flows.Permute(DIM)],
    "masked scale": lambda: [nf.flows.MaskedAffineFlow(1 - MASK, None, mlp(DIM, DIM)), nf.flows.Permute(DIM)],
    "act norm": lambda: [nf.flows.ActNorm(DIM), nf.flows.AffineConstFlow(DIM), nf.flows.Permute(DIM)],
    "reverse": lambda: [nf.flows.Reverse(nf.flows.ActNorm(DIM)), nf.flows.base.Composite(
        [nf.flows.AffineCouplingBlock(mlp(3, 4)), nf.flows.AffineConstFlow(DIM, shift=False)])],
    "coupled": lambda: [nf.flows.CoupledRationalQuadraticSpline(DIM, 2, 8, num_bins=4), nf.flows.LULinearPermute(DIM)],
    "coupled circular": lambda: [
        nf.flows.CoupledRationalQuadraticSpline(DIM, 1, 8, tails="circular", activation=nn.Tanh, reverse_mask=True)
    ],
    "autoregressive": lambda: [
        nf.flows.AutoregressiveRationalQuadraticSpline(DIM, 2, 8, permute_mask=True), nf.flows.LULinearPermute(DIM)
    ],
    "masked autoregressive": lambda: [nf.flows.MaskedAffineAutoregressive(DIM, 8), nf.flows.Permute(DIM)],
}  # fmt: skip
CONDITIONAL: dict[str, Callable[[], list[nn.Module]]] = {
    "coupled": lambda: [
        nf.flows.CoupledRationalQuadraticSpline(DIM, 2, 8, num_context_channels=CONTEXT),
        nf.flows.LULinearPermute(DIM),
    ],
    "autoregressive": lambda: [
        nf.flows.AutoregressiveRationalQuadraticSpline(DIM, 2, 8, num_context_channels=CONTEXT, activation=nn.ELU),
        nf.flows.Permute(DIM),
    ],
    "masked autoregressive": lambda: [nf.flows.MaskedAffineAutoregressive(DIM, 8, CONTEXT)],
}


def flow(*layers: nn.Module, conditional: bool = False) -> nn.Module:
    made = (nf.ConditionalNormalizingFlow if conditional else nf.NormalizingFlow)(
        nf.distributions.DiagGaussian(DIM), layers
    )
    spread(made, 0.3)
    for module in made.modules():
        if isinstance(module, nf.flows.ActNorm):
            module.data_dep_init_done.fill_(1.0)
    return made.double()


def results(model: nn.Module, x: Tensor, context: Tensor | None, order: int = 1) -> list[Tensor]:
    given = () if context is None else (context,)
    wanted = [x, *model.parameters(), *given]

    def sample() -> Any:
        torch.manual_seed(1)
        return model.sample(BATCH, *given)

    calls = (
        lambda: (model.log_prob(x, *given), model.forward_kld(x, *given)),
        lambda: model.forward_and_log_det(x, *given),
        lambda: model.inverse_and_log_det(x, *given),
        lambda: (model(x, *given), model.inverse(x, *given)),
        sample,
    )
    return with_gradients(calls, wanted, order)


def data(context: bool) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(BATCH, DIM, requires_grad=True)
    return x, torch.randn(BATCH, CONTEXT, requires_grad=True) if context else None


ALL = [(name, False) for name in LAYERS] + [(name, True) for name in CONDITIONAL]


def built(name: str, context: bool) -> nn.Module:
    if context:
        if "num_context_channels" not in inspect.signature(nf.flows.CoupledRationalQuadraticSpline).parameters:
            pytest.skip("this normflows has no splines under a context")
        return flow(*CONDITIONAL[name](), *CONDITIONAL["coupled"](), conditional=True)
    return flow(*LAYERS[name](), *LAYERS["affine"]())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "context"), ALL)
def test_results_and_gradients_are_the_library_s(name: str, context: bool, training: bool, calls: list[int]) -> None:
    own, inputs = built(name, context).train(training), data(context)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    line = next(line for line in report.replaced if line.path == "")
    layers = line.why.split()[0]
    assert line.why.startswith(f"{layers} of {layers} layers run in programs"), str(report)
    torch.testing.assert_close(results(fast, *inputs), results(own, *inputs), **TOLERANCE)
    assert len(calls) == 7 and calls[0] == calls[1] == calls[2] + 1, "a Gaussian base is part of the program"
    iin_fast.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in own.modules()]


@pytest.mark.parametrize(("name", "context"), [("masked", False), ("coupled", False), ("autoregressive", True)])
def test_second_derivatives(name: str, context: bool) -> None:
    own, inputs = built(name, context), data(context)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    torch.testing.assert_close(results(fast, *inputs, 2), results(own, *inputs, 2), **TOLERANCE)


@pytest.mark.parametrize(("name", "context"), ALL)
def test_float32_is_as_exact_as_the_library(name: str, context: bool) -> None:
    truth, inputs = built(name, context), data(context)
    torch.set_default_dtype(torch.float32)
    own = copy.deepcopy(truth).float()
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    single = [None if v is None else v.detach().float().requires_grad_() for v in inputs]
    got, want = ([r for r in results(m, *single)[: -2 - len(list(own.parameters()))]] for m in (fast, own))
    torch.set_default_dtype(torch.float64)
    doubles = [None if v is None else v.detach().double().requires_grad_() for v in single]
    truths = results(copy.deepcopy(own).double(), *doubles)
    samples = 3 + len(list(own.parameters())) + context  # two results, and gradients: their noise is of another type
    for g, w, t in list(zip(got, want, truths, strict=False))[: len(truths) - samples]:
        size = max(1.0, float(t.abs().max()))
        assert float((g - t).abs().max()) <= 16 * float((w - t).abs().max()) + 1e-5 * size


def test_what_cuts_a_program(calls: list[int]) -> None:
    layers = [*LAYERS["coupled"](), nf.flows.AffineCouplingBlock(Net(3, 4)), nf.flows.ActNorm(DIM), *LAYERS["masked"]()]
    own, (x, _) = flow(*layers), data(False)
    own.flows[3].data_dep_init_done = torch.tensor(0.0)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    text = next(line.why for line in report.replaced if line.path == "")
    assert text.startswith("3 of 5 layers") and "Net has no place in a program" in text and "not been started" in text
    for pieces in ([1, 4], [2, 4]):  # the masked flow, with the ActNorm once it has been started; the spline and LU
        calls.clear()
        torch.testing.assert_close(fast.inverse(x), own.inverse(x), **TOLERANCE)
        assert calls == pieces
    for model in (own, fast):
        model.q0.temperature = 0.7
    torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)
    for model in (own, fast):
        model.q0 = nf.distributions.base.Uniform(DIM, torch.tensor(-90.0), torch.tensor(90.0))
    torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)


def test_a_net_that_is_a_function_cuts_a_program(calls: list[int]) -> None:
    own, (x, _) = built("autoregressive", False), data(False)
    vars(own.flows[0].mprqat.autoregressive_net)["preprocessing"] = torch.tanh
    own.flows[0].mprqat.autoregressive_net._modules.pop("preprocessing", None)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    assert "expected a module" in str(report)
    torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)
    assert calls


@pytest.mark.parametrize("function", [lambda x: torch.zeros_like(x), lambda x: torch.ones_like(x), torch.zeros_like])
def test_a_masked_flow_whose_shift_is_a_function(function: Any, calls: list[int]) -> None:
    own, (x, _) = built("masked scale", False), data(False)
    own.flows[0].t = function
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)
    assert calls == ([5] if function(torch.ones(1)) == 0 else [3])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.detach().float(),
        lambda x: x[:, :4],
        lambda x: x[0],
        lambda x: x[:0],
        lambda x: x[..., None, None],
        lambda x: x.detach().tolist(),
    ],
)
@pytest.mark.parametrize("name", ["affine", "masked", "coupled", "autoregressive"])
def test_errors_are_the_library_s(name: str, change: Callable[[Tensor], Any]) -> None:
    own, fast, value = built(name, False), None, change(data(False)[0])
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    for call in ("forward", "inverse", "log_prob", "forward_kld"):
        outcomes = []
        for model in (own, fast):
            try:
                outcomes.append(getattr(model, call)(value).shape)
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


def test_a_flow_without_context_refuses_one_as_before() -> None:
    own, (x, c) = built("affine", False), data(True)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    for name in (
        "forward",
        "forward_and_log_det",
        "inverse",
        "inverse_and_log_det",
        "log_prob",
        "forward_kld",
        "sample",
    ):
        first = 3 if name == "sample" else x
        for call in (
            lambda m, n=name, a=first: getattr(m, n)(a, c),
            lambda m, n=name, a=first: getattr(m, n)(a, context=c),
        ):
            texts = []
            for model in (own, fast):
                with pytest.raises(TypeError) as caught:
                    call(model)
                texts.append(str(caught.value))
            assert texts[0] == texts[1]


def test_reverse_kld_patch_copy_and_pickle(calls: list[int]) -> None:
    own = built("coupled", False)
    own.p = nf.distributions.DiagGaussian(DIM)
    x, drawn = data(False)[0], []
    wanted = own.log_prob(x)
    with iin_fast.patch("normflows"):
        torch.testing.assert_close(own.log_prob(x), wanted, **TOLERANCE)
    assert len(calls) == 1 and torch.equal(own.log_prob(x), wanted)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    twin = copy.deepcopy(fast)
    torch.testing.assert_close(twin.log_prob(x), wanted, **TOLERANCE)
    assert len(calls) == 2 and type(pickle.loads(pickle.dumps(fast))) is nf.NormalizingFlow
    for model in (own, fast):
        torch.manual_seed(3)
        drawn.append(model.reverse_kld(20))
    torch.testing.assert_close(*drawn, **TOLERANCE)


def test_a_model_that_no_setting_brings_into_a_program_is_left(calls: list[int]) -> None:
    """Its checks would cost each call a part of what it takes at batch 1."""
    own = nf.NormalizingFlow(nf.distributions.DiagGaussian(DIM), [nf.flows.MaskedAffineFlow(MASK, Net(DIM, DIM))])
    report = iin_fast.accelerate(own)
    assert type(own) is nf.NormalizingFlow and not report.replaced
    assert "Net has no place in a program" in str(report)
    own.log_prob(torch.randn(BATCH, DIM))
    assert not calls
