"""What accelerate, restore, patch and unpatch keep, refuse and report."""

import copy
import importlib
import io
import pickle
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import standin
import torch
from cases import Net, has, spread
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import iin_fast
from iin_fast.dropin import registry, sources, stacks
from iin_fast.dropin.class_factory import original
from iin_fast.dropin.replace import _holders, _patched
from iin_fast.ops.flow_program import engine

nflows = pytest.importorskip("nflows.transforms")
zuko = pytest.importorskip("zuko")

REPLACE = importlib.import_module("iin_fast.dropin.replace")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry, "AFFINE_DEVICES", ("cpu",))
    monkeypatch.setattr(stacks, "ROWS", 0)
    yield
    assert not _patched and not _holders, "a test left a library patched"


def affine() -> nn.Module:
    return nflows.AffineCouplingTransform([1, 0, 1], Net)


def model() -> nn.Module:
    torch.manual_seed(0)
    spline = nflows.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0], Net, num_bins=4, tails="linear")
    return nflows.CompositeTransform([affine(), spline])


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    standin.install(monkeypatch)
    torch.manual_seed(0)
    made = spread(standin.EfficientVRNVP(6, 3, 70, 1).double(), 0.2)
    with torch.no_grad():
        made(torch.randn(20, 6, dtype=torch.float64))
    return made


def ops_called(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    calls: list[str] = []
    if name == "flow":  # on a CPU a program of the engine
        run = engine.call
        monkeypatch.setattr(engine, "call", lambda *args: (calls.append(name), run(*args))[1])
        return calls
    module = importlib.import_module(f"iin_fast.ops.{name}")
    call = module._calls["cpp"]
    monkeypatch.setitem(module._calls, "cpp", lambda *args: (calls.append(name), call(*args))[1])
    return calls


def test_training_goes_the_same_way() -> None:
    x = torch.randn(30, 3)
    runs = []
    for fast in (False, True):
        flow = model()
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        if fast:
            iin_fast.accelerate(flow)  # after the optimizer was made
        for _ in range(5):
            z, logdet = flow(x)
            loss = (0.5 * z.square().sum(1) - logdet).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs.append((loss.item(), [p.detach().clone() for p in flow.parameters()]))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-4)
    for before, after in zip(*(parameters for _, parameters in runs), strict=True):
        assert torch.allclose(before, after, atol=1e-3)


def test_hooks_mode_and_state_stay() -> None:
    flow = model().eval()
    seen = []
    flow._transforms[0].register_forward_hook(lambda *a: seen.append("block"))
    flow._transforms[0].transform_net.register_forward_pre_hook(lambda *a: seen.append("net"))
    state = {key: value.clone() for key, value in flow.state_dict().items()}
    iin_fast.accelerate(flow)
    flow(torch.randn(4, 3))
    assert seen == ["net", "block"]
    assert not any(module.training for module in flow.modules())
    assert all(module.training for module in flow.train().modules())
    assert all(torch.equal(flow.state_dict()[key], value) for key, value in state.items())
    model().load_state_dict(flow.state_dict(), strict=True)


def test_deepcopy_stays_fast_and_pickle_holds_the_own_classes() -> None:
    flow, x = model(), torch.randn(4, 3)
    iin_fast.accelerate(flow)
    twin = copy.deepcopy(flow)
    assert [type(m) for m in twin.modules()] == [type(m) for m in flow.modules()]
    assert original(type(twin._transforms[1])) is nflows.PiecewiseRationalQuadraticCouplingTransform
    assert torch.equal(twin(x)[0], flow(x)[0])
    data = io.BytesIO()
    torch.save(flow, data)
    data.seek(0)
    opened = torch.load(data, weights_only=False)
    assert type(opened._transforms[1]) is nflows.PiecewiseRationalQuadraticCouplingTransform
    assert torch.allclose(opened(x)[0], flow(x)[0], atol=1e-5)


def test_zuko_module_can_be_copied_and_pickled() -> None:
    flow, x = zuko.flows.NSF(3, transforms=1), torch.randn(4, 3)
    iin_fast.accelerate(flow)

    def univariate(of: Any) -> Any:  # a partial since zuko 1.5
        found = of.transform.transforms[0].univariate
        return getattr(found, "func", found)

    assert original(univariate(copy.deepcopy(flow))) is zuko.transforms.MonotonicRQSTransform
    opened = pickle.loads(pickle.dumps(flow))
    assert univariate(opened) is zuko.transforms.MonotonicRQSTransform
    assert torch.allclose(opened().log_prob(x), flow().log_prob(x), atol=1e-4)
    assert "MonotonicRQSTransform(bins=8)" in repr(flow)


def test_twice_is_once_and_restore_undoes_it() -> None:
    flow = model()
    classes = [type(m) for m in flow.modules()]
    assert len(iin_fast.accelerate(flow).replaced) == 2
    again = iin_fast.accelerate(flow)
    assert [line.why for line in again.replaced] == ["already"] * 2 and not again.left
    iin_fast.restore(flow)
    iin_fast.restore(flow)
    assert [type(m) for m in flow.modules()] == classes


class Doubled(nflows.AffineCouplingTransform):
    """A user's coupling with another scale."""

    def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = super()._scale_and_shift(transform_params)
        return 2 * scale, shift


def test_subclasses_are_left_alone() -> None:
    flow, x = Doubled([1, 0, 1], Net), torch.randn(5, 3)
    before = flow(x)
    report = iin_fast.accelerate(flow)
    assert not report.replaced and report.left[0].why == "a subclass of AffineCouplingTransform"
    assert report.left[0].name.endswith("Doubled") and type(flow) is Doubled
    with iin_fast.patch("nflows"):
        assert all(torch.equal(a, b) for a, b in zip(flow(x), before, strict=True))


def test_what_is_derived_from_an_accelerated_class_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper that it overrides counts; reports, restore and pickle leave it what it is."""
    base = affine()
    iin_fast.accelerate(base)

    class Derived(type(base)):  # type: ignore[misc]
        def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift = super()._scale_and_shift(transform_params)
            return 2 * scale, shift

    Derived.__qualname__ = "Derived"
    monkeypatch.setattr(sys.modules[__name__], "Derived", Derived, raising=False)
    torch.manual_seed(0)
    flow, x = Derived([1, 0, 1], Net), torch.randn(5, 3)
    torch.manual_seed(0)
    wanted = Doubled([1, 0, 1], Net)(x)
    assert all(torch.equal(a, b) for a, b in zip(flow(x), wanted, strict=True))
    report = iin_fast.accelerate(flow)
    assert not report.replaced and report.left[0].why == "derived from an accelerated class"
    iin_fast.restore(flow)
    assert type(flow) is Derived and type(pickle.loads(pickle.dumps(flow))) is Derived


class Half(nn.Module):
    """A parametrization: half of what is stored."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored / 2


def test_a_parametrized_module_stays_fast_and_is_restored_after_it(
    stack: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, x = ops_called(monkeypatch, "affine_coupling"), torch.randn(9, 6, dtype=torch.float64)
    own = copy.deepcopy(stack)
    iin_fast.accelerate(stack)
    for model in (own, stack):
        parametrize.register_parametrization(model.flow[1].flow[0], "loc", Half())
    wanted, calls[:] = own(x)[0], []
    assert torch.allclose(stack(x)[0], wanted, atol=1e-9) and calls
    again = iin_fast.accelerate(stack)
    assert not again.left and {line.why for line in again.replaced} == {"already"}
    with pytest.raises(RuntimeError, match=r"restore: flow.1.flow.0 is a ParametrizedVectorActNorm.* remove its"):
        iin_fast.restore(stack)
    assert original(type(stack)) is standin.EfficientVRNVP, "an error changed something"
    assert torch.allclose(stack(x)[0], wanted, atol=1e-9)
    parametrize.remove_parametrizations(stack.flow[1].flow[0], "loc")
    iin_fast.restore(stack)
    assert type(stack.flow[1].flow[0]) is standin.VectorActNorm and torch.allclose(stack(x)[0], wanted, atol=1e-9)


def test_a_sharded_module_stays_fast_and_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = model(), torch.randn(4, 3)
    wanted = flow(x)
    iin_fast.accelerate(flow)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        fully_shard(flow._transforms[0], mesh=init_device_mesh("cpu", (1,)))
        sharded = type(flow._transforms[0])
        calls = ops_called(monkeypatch, "affine_coupling")
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(flow(x), wanted, strict=True)) and calls
        assert [line.why for line in iin_fast.accelerate(flow).lines] == ["already"] * 2
        with pytest.raises(RuntimeError, match="is a FSDPAffineCouplingTransform.* restore before fully_shard"):
            iin_fast.restore(flow)
        assert type(flow._transforms[0]) is sharded
        assert original(type(flow._transforms[1])), "an error changed something"
    finally:
        torch.distributed.destroy_process_group()


def test_a_method_of_the_instance_is_left_alone() -> None:
    flow = affine()
    flow._coupling_transform_forward = lambda inputs, transform_params: (inputs, inputs.sum(1))  # type: ignore[method-assign]
    report = iin_fast.accelerate(flow)
    assert report.left[0].why == "the instance has its own _coupling_transform_forward"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tails": "linear", "tail_bound": torch.tensor(1.0)}, "tail_bound is a Tensor"),
        ({"tails": "lineal"}, "tails='lineal'"),
        ({"tails": "linear", "num_bins": 4, "min_bin_width": 0.3}, "min_bin_width=0.3"),
        ({"tails": "linear", "min_derivative": -0.1}, "min_derivative=-0.1"),
    ],
)
def test_unknown_options_are_left_alone(options: dict[str, Any], why: str) -> None:
    flow = nflows.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0], Net, **options)
    assert iin_fast.accelerate(flow).left[0].why == why


def test_an_option_that_changes_later_is_seen() -> None:
    flow = nflows.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0], Net, num_bins=4, tails="linear")
    iin_fast.accelerate(flow)
    flow.tails = "other"
    with pytest.raises(RuntimeError, match="other tails are not implemented"):
        flow(torch.randn(3, 3))


def test_transforms_without_a_faster_form_are_reported() -> None:
    flow = nflows.CompositeTransform([nflows.Sigmoid(), nflows.NaiveLinear(3)])
    report = iin_fast.accelerate(nn.ModuleDict({"flow": flow, "net": nn.Linear(3, 3)}))
    assert [(line.path, line.why) for line in report.left] == [
        ("flow._transforms.0", "in no program: Sigmoid has no place in a program"),
        ("flow._transforms.1", "in no program: NaiveLinear has no place in a program"),
    ]


@pytest.mark.skipif(not has("FrEIA"), reason="FrEIA is not installed")
def test_additive_blocks_of_freia_are_recognised_and_left() -> None:
    from FrEIA.modules import NICECouplingBlock

    block, x = NICECouplingBlock([(5,)], subnet_constructor=Net), torch.randn(4, 5)
    before = block([x])[0][0]
    report, name = iin_fast.accelerate(block), "FrEIA.modules.coupling_layers.NICECouplingBlock"
    assert [(line.name, line.replaced, line.why) for line in report.lines] == [
        (name, False, "one addition; nothing to fuse")
    ]
    assert type(block) is NICECouplingBlock and torch.equal(block([x])[0][0], before)
    with iin_fast.patch("freia") as patched:
        assert name in {line.name for line in patched.report.left}
        assert torch.equal(block([x])[0][0], before)


def test_report_reads_well() -> None:
    flow = nn.ModuleList([affine(), affine(), Doubled([1, 0, 1], Net)])
    lines = str(iin_fast.accelerate(flow)).splitlines()
    assert lines[0].split() == ["count", "class"]
    assert lines[1].split() == ["2", "nflows.transforms.coupling.AffineCouplingTransform", "replaced"]
    assert lines[2].endswith("test_dropin.Doubled" + lines[2].split("Doubled")[1]) and "a subclass of" in lines[2]
    assert str(iin_fast.accelerate(nn.Linear(2, 2))) == "nothing of a known library found"


def test_an_unknown_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "nflows.transforms.coupling.AffineCouplingTransform"
    monkeypatch.setitem(sources.SOURCES, name, ("0",))
    assert "a version of its source that is not known" in iin_fast.accelerate(affine()).left[0].why
    with iin_fast.patch("nflows") as patched:
        left = {line.name: line.why for line in patched.report.left}
        assert "not known" in left[name] and len(patched.report.left) == 1


def test_a_class_that_was_changed_at_run_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = nflows.AffineCouplingTransform._coupling_transform_forward
    monkeypatch.setattr(
        nflows.AffineCouplingTransform, "_coupling_transform_forward", lambda self, *a, **k: own(self, *a, **k)
    )
    assert not iin_fast.accelerate(affine()).replaced


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_run_the_own_code(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = ops_called(monkeypatch, "affine_coupling")
    flow, x = affine().to(dtype), torch.randn(4, 3, dtype=dtype)
    before = flow(x)
    iin_fast.accelerate(flow)
    assert all(torch.equal(a, b) for a, b in zip(flow(x), before, strict=True)) and not calls
    assert before[0].dtype == dtype


def test_function_transforms_and_forward_mode_run_the_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = affine().double(), torch.randn(4, 3, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.jacrev(lambda row: flow(row[None])[0][0]))(x)
    iin_fast.accelerate(flow)
    assert torch.allclose(torch.func.vmap(torch.func.jacrev(lambda row: flow(row[None])[0][0]))(x), expected)
    assert torch.allclose(torch.func.vmap(torch.func.jacfwd(lambda row: flow(row[None])[0][0]))(x), expected)


@pytest.mark.parametrize("how", ["accelerate", "patch"])
def test_affine_layers_alone_run_the_own_code_on_the_cpu(
    how: str, stack: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "AFFINE_DEVICES", ("cuda",))
    calls, x = ops_called(monkeypatch, "affine_coupling"), torch.randn(4096, 6)
    norm, flow = stack.flow[0].flow[0].float(), nflows.AffineCouplingTransform([1, 0] * 3, Net)
    for module, name in ((norm, "iin"), (flow, "nflows")):
        cls, wanted = type(module), module(x)
        if how == "accelerate":
            report = iin_fast.accelerate(module)
            assert report.left[0].why == "alone on the CPU a fused op gains nothing" and type(module) is cls
            found = module(x)
        else:
            with iin_fast.patch(name):
                found = module(x)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and not calls


def test_compiles_into_one_graph() -> None:
    flow, x = model(), torch.randn(6, 3)
    want = flow(x)
    iin_fast.accelerate(flow)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x), want, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_domain_errors_stay() -> None:
    flow = nflows.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0], Net, num_bins=4)
    iin_fast.accelerate(flow)
    with pytest.raises(nflows.InputOutsideDomain):
        flow(torch.full((2, 3), 1.5))


def test_arguments_are_checked() -> None:
    for function in (iin_fast.accelerate, iin_fast.restore):
        with pytest.raises(TypeError, match="model is a list, expected a torch.nn.Module"):
            function([affine()])
    with pytest.raises(ValueError, match="no library given"):
        iin_fast.patch()
    for function in (iin_fast.patch, iin_fast.unpatch):
        with pytest.raises(ValueError, match="library is 'pyro', expected one of nflows, glasflow"):
            function("pyro")


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nflows.transforms", None)
    with pytest.raises(ImportError, match="pip install nflows"):
        iin_fast.patch("nflows")


def test_patch_holds_for_all_models_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = ops_called(monkeypatch, "affine_coupling")
    own = dict(vars(nflows.AffineCouplingTransform))
    old, x = affine(), torch.randn(4, 3)
    before = old(x)
    with iin_fast.patch("nflows", "zuko"):
        assert torch.allclose(old(x)[0], before[0], atol=1e-6)
        affine()(x)
        assert len(calls) == 2
        with iin_fast.patch("nflows"):
            pass
        old(x)
        assert len(calls) == 3, "the inner context ended the outer patch"
        report = iin_fast.accelerate(old)
        assert report.replaced[0].why == "by patch" and type(old) is nflows.AffineCouplingTransform
    assert dict(vars(nflows.AffineCouplingTransform)) == own
    assert torch.equal(old(x)[0], before[0]) and len(calls) == 3


def test_patch_as_a_call() -> None:
    own = vars(zuko.transforms.MonotonicRQSTransform)["__init__"]
    iin_fast.patch("zuko", "nflows")
    assert vars(zuko.transforms.MonotonicRQSTransform)["__init__"] is not own
    iin_fast.unpatch("zuko")
    assert vars(zuko.transforms.MonotonicRQSTransform)["__init__"] is own and _patched
    iin_fast.unpatch()
    iin_fast.unpatch()


def patched() -> bool:
    return hasattr(nflows.AffineCouplingTransform._coupling_transform_forward, "__wrapped__")


def test_overlapping_blocks_hold_until_the_last_one_ends() -> None:
    first, second = iin_fast.patch("nflows", "zuko"), iin_fast.patch("nflows")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert patched() and not any(cls.__module__.startswith("zuko") for cls in _patched)
    second.__exit__(None, None, None)
    assert not patched()


def test_a_block_can_be_entered_anew_and_inside_of_itself() -> None:
    again = iin_fast.patch("nflows")
    for _ in range(2):
        with again:
            with again:
                assert patched()
            assert patched(), "the inner block ended the outer one"
        assert not patched()


def test_a_call_inside_of_a_block_stays_until_unpatch() -> None:
    with iin_fast.patch("nflows"):
        iin_fast.patch("nflows")
    assert patched()
    with iin_fast.patch("nflows"):
        pass
    assert patched()
    with iin_fast.patch("nflows") as block:
        iin_fast.unpatch("nflows")
        assert not patched()
        with block:
            assert patched()
    assert not patched()


def test_an_exception_ends_the_block() -> None:
    with pytest.raises(KeyError), iin_fast.patch("nflows"):
        raise KeyError
    assert not patched()


def test_threads_leave_nothing_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step waits, so that the threads meet at every one of them."""
    for name in ("_patch", "_unpatch"):
        step = getattr(REPLACE, name)
        monkeypatch.setattr(REPLACE, name, lambda *args, step=step: (time.sleep(5e-4), step(*args)))
    own, count, rounds = dict(vars(nflows.AffineCouplingTransform)), 3, 10
    barrier, seen = Barrier(count), []

    def work() -> None:
        for _ in range(rounds):
            barrier.wait()
            with iin_fast.patch("nflows"):
                seen.append(patched())

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()
    assert all(seen) and len(seen) == rounds * count
    assert dict(vars(nflows.AffineCouplingTransform)) == own


def test_patch_before_the_library_is_imported() -> None:
    code = """
        import sys, iin_fast
        assert "nflows" not in sys.modules
        with iin_fast.patch("nflows"):
            from nflows.transforms import AffineCouplingTransform as T
            inside = T._coupling_transform_forward
        assert inside is not T._coupling_transform_forward and inside.__wrapped__ is T._coupling_transform_forward
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_zuko_objects_outlive_the_patch() -> None:
    raw = [torch.randn(4, 3, n) for n in (5, 5, 4)]
    own, x = zuko.transforms.MonotonicRQSTransform(*raw), torch.randn(4, 3)
    with iin_fast.patch("zuko"):
        fast = zuko.transforms.MonotonicRQSTransform(*raw)
        assert isinstance(fast, zuko.transforms.MonotonicRQSTransform)
    twin = pickle.loads(pickle.dumps(fast))
    assert type(twin) is zuko.transforms.MonotonicRQSTransform
    for other in (fast, copy.deepcopy(fast), twin):
        assert torch.allclose(other(x), own(x), atol=1e-5) and torch.allclose(other.inv(own(x)), x, atol=1e-4)
    for name in ("horizontal", "vertical", "derivatives"):
        assert torch.equal(getattr(fast, name), getattr(own, name))
    assert fast.bins == 5


def test_patch_reaches_transformations_that_a_function_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function names the class, where accelerate can't put another."""

    def halved(*raw: Tensor) -> Any:
        return zuko.transforms.MonotonicRQSTransform(*raw, bound=2.5)

    calls = ops_called(monkeypatch, "spline_coupling")
    flow = zuko.flows.MAF(3, transforms=2, univariate=halved, shapes=[(4,), (4,), (3,)]).double()
    x = 3 * torch.rand(6, 3, dtype=torch.float64)
    assert iin_fast.accelerate(flow).left[0].name.endswith("univariate = halved")
    before = flow().log_prob(x)
    assert not calls
    with iin_fast.patch("zuko"):
        assert torch.allclose(flow().log_prob(x), before, rtol=1e-10)
    assert calls


def test_accelerated_models_outlive_a_patch() -> None:
    flow, x = model(), torch.randn(4, 3)
    iin_fast.accelerate(flow)
    with iin_fast.patch("nflows"):
        inside = flow(x)[0]
        assert len(iin_fast.accelerate(flow).replaced) == 2
    assert torch.equal(flow(x)[0], inside)


def test_stack_of_stand_ins_is_one_op_and_equal(stack: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)

    def results() -> list[Tensor]:
        y, logdet = stack(x)
        back, nothing = stack(y.detach(), reverse=True)
        assert nothing is None
        grads = torch.autograd.grad((y.square().sum() + logdet.sum() + back.sin().sum()), [x, *stack.parameters()])
        return [y, logdet, back, *grads]

    before = results()
    parameters = list(stack.parameters())
    calls = ops_called(monkeypatch, "flow")
    report = iin_fast.accelerate(stack)
    assert (
        report.replaced[0].why.startswith("as one op, on a CPU from batches of 128 on") and len(report.replaced) == 10
    )
    for got, want in zip(results(), before, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    assert len(calls) == 2
    assert all(now is then for now, then in zip(stack.parameters(), parameters, strict=True))


def test_stack_sees_every_change_of_its_modules(stack: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = copy.deepcopy(stack), torch.randn(9, 6, dtype=torch.float64)
    iin_fast.accelerate(stack)
    calls = ops_called(monkeypatch, "flow")

    def same(fused: bool = True) -> None:
        calls.clear()
        with torch.no_grad():
            assert torch.allclose(stack(x)[0], own(x)[0], rtol=1e-9, atol=1e-9)
        assert bool(calls) == fused

    same()
    for model in (stack, own):  # in place, as an optimizer does
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    same()
    for model in (stack, own):  # a Parameter of another identity
        linear = model.flow[1].flow[1].s[0].main[0]
        linear.weight = nn.Parameter(torch.ones_like(linear.weight))
    same()
    for model in (stack, own):  # another shuffle
        model.flow[0].flow[2].forward_shuffle_idx.copy_(torch.arange(5, -1, -1))
    same()
    for model in (stack, own):  # another activation
        model.flow[0].flow[1].s[0].main[1] = nn.ReLU()
    same(fused=False)
    for model in (stack, own):
        model.flow[0].flow[1].s[0].main[1] = nn.LeakyReLU()
    same()
    usual = type(stack.flow[1].flow[1].t[1])

    class Half(usual):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * usual.forward(self, x)

    for model in (stack, own):  # a net of another class
        model.flow[1].flow[1].t[1].__class__ = Half
    same(fused=False)
    for model in (stack, own):  # one with a forward of its own
        net = model.flow[1].flow[1].t[1]
        net.__class__ = usual
        net.forward = partial(Half.forward, net)
    same(fused=False)
    for model in (stack, own):
        del model.flow[1].flow[1].t[1].forward
    same()
    for model in (stack, own):  # ActNorm is to start anew
        model.flow[2].flow[0].initialized.zero_()
    same(fused=False)
    same()


def test_two_calls_in_one_loss_and_two_backward_passes(stack: nn.Module) -> None:
    own, x = copy.deepcopy(stack), torch.randn(2, 9, 6, dtype=torch.float64)
    iin_fast.accelerate(stack)
    for model in (stack, own):
        for loss in (model(x[0])[0].square().sum() + model(x[1])[1].sum(), model(x[1])[0].sin().sum()):
            loss.backward()
    for got, want in zip(stack.parameters(), own.parameters(), strict=True):
        assert torch.allclose(got.grad, want.grad, rtol=1e-9, atol=1e-9)
    still = stack.flow[0].flow[1].s[0].main[0].weight.requires_grad_(False)
    still.grad = None
    stack(x[0])[0].sum().backward()
    assert still.grad is None


@pytest.mark.parametrize("frozen", [False, True])
def test_a_stack_sees_what_torch_does_not_count_unless_frozen(stack: nn.Module, frozen: bool) -> None:
    own, x = copy.deepcopy(stack), torch.randn(9, 6, dtype=torch.float64)
    iin_fast.accelerate(stack, frozen=frozen)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(stack(x)[0], own(x)[0], atol=1e-9)
            stack.flow[0].flow[1].t[0].main[0].weight.data.mul_(2)
            own.flow[0].flow[1].t[0].main[0].weight.data.mul_(2)
            assert torch.allclose(stack(x)[0], own(x)[0], atol=1e-9) != frozen
        stack.flow[0].flow[1].t[0].main[0].weight.detach().mul_(1)  # counted
    iin_fast.restore(stack)
    assert torch.equal(stack(x)[0], own(x)[0])


def test_small_batches_of_a_stack_run_block_by_block_unless_frozen(
    stack: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "ROWS", 10)
    calls = ops_called(monkeypatch, "flow")
    for frozen, wanted, rows, fused in (
        (False, False, 9, False),
        (False, True, 10, True),
        (True, False, 9, True),
        (True, True, 9, False),
    ):
        iin_fast.accelerate(stack, frozen=frozen)
        calls.clear()
        with torch.set_grad_enabled(wanted):
            stack(torch.randn(rows, 6, dtype=torch.float64))
        assert bool(calls) == fused


def test_hooks_inside_a_stack_fire(stack: nn.Module) -> None:
    iin_fast.accelerate(stack)
    x, seen = torch.randn(9, 6, dtype=torch.float64), []
    stack(x)
    handle = stack.flow[1].flow[1].t[1].main[2].register_forward_hook(lambda *a: seen.append(1))
    stack(x)
    assert seen == [1]
    handle.remove()
    stack(x)
    assert seen == [1]


def test_stack_under_patch_and_restore(stack: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9, 6, dtype=torch.float64)
    before = stack(x)[0]
    calls = ops_called(monkeypatch, "flow")
    with iin_fast.patch("iin"):
        assert torch.allclose(stack(x)[0], before, atol=1e-9) and len(calls) == 1
    iin_fast.accelerate(stack)
    iin_fast.restore(stack)
    assert torch.equal(stack(x)[0], before) and len(calls) == 1


@pytest.mark.skipif(not has("normflows"), reason="normflows is not installed")
def test_masks_that_are_not_binary_are_left_alone() -> None:
    import normflows as nf

    flow = nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0.5, 0]), Net(3, 3), Net(3, 3))
    assert iin_fast.accelerate(flow).left[0].why == "a mask with values other than 0 and 1"
    flow.b.copy_(torch.tensor([1.0, 0, 0]))
    assert iin_fast.accelerate(flow).replaced
    x = torch.randn(4, 3)
    flow.b.copy_(torch.tensor([1.0, 0.5, 0]))
    changed = flow(x)
    iin_fast.restore(flow)
    assert torch.equal(changed[0], flow(x)[0])


@pytest.mark.skipif(not has("normflows"), reason="normflows is not installed")
def test_infinite_scales_become_nan_as_in_normflows() -> None:
    import normflows as nf

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, -torch.inf)

    flow, x = nf.flows.MaskedAffineFlow(torch.tensor([1.0, 0, 0]), None, Broken()), torch.randn(4, 3)
    before = flow(x)
    iin_fast.accelerate(flow)
    for got, want in zip(flow(x), before, strict=True):
        assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()
