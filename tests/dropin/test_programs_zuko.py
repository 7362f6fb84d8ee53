"""Whole flows of zuko as programs: the same results, whatever is asked of them."""

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import has
from derivatives import with_gradients
from torch import Tensor, nn

import iin_fast

zuko = pytest.importorskip("zuko")

DIM, CONTEXT, BATCH = 5, 3, 7
TOLERANCE = dict(rtol=1e-9, atol=1e-9)
F, T = zuko.flows, zuko.transforms
ADDITIVE = getattr(T, "AdditiveTransform", None)  # since zuko 1.5
SLOPE = {"slope": 1e-2} if "slope" in inspect.signature(F.NSF.__init__).parameters else {}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shaken(flow: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return flow.to(dtype)


def ready(cls: Any, **options: Any) -> Callable[[int], nn.Module]:
    return lambda context: cls(DIM, context, transforms=3, hidden_features=(8, 8), **options)


def mixed(context: int) -> nn.Module:
    """Standardisation as sbi's, a permutation, additive layers, and inverses."""
    affine = torch.distributions.transforms.AffineTransform
    additive = [F.GeneralCouplingTransform(DIM, context, univariate=ADDITIVE, shapes=[()])] if ADDITIVE else []
    lazies = [
        F.UnconditionalTransform(affine, loc=torch.randn(DIM), scale=torch.rand(DIM) + 0.5, buffer=True),
        F.MaskedAutoregressiveTransform(DIM, context, hidden_features=(8,), activation=nn.ELU),
        F.UnconditionalTransform(T.PermutationTransform, torch.randperm(DIM), buffer=True),
        zuko.lazy.LazyComposedTransform(*additive, F.MaskedAutoregressiveTransform(DIM, context).inv),
        F.UnconditionalTransform(T.MonotonicAffineTransform, torch.randn(DIM), torch.randn(DIM), buffer=True),
    ]
    base = F.UnconditionalDistribution(
        zuko.distributions.DiagNormal, loc=torch.zeros(DIM), scale=torch.ones(DIM), buffer=True
    )
    return F.Flow(lazies, base)


def linear(context: int) -> nn.Module:
    """Linear maps by their factors, trained and fixed."""
    flow = F.MAF(DIM, context, transforms=2, hidden_features=(8,))
    for options in ({}, {"buffer": True}):
        matrix = 0.3 * torch.randn(DIM, DIM) - torch.eye(DIM)
        flow.transform.transforms.insert(1, F.UnconditionalTransform(T.LULinearTransform, matrix, **options))
    return flow


FLOWS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "MAF": (ready(F.MAF), 3),
    "MAF of slope 0.1": (ready(F.MAF, univariate=lambda *a: T.MonotonicAffineTransform(*a)), 0),
    "MAF residual": (ready(F.MAF, residual=True, randperm=True), 3),
    "NSF": (ready(F.NSF, bins=4), 3),
    "NSF coupling": (ready(F.NSF, passes=2, **SLOPE), 3),
    "NICE": (ready(F.NICE, randmask=True), 3),
    "RealNVP": (ready(getattr(F, "RealNVP", F.NICE), activation=nn.SiLU), 3),
    "NCSF": (ready(F.NCSF), 3),
    "NCSF coupling": (ready(F.NCSF, passes=2, bins=3), 3),
    "mixed": (mixed, 6 if ADDITIVE else 5),
    "LU": (linear, 4),
    "normalize": (ready(F.NICE, normalize=True), 0),
}


def data(context: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(BATCH, DIM, dtype=dtype, requires_grad=True)
    return x, torch.randn(BATCH, context, dtype=dtype, requires_grad=True) if context else None


def results(flow: nn.Module, x: Tensor, c: Tensor | None, order: int = 1) -> list[Tensor]:
    wanted = [x, *flow.parameters(), *([] if c is None else [c])]
    calls = (
        lambda: (flow(c).log_prob(x),),
        lambda: flow(c).transform.call_and_ladj(x),
        lambda: flow(c).transform.inv.call_and_ladj(x),
        lambda: (flow(c).transform(x), flow(c).transform.inv(x), flow(c).transform.log_abs_det_jacobian(x, x)),
    )
    return with_gradients(calls, wanted, order)


@pytest.mark.parametrize("context", [0, CONTEXT])
@pytest.mark.parametrize("name", FLOWS)
def test_results_and_gradients_are_the_library_s(name: str, context: int, calls: list[int]) -> None:
    build, layers = FLOWS[name]
    own, inputs = shaken(build(context)), data(context)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    torch.testing.assert_close(results(fast, *inputs), results(own, *inputs), **TOLERANCE)
    assert calls == [layers] * (6 if layers else 0)
    if layers:
        line = next(line for line in report.replaced if line.path == "transform")
        assert line.why.startswith(f"{layers} of {layers} layers run in programs"), str(report)
    iin_fast.restore(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in own.modules()]


@pytest.mark.parametrize("name", ["MAF", "NSF coupling", "NCSF"])
def test_second_derivatives(name: str) -> None:
    own, inputs = shaken(FLOWS[name][0](CONTEXT)), data(CONTEXT)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    torch.testing.assert_close(results(fast, *inputs, 2), results(own, *inputs, 2), **TOLERANCE)


@pytest.mark.parametrize("name", ["MAF", "NSF", "NICE", "NCSF", "mixed"])
def test_float32_is_as_exact_as_the_library(name: str) -> None:
    own, inputs = shaken(FLOWS[name][0](CONTEXT), torch.float32), data(CONTEXT, torch.float32)
    fast, truth = copy.deepcopy(own), copy.deepcopy(own).double()
    iin_fast.accelerate(fast)
    truths = results(truth, *(value.detach().double().requires_grad_() for value in inputs))
    for got, want, true in zip(results(fast, *inputs), results(own, *inputs), truths, strict=True):
        size = max(1.0, float(true.abs().max()))
        assert float((got - true).abs().max()) <= 16 * float((want - true).abs().max()) + 1e-5 * size


@pytest.mark.parametrize("name", ["NSF", "mixed", "NCSF"])
def test_samples_shapes_and_batches(name: str) -> None:
    own = shaken(FLOWS[name][0](CONTEXT))
    fast, (x, c) = copy.deepcopy(own), data(CONTEXT)
    iin_fast.accelerate(fast)
    with torch.no_grad():
        for context, shape in ((c, (4,)), (c[0], (2, 3)), (c[:6].view(2, 3, CONTEXT), (4,))):
            found = []
            for model in (own, fast):
                torch.manual_seed(1)
                d = model(context)
                found.append((d.sample(shape), *d.rsample_and_log_prob(shape), d.log_prob(d.sample(shape))))
                assert d.event_shape == (DIM,) and d.batch_shape == context.shape[:-1]
                assert repr(d) == repr(own(context)) and d.transform.codomain.event_dim == 1
            torch.testing.assert_close(found[1], found[0], **TOLERANCE)
        for value in (x[0], x[None], x[:, None], x.view(1, BATCH, 1, DIM)):
            outcomes = []
            for model in (own, fast):
                try:
                    outcomes.append(model(c).log_prob(value))
                except Exception as error:
                    outcomes.append((type(error), str(error)))
            assert isinstance(outcomes[1], type(outcomes[0]))
            if isinstance(outcomes[0], Tensor):
                torch.testing.assert_close(outcomes[1], outcomes[0], **TOLERANCE)
            else:
                assert outcomes[1] == outcomes[0]


def test_a_distribution_can_be_expanded_copied_and_pickled() -> None:
    own = shaken(FLOWS["NSF"][0](CONTEXT))
    fast, (x, c) = copy.deepcopy(own), data(CONTEXT)
    iin_fast.accelerate(fast)
    with torch.no_grad():
        wanted = own(c.detach()).log_prob(x)
        d = fast(c.detach())
        torch.testing.assert_close(d.expand((2, BATCH)).log_prob(x), wanted.expand(2, -1), **TOLERANCE)
        for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            assert isinstance(twin, zuko.distributions.NormalizingFlow)
            torch.testing.assert_close(twin.log_prob(x), wanted, **TOLERANCE)
        assert type(pickle.loads(pickle.dumps(d.transform))) is T.ComposedTransform


@pytest.mark.parametrize(
    "change",
    [
        lambda x, c: (x.detach().float(), c),
        lambda x, c: (x[:, :4], c),
        lambda x, c: (x, c[:, :2]),
        lambda x, c: (x, c[:3]),
        lambda x, c: (x, None),
        lambda x, c: (x[:0], c[:0]),
        lambda x, c: (x, c.detach().float()),
        lambda x, c: (x.detach().tolist(), c),
    ],
)
@pytest.mark.parametrize("name", ["MAF", "NICE", "NSF"])
def test_errors_are_the_library_s(name: str, change: Callable[[Tensor, Tensor], Any]) -> None:
    own, inputs = shaken(FLOWS[name][0](CONTEXT)), data(CONTEXT)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    x, c = change(*inputs)
    for call in (lambda f: f(c).log_prob(x), lambda f: f(c).transform(x), lambda f: f(c).transform.inv(x)):
        outcomes = []
        for model in (own, fast):
            try:
                outcomes.append([call(model).shape])
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


def test_a_base_that_is_no_standard_normal_is_the_library_s(calls: list[int]) -> None:
    own, (x, _) = shaken(FLOWS["MAF"][0](0)), data(0)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    fast().log_prob(x)
    for model in (own, fast):
        next(model.base.buffers()).fill_(0.5)
    torch.testing.assert_close(fast().log_prob(x), own().log_prob(x), **TOLERANCE)
    learned = F.UnconditionalDistribution(zuko.distributions.DiagNormal, loc=torch.zeros(DIM), scale=torch.ones(DIM))
    for model in (own, fast):
        model.base = copy.deepcopy(learned).double()
        model().log_prob(x).sum().backward()
        assert model.base.loc.grad is not None
    assert calls == [3, 3, 3]


def test_a_change_of_the_model_is_seen(calls: list[int]) -> None:
    own, (x, _) = shaken(FLOWS["MAF"][0](0)), data(0)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    for change, layers in (
        (lambda f: None, [3]),
        (lambda f: f.transform.transforms[1].hyper[0].weight.data.mul_(2), [3]),
        (lambda f: setattr(f.transform.transforms[1].hyper, "1", nn.Tanh()), [3]),
        (lambda f: f.transform.transforms.append(copy.deepcopy(f.transform.transforms[0])), [4]),
        (lambda f: setattr(f.transform.transforms[1].hyper, "1", nn.Softplus()), [1, 2]),
        (lambda f: f.transform.transforms[2].hyper[0].register_forward_hook(lambda *_: None), [1, 1]),
        (lambda f: setattr(f.transform.transforms[3], "univariate", ADDITIVE or T.SoftclipTransform), [1]),
    ):
        for model in (own, fast):
            change(model)
        calls.clear()
        outcomes = []
        for model in (own, fast):
            try:
                outcomes.append(model().log_prob(x))
            except TypeError as error:
                outcomes.append(str(error))
        assert calls == layers
        assert outcomes[0] == outcomes[1] if isinstance(outcomes[0], str) else torch.allclose(*outcomes, 1e-9, 1e-9)


def test_patch_function_transforms_and_freedom(calls: list[int]) -> None:
    flow, (x, _) = shaken(FLOWS["NSF"][0](0)), data(0)
    wanted = flow().log_prob(x)
    with iin_fast.patch("zuko"):
        torch.testing.assert_close(flow().log_prob(x), wanted, **TOLERANCE)
    assert calls == [3]
    torch.testing.assert_close(flow().log_prob(x), wanted, **TOLERANCE)
    own = copy.deepcopy(flow)
    iin_fast.accelerate(flow)
    rows = [torch.func.vmap(torch.func.grad(lambda row, f=f: f().log_prob(row)))(x.detach()) for f in (own, flow)]
    torch.testing.assert_close(*rows, **TOLERANCE)
    assert calls == [3]
    flow().log_prob(x)
    ref = weakref.ref(flow)
    del flow, rows
    gc.collect()
    assert ref() is None


def test_a_base_or_transform_that_is_set_on_a_distribution_counts(calls: list[int]) -> None:
    own, (x, _) = shaken(FLOWS["NSF"][0](0)), data(0)
    fast, wide = copy.deepcopy(own), zuko.distributions.DiagNormal(torch.zeros(DIM), 2 * torch.ones(DIM))
    iin_fast.accelerate(fast)
    for change in (
        lambda d: setattr(d, "base", wide),
        lambda d: setattr(d.base, "log_prob", wide.log_prob),
        lambda d: setattr(d, "transform", d.transform.inv),
        lambda d: setattr(d.transform, "transforms", d.transform.transforms[:1]),
    ):
        found = []
        for model in (own, fast):
            d = model()
            change(d)
            found.append(d.log_prob(x))
        torch.testing.assert_close(found[1], found[0], **TOLERANCE)


def test_a_layer_that_reads_its_parameters_before_x_comes(calls: list[int]) -> None:
    base = F.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(DIM), torch.ones(DIM), buffer=True)
    layers = [F.ElementWiseTransform(DIM, CONTEXT), F.MaskedAutoregressiveTransform(DIM, CONTEXT)]
    own, (x, c) = shaken(F.Flow(layers, base)), data(CONTEXT)
    fast, found = copy.deepcopy(own), []
    report = iin_fast.accelerate(fast)
    assert "before x comes" in str(report)
    for model in (own, fast):
        with torch.no_grad():
            d = model(c)
            next(model.transform.transforms[0].parameters()).mul_(3)
        first = torch.autograd.grad(d.log_prob(x).sum(), list(model.parameters()), allow_unused=True)
        found.append((d.log_prob(x), [g is None for g in first]))
    torch.testing.assert_close(found[1][0], found[0][0], **TOLERANCE)
    assert found[1][1] == found[0][1] and not calls
    for model in (own, fast):
        del model.transform.transforms[0]
    torch.testing.assert_close(fast(c).log_prob(x), own(c).log_prob(x), **TOLERANCE)
    assert calls == [1]


def test_a_flow_on_meta_runs_the_library_s_code() -> None:
    flow, (x, c) = FLOWS["MAF"][0](CONTEXT), data(CONTEXT, torch.float32)
    iin_fast.accelerate(flow)
    assert flow.to("meta")(c.to("meta")).log_prob(x.to("meta")).shape == (BATCH,)


def test_batched_gradients_hold_no_graph() -> None:
    own, (x, _) = shaken(FLOWS["NSF"][0](0)), data(0)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    for create_graph in (False, True):
        found = [
            torch.autograd.grad(
                f().log_prob(x), [*f.parameters()], torch.eye(BATCH).double(), None, create_graph, is_grads_batched=True
            )
            for f in (own, fast)
        ]
        torch.testing.assert_close(found[1], found[0], **TOLERANCE)
        assert any(v.requires_grad for v in found[1]) is create_graph


@pytest.mark.skipif(not has("sbi"), reason="sbi is not installed")
@pytest.mark.parametrize("name", ["build_zuko_maf", "build_zuko_nsf", "build_zuko_nice"])
def test_estimators_of_sbi(name: str, calls: list[int]) -> None:
    from sbi.neural_nets import net_builders

    x, context = 3 * torch.randn(30, 4) + 1, torch.randn(30, 7)
    own = shaken(getattr(net_builders, name)(x, context, hidden_features=10, num_transforms=2), torch.float32)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    wanted, got = (m.loss(x, context) for m in (own, fast))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert calls == [3]
    drawn = []
    for model in (own, fast):
        torch.manual_seed(2)
        drawn.append(model.sample((5,), context[:2]))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=1e-3)
