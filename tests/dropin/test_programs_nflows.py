"""Whole models of other libraries as programs: the same results, and what cuts a program."""

import copy
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from cases import has, spread
from derivatives import with_gradients
from torch import Tensor, nn

import iin_fast
from iin_fast.dropin import registry
from iin_fast.dropin.programs import plan

transforms = pytest.importorskip("nflows.transforms")
flows = pytest.importorskip("nflows.flows")
distributions = pytest.importorskip("nflows.distributions")
ResidualNet = pytest.importorskip("nflows.nn.nets").ResidualNet

DIM, CONTEXT, BATCH = 5, 3, 7
TOLERANCE = dict(rtol=1e-9, atol=1e-9)
T = transforms


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def net(context: int | None = None, **options: Any) -> Callable[[int, int], nn.Module]:
    return lambda i, o: ResidualNet(i, o, hidden_features=8, context_features=context, **options)


MASK = [1, 0, 1, 0, 1]
WIDE = {"num_bins": 4, "tails": "linear", "tail_bound": 3.0}


def spline(context: int | None = None, **options: Any) -> nn.Module:
    return T.PiecewiseRationalQuadraticCouplingTransform(MASK, net(context, **options), **WIDE)


LAYERS: dict[str, Callable[[int | None], nn.Module]] = {
    "affine": lambda c: T.AffineCouplingTransform(MASK, net(c)),
    "additive": lambda c: T.AdditiveCouplingTransform(MASK, net(c, activation=torch.tanh)),
    "spline": lambda c: spline(c, activation=nn.functional.elu),
    "spline of both halves": lambda c: T.PiecewiseRationalQuadraticCouplingTransform(
        MASK, net(c), apply_unconditional_transform=True, **WIDE
    ),
    "masked affine": lambda c: T.MaskedAffineAutoregressiveTransform(DIM, 8, context_features=c),
    "masked affine, feedforward": lambda c: T.MaskedAffineAutoregressiveTransform(
        DIM, 8, context_features=c, use_residual_blocks=False, random_mask=True, activation=torch.tanh
    ),
    "masked spline": lambda c: T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        DIM, 8, context_features=c, **WIDE
    ),
    "LU": lambda c: T.LULinear(DIM, identity_init=False),
    "act norm": lambda c: T.ActNorm(DIM),
    "batch norm": lambda c: T.BatchNorm(DIM),
    "pointwise": lambda c: T.PointwiseAffineTransform(torch.randn(DIM), torch.rand(DIM) + 0.5),
    "scalar": lambda c: T.PointwiseAffineTransform(0.3, 1.7),
    "inverse": lambda c: T.InverseTransform(
        T.CompositeTransform([T.AffineCouplingTransform(MASK, net(c)), T.ActNorm(DIM), T.BatchNorm(DIM)])
    ),
}


def flow(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A flow whose weights no start has made small, and whose norms have seen data."""
    made = flows.Flow(T.CompositeTransform(list(layers)), distributions.StandardNormal([DIM]))
    spread(made, 0.3)
    for module in made.modules():
        if isinstance(module, T.ActNorm):
            module.initialized.fill_(True)
        if isinstance(module, T.BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return made.to(dtype).eval()


def layered(name: str, context: int | None) -> list[nn.Module]:
    """A layer between two others, so that features of both sides matter."""
    return [T.ReversePermutation(DIM), LAYERS[name](context), T.ReversePermutation(DIM), LAYERS["affine"](context)]


def results(model: nn.Module, x: Tensor, context: Tensor | None, order: int = 1) -> list[Tensor]:
    """Both directions, the log-density, and gradients of x, the context and all parameters, to an order."""
    wanted = [x, *model.parameters(), *([] if context is None else [context])]
    calls = (
        lambda: (model.log_prob(x, context),),
        lambda: model._transform(x, context),
        lambda: model._transform.inverse(x, context),
    )
    return with_gradients(calls, wanted, order)


def data(context: int | None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(BATCH, DIM, dtype=dtype, requires_grad=True)
    return x, None if context is None else torch.randn(BATCH, context, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_the_library_s(
    name: str, context: int | None, training: bool, calls: list[int]
) -> None:
    own, inputs = flow(*layered(name, context)), data(context)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    if training and name in ("batch norm", "inverse"):  # which has no inverse then
        own.train()
        fast.train()
        x, c = inputs
        call = "__call__" if name == "batch norm" else "inverse"
        for got, want in zip(*(getattr(m._transform, call)(x, c) for m in (fast, own)), strict=True):
            torch.testing.assert_close(got, want, **TOLERANCE)
        assert calls and sum(calls) <= 4, "a batch norm in training mode is no part of a program"
        return
    own.train(training)
    fast.train(training)
    assert not report.left, str(report)
    torch.testing.assert_close(results(fast, *inputs), results(own, *inputs), **TOLERANCE)
    whole = {"batch norm": 5, "inverse": 7, "spline of both halves": 5}.get(name, 4)
    assert calls == [whole] * 3


@pytest.mark.parametrize("name", ["masked affine", "spline", "spline of both halves", "LU"])
def test_second_derivatives(name: str) -> None:
    own, inputs = flow(*layered(name, CONTEXT)), data(CONTEXT)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    torch.testing.assert_close(results(fast, *inputs, 2), results(own, *inputs, 2), **TOLERANCE)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_is_as_exact_as_the_library(name: str) -> None:
    truth, inputs = flow(*layered(name, CONTEXT)), data(CONTEXT)
    own = copy.deepcopy(truth).float()
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    single = [value.detach().float().requires_grad_() for value in inputs]
    truths = results(copy.deepcopy(own).double(), *(value.detach().double().requires_grad_() for value in single))
    for got, want, true in zip(results(fast, *single), results(own, *single), truths, strict=True):
        size = max(1.0, float(true.abs().max()))
        assert float((got - true).abs().max()) <= 16 * float((want - true).abs().max()) + 1e-5 * size


def test_samples_of_the_same_noise() -> None:
    own = flow(*layered("masked affine", CONTEXT), dtype=torch.float32)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    context = torch.randn(2, CONTEXT)
    drawn = []
    for model in (own, fast):
        torch.manual_seed(3)
        drawn.append((model.sample(4, context), *model.sample_and_log_prob(3, context)))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-4)


def test_a_standard_normal_base_is_part_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    made = flow(*layered("spline", None))
    iin_fast.accelerate(made)
    monkeypatch.setattr(distributions.StandardNormal, "log_prob", None)
    assert made.log_prob(data(None)[0]).shape == (BATCH,)


def test_another_base_is_the_library_s() -> None:
    own = flow(*layered("spline", None))
    own._distribution = distributions.DiagonalNormal([DIM]).double()
    nn.init.normal_(own._distribution.mean_)
    fast, (x, _) = copy.deepcopy(own), data(None)
    iin_fast.accelerate(fast)
    torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)


@pytest.mark.parametrize(
    ("part", "method"), [("_distribution", "log_prob"), ("_distribution", "_log_prob"), ("_transform", "forward")]
)
def test_a_method_of_an_instance_is_called(part: str, method: str) -> None:
    own = flow(*layered("spline", None))
    fast, (x, _) = copy.deepcopy(own), data(None)
    iin_fast.accelerate(fast)
    fast.log_prob(x)
    for model in (own, fast):
        module = getattr(model, part)
        given = getattr(module, method)
        setattr(module, method, lambda x, context=None, given=given: given(x / 2, context))
    torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)


def test_a_lone_autoregressive_transform(calls: list[int]) -> None:
    own, (x, context) = spread(T.MaskedAffineAutoregressiveTransform(DIM, 8, CONTEXT)).double(), data(CONTEXT)
    fast = copy.deepcopy(own)
    assert len(iin_fast.accelerate(fast).replaced) == 1
    for call in (lambda m: m(x, context), lambda m: m.inverse(x, context)):
        torch.testing.assert_close(call(fast), call(own), **TOLERANCE)
    assert calls == [1, 1]


# ---------------------------------------------------------------- what cuts a program


class Doubled(transforms.LULinear):
    """A user's own."""


def dropout(p: float) -> nn.Module:
    return spline(None, dropout_probability=p)


CUTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Doubled(DIM), "a subclass of LULinear"),
    "dropout": (lambda: dropout(0.4), "dropout 0.4 in training mode"),
    "batch norm in the net": (lambda: spline(None, use_batch_norm=True), "batch norm in its net"),
    "activation": (lambda: spline(None, activation=torch.sin), "activation sin"),
    "tails": (
        lambda: T.PiecewiseRationalQuadraticCouplingTransform(MASK, net()),
        "a spline without tails raises outside of its box",
    ),
    "cache": (lambda: T.LULinear(DIM, using_cache=True), "using_cache"),
    "not started": (lambda: T.ActNorm(DIM), "an ActNorm that has not been started"),
    "unknown": (lambda: T.NaiveLinear(DIM), "NaiveLinear has no place in a program"),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_cuts_a_program(name: str, calls: list[int]) -> None:
    build, why = CUTS[name]
    middle = build()
    made = flow(*layered("affine", None), middle, *layered("masked affine", None))
    made.train(name in ("dropout", "not started"))
    if name == "not started":
        middle.initialized.fill_(False)
    own, x = copy.deepcopy(made), 0.5 + 0.01 * data(None)[0].detach()
    if name == "tails":
        x = T.CompositeTransform(list(own._transform._transforms[:4])).inverse(torch.full_like(x, 0.5))[0].detach()
    report = iin_fast.accelerate(made)
    text = next(line.why for line in report.replaced if line.path == "_transform")
    assert text.startswith("8 of 9 layers run in programs") and "parameters, at every batch size; cut by" in text
    assert f"({why})" in text
    assert why in next(line.why for line in report.lines if line.path == "_transform._transforms.4")
    for model in (own, made):
        torch.manual_seed(5)
        results_of = model.log_prob(x)
        if model is own:
            wanted = results_of
    torch.testing.assert_close(results_of, wanted, **TOLERANCE)
    assert calls == [4, 4]


def test_what_a_gpu_has_no_room_for_cuts_a_program(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Report and calls agree, where one net is too large and where the whole is."""

    def narrow(x: Tensor, context: Tensor | None, parameters: list[Tensor], program: Any, inverse: bool) -> bool:
        return all(max(p.shape) < 40 for p in parameters)

    def few(x: Tensor, context: Tensor | None, parameters: list[Tensor], program: Any, inverse: bool) -> bool:
        return len(program.layers) < 4

    for has_room, some, found in ((narrow, "8 of 9", [4, 4]), (few, "1 of 1", [1])):  # of few a layer on its own
        monkeypatch.setattr(plan, "runs", has_room)
        large = T.AffineCouplingTransform(MASK, lambda i, o: ResidualNet(i, o, hidden_features=40))
        made = flow(*layered("affine", None), large, *layered("masked affine", None))
        own, (x, _) = copy.deepcopy(made), data(None)
        report = iin_fast.accelerate(made)
        (line,) = (line for line in report.replaced if "run in programs" in line.why)
        assert line.why.startswith(f"{some} layers run in programs"), line
        assert "too large for a block of this GPU" in str(report)
        calls.clear()
        torch.testing.assert_close(made.log_prob(x), own.log_prob(x), **TOLERANCE)
        assert calls == found


def test_the_report_knows_which_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iin_fast.dropin.replace._warned", set())  # of earlier tests, which may have warned
    made = flow(*layered("affine", None))
    with iin_fast.backend("reference"), pytest.warns(UserWarning, match="nothing of nflows was replaced"):
        (line,) = (line for line in iin_fast.accelerate(made).lines if line.path == "_transform")
    assert not line.replaced and "the compiled library does not run on cpu here" in line.why


def test_a_change_of_the_model_is_seen(calls: list[int]) -> None:
    made = flow(*layered("spline", None), dropout(0.4), T.ActNorm(DIM))
    own, (x, _) = copy.deepcopy(made), data(None)
    iin_fast.accelerate(made)

    def same(*layers: int) -> None:
        calls.clear()
        torch.testing.assert_close(made.log_prob(x), own.log_prob(x), **TOLERANCE)
        assert calls == list(layers)

    def both(change: Callable[[Any], Any]) -> None:
        for model in (made, own):
            torch.manual_seed(4)
            change(model._transform._transforms)

    same(6)
    same(6)
    both(lambda t: setattr(t[1].transform_net.final_layer, "weight", nn.Parameter(torch.randn(33, 8).double())))
    same(6)
    both(lambda t: t[1].transform_net.final_layer.weight.data.mul_(0.5))
    same(6)
    both(lambda t: setattr(t[1], "tail_bound", 2.0))
    same(6)
    both(lambda t: setattr(t[1].transform_net.blocks[0], "activation", torch.tanh))
    both(lambda t: setattr(t[1].transform_net.blocks[1], "activation", torch.tanh))
    same(6)
    both(lambda t: t[0]._permutation.copy_(torch.randperm(DIM)))
    same(6)
    both(lambda t: t.append(T.ReversePermutation(DIM)))
    same(7)
    both(lambda t: t[5].shift.requires_grad_(False))
    same(7)
    both(lambda t: setattr(t, "2", T.NaiveLinear(DIM).double()))
    same(2, 4)
    both(lambda t: setattr(t[1].transform_net.blocks[0].linear_layers, "0", nn.Linear(8, 8, bias=False).double()))
    same(2, 4)
    both(
        lambda t: setattr(t[1].transform_net.blocks[0].linear_layers[0], "bias", nn.Parameter(torch.randn(8).double()))
    )
    same(2, 4)
    both(lambda t: setattr(t[3].transform_net, "forward", lambda inputs, context: torch.ones(BATCH, 6).double()))
    same(2, 3)
    both(lambda t: t.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in t.state_dict().items()}))
    same(2, 3)
    both(lambda t: t.train())
    calls.clear()
    torch.manual_seed(1)
    got = made.log_prob(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, own.log_prob(x), **TOLERANCE)
    assert calls == [2, 2]
    both(lambda t: t.eval())
    same(2, 3)


def test_an_act_norm_starts_in_the_first_step(calls: list[int]) -> None:
    own = flow(*layered("spline", None), T.ActNorm(DIM), T.LULinear(DIM)).train()
    own._transform._transforms[4].initialized.fill_(False)
    fast, (x, _) = copy.deepcopy(own), data(None)
    iin_fast.accelerate(fast)
    for wanted in ([4, 1], [6]):
        calls.clear()
        torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)
        assert calls == wanted


@pytest.mark.parametrize("place", ["net", "layer", "inner", "parametrized"])
def test_hooks_and_parametrizations_keep_a_layer_out(place: str, calls: list[int]) -> None:
    made = flow(*layered("masked affine", None), T.LULinear(DIM), *layered("spline", None))
    own, (x, _), seen = copy.deepcopy(made), data(None), []
    iin_fast.accelerate(made)
    made.log_prob(x)
    assert calls == [9]
    for model in (own, made):
        layer = model._transform._transforms[3]
        if place == "parametrized":
            nn.utils.parametrizations.weight_norm(layer.transform_net.final_layer)
            continue
        target = {"net": layer.transform_net, "layer": layer, "inner": layer.transform_net.blocks[1].dropout}[place]
        handle = target.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    calls.clear()
    torch.testing.assert_close(made.log_prob(x), own.log_prob(x), **TOLERANCE)
    assert calls == [3, 5]
    if place != "parametrized":
        assert len(seen) == 2
        handle.remove()
        calls.clear()
        made.log_prob(x)
        assert calls == [9]


def test_a_hook_on_all_modules_runs_the_library_s_code(calls: list[int]) -> None:
    made, (x, _), seen = flow(*layered("spline", None)), data(None), []
    iin_fast.accelerate(made)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    made.log_prob(x)
    handle.remove()
    assert seen and not calls
    made.log_prob(x)
    assert calls == [4]


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    "change",
    [
        lambda x, c: (x.detach().float(), c),
        lambda x, c: (x[:, :4], c),
        lambda x, c: (x[0], c),
        lambda x, c: (x, c[:, :2]),
        lambda x, c: (x, c[:3]),
        lambda x, c: (x, None),
        lambda x, c: (x, c.detach().float()),
        lambda x, c: (x[:0], c[:0]),
        lambda x, c: (x.detach().numpy().tolist(), c),
        lambda x, c: (x.to("meta"), c),
    ],
)
def test_errors_are_the_library_s(change: Callable[[Tensor, Tensor], Any]) -> None:
    own, inputs = flow(*layered("spline", CONTEXT)), data(CONTEXT)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    changed = change(*inputs)
    for call in (lambda model: model._transform(*changed), lambda model: model._transform.inverse(*changed)):
        outcomes = []
        for model in (own, fast):
            try:
                outcomes.append([value.shape for value in call(model)])
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


def test_a_type_that_changes_in_place_is_seen(calls: list[int]) -> None:
    own, (x, _) = flow(*layered("masked affine", None)), data(None)
    fast = copy.deepcopy(own)
    iin_fast.accelerate(fast)
    fast.log_prob(x)
    for model in (own, fast):
        model.float()
    single = x.detach().float()
    torch.testing.assert_close(fast.log_prob(single), own.log_prob(single), rtol=1e-4, atol=1e-4)
    assert calls == [4, 4]
    for model in (own, fast):
        with pytest.raises(RuntimeError, match="dtype"):
            model.log_prob(x)


def test_function_transforms_autocast_and_compile_run_the_library_s_code(calls: list[int]) -> None:
    own, (x, _) = flow(*layered("affine", None)), data(None)
    fast, x = copy.deepcopy(own), x.detach()
    iin_fast.accelerate(fast)
    for call in (
        lambda m: torch.func.vmap(torch.func.jacrev(lambda row: m._transform(row[None])[0][0]))(x),
        lambda m: torch.func.jvp(lambda v: m._transform(v)[0], (x,), (torch.ones_like(x),))[1],
        lambda m: torch.func.functional_call(m._transform, {k: 2 * v for k, v in m._transform.named_parameters()}, x)[
            0
        ],
    ):
        torch.testing.assert_close(call(fast), call(own), **TOLERANCE)
    with torch.autocast("cpu"):
        assert fast.float()._transform(x.float())[0].shape == x.shape
    assert calls == [4], "functional_call alone can be followed"


def test_compiled_models_are_traced_as_before() -> None:
    own, (x, _) = flow(*layered("affine", None)), data(None)
    fast, x = copy.deepcopy(own), x.detach()
    iin_fast.accelerate(fast)
    for call in (lambda m, x: m.log_prob(x), lambda m, x: m._transform.inverse(x)[0]):
        found = torch.compile(lambda x, call=call: call(fast, x), backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(found, call(own, x), **TOLERANCE)


def test_entering_a_patch_parses_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    registry._digest.cache_clear()
    monkeypatch.setattr(registry, "_source", None)
    with iin_fast.patch("nflows") as patched:
        assert not patched.report.left


def test_functional_call_has_the_gradients_of_its_own_parameters() -> None:
    made, (x, _) = flow(*layered("masked affine", None)), data(None)
    iin_fast.accelerate(made)
    for scale in (1.0, 2.0):
        given = {k: (scale * v.detach()).requires_grad_() for k, v in made._transform.named_parameters()}
        torch.func.functional_call(made._transform, given, x)[1].sum().backward()
        assert any(v.grad is not None and bool(v.grad.any()) for v in given.values())
    assert all(p.grad is None for p in made.parameters())


# ---------------------------------------------------------------- life


def test_copies_pickles_and_restore(calls: list[int]) -> None:
    made, (x, _) = flow(*layered("masked spline", None)), data(None)
    classes, wanted = [type(m) for m in made.modules()], made.log_prob(x)
    iin_fast.accelerate(made)
    made.log_prob(x)
    twin = copy.deepcopy(made)
    torch.testing.assert_close(twin.log_prob(x), wanted, **TOLERANCE)
    assert calls == [4, 4]
    with torch.no_grad():
        twin._transform._transforms[3].transform_net.final_layer.weight.mul_(2)
    assert not torch.allclose(twin.log_prob(x), wanted)
    torch.testing.assert_close(made.log_prob(x), wanted, **TOLERANCE)
    opened = pickle.loads(pickle.dumps(made))
    assert [type(m) for m in opened.modules()] == classes
    iin_fast.restore(made)
    assert [type(m) for m in made.modules()] == classes
    calls.clear()
    assert torch.equal(made.log_prob(x), wanted) and not calls


def test_patch_runs_programs(calls: list[int]) -> None:
    made, (x, _) = flow(*layered("spline", None)), data(None)
    wanted = made.log_prob(x)
    with iin_fast.patch("nflows"):
        torch.testing.assert_close(made.log_prob(x), wanted, **TOLERANCE)
        assert calls == [4]
    assert torch.equal(made.log_prob(x), wanted) and calls == [4]


def test_an_optimizer_made_before_trains_the_same() -> None:
    x, runs = torch.randn(40, DIM), []
    for fast in (False, True):
        torch.manual_seed(1)
        model = flow(*layered("spline", None), dtype=torch.float32).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        if fast:
            iin_fast.accelerate(model)
        for _ in range(5):
            optimizer.zero_grad()
            loss = -model.log_prob(x).mean()
            loss.backward()
            optimizer.step()
        runs.append(loss.item())
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


def test_a_model_is_freed() -> None:
    import gc
    import weakref

    made, (x, _) = flow(*layered("masked affine", None)), data(None)
    iin_fast.accelerate(made)
    made.log_prob(x)
    lone = T.MaskedAffineAutoregressiveTransform(DIM, 8).double()
    iin_fast.accelerate(lone)
    lone(x)
    cyclic = flow(*layered("masked affine", None), spline(None))
    cyclic.square = MethodType(lambda self, x: x * x, cyclic)
    for block in cyclic._transform._transforms[4].transform_net.blocks:
        block.activation = cyclic.square
    iin_fast.accelerate(cyclic)
    cyclic.log_prob(x)
    refs = [weakref.ref(made), weakref.ref(made._transform), weakref.ref(lone), weakref.ref(cyclic)]
    del made, lone, cyclic, block
    gc.collect()
    assert not any(ref() for ref in refs)


@pytest.mark.skipif(not has("sbi"), reason="sbi is not installed")
@pytest.mark.parametrize("name", ["build_maf", "build_nsf", "build_maf_rqs"])
@pytest.mark.parametrize("features", [1, 4])
def test_estimators_of_sbi(name: str, features: int, calls: list[int]) -> None:
    from sbi.neural_nets import net_builders

    x, context = 3 * torch.randn(30, features) + 1, torch.randn(30, 7)
    if features == 1 and name != "build_nsf":
        pytest.skip("sbi's masked nets warn about one feature")
    own = spread(getattr(net_builders, name)(x, context, hidden_features=10, num_transforms=2), 0.2)
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    assert not report.left, str(report)
    (wanted, got) = (m.loss(x, context) for m in (own, fast))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert calls == [3 if features == 1 else 5]
    for model in (own, fast):
        model.zero_grad()
        model.loss(x, context).mean().backward()
    for a, b in zip(own.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4)
    drawn = []
    for model in (own, fast):
        torch.manual_seed(2)
        drawn.append(model.sample((5,), context[:2]))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=1e-3)


def test_the_source_of_every_class_is_known() -> None:
    """Else a class would be left out of programs without a word."""
    from iin_fast.dropin.library import LIBRARIES

    for library in LIBRARIES.values():
        if library.programs is not None and has(library.package):
            for name, functions in library.programs.functions.items():
                cls = registry.lookup(name)
                if cls is not None:
                    assert registry.unknown_functions(name, cls, functions) is None, name


def test_a_class_that_was_changed_at_run_time_is_in_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    own = T.LULinear.forward_no_cache
    monkeypatch.setattr(T.LULinear, "forward_no_cache", lambda self, inputs: own(self, inputs))
    report = iin_fast.accelerate(flow(T.LULinear(DIM), *layered("affine", None)))
    assert "not known" in report.left[0].why or "changed at run time" in report.left[0].why


def test_a_net_that_is_a_function_cuts_a_program(calls: list[int]) -> None:
    own, (x, _) = flow(*layered("LU", None)), data(None)
    own._transform._transforms.append(
        T.AffineCouplingTransform(MASK, lambda i, o: lambda x, context=None: x[:, :1].expand(-1, o))
    )
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    assert "a function, expected a module" in str(report)
    torch.testing.assert_close(fast.log_prob(x), own.log_prob(x), **TOLERANCE)
    assert calls == [4]
