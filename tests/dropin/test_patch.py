"""What patch prints, warns of, and does to optimizers."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from cases import has
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import iin_fast
from iin_fast.dropin import registry, sources
from iin_fast.dropin.library import LIBRARIES
from iin_fast.dropin.replace import _holders, _patched, _warned

transforms = pytest.importorskip("nflows.transforms")
zuko = pytest.importorskip("zuko")


@pytest.fixture(autouse=True)
def _clean() -> Any:
    _warned.clear()
    yield
    assert not _patched and not _holders, "a test left something patched"


@pytest.mark.skipif(not has("sbi"), reason="sbi is not installed")
def test_sbi_means_its_backends() -> None:
    with iin_fast.patch("sbi") as patched:
        names = {line.name.split(".")[0] for line in patched.report.replaced}
        assert names == {"nflows", "zuko", "sbi"}
    with pytest.raises(ValueError, match=r"library is 'pyro', expected one of .*zuko.*, sbi"):
        iin_fast.patch("pyro")


def test_patch_prints_its_report() -> None:
    with iin_fast.patch("nflows") as patched:
        assert str(patched) == repr(patched) == str(patched.report)
        assert "nflows.transforms.base.CompositeTransform" in str(patched)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return list(nn.Linear(3, 2).parameters())


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_optimizers_made_in_the_block_are_fused(cls: Any) -> None:
    own = vars(torch.optim.Adam)["__init__"]
    given = parameters()
    with iin_fast.patch("nflows", fused_optimizer=True) as patched:
        assert any("AdamW" in line.name for line in patched.report.replaced)
        with iin_fast.patch("zuko"):
            pass
        made = cls(given, lr=0.1)
        assert made.defaults["fused"] is True and made.param_groups[0]["fused"] is True
        for options in ({"fused": False}, {"foreach": True}, {"differentiable": True}):
            kept = cls(parameters(), **options)
            assert all(kept.defaults[name] == value for name, value in options.items())
            assert kept.defaults["fused"] in (None, False)
        assert cls([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]).defaults["fused"] is None
        assert cls([{"params": parameters()[:1]}, {"params": parameters()[1:], "lr": 1.0}]).param_groups[1]["fused"]
    assert vars(torch.optim.Adam)["__init__"] is own
    wanted = parameters()
    plain = cls(wanted, lr=0.1)
    assert plain.defaults["fused"] is None
    for _ in range(3):
        for optimizer, ps in ((made, given), (plain, wanted)):
            for p in ps:
                p.grad = p.detach().sin()
            optimizer.step()
    for got, want in zip(given, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_without_the_option_optimizers_stay() -> None:
    with iin_fast.patch("nflows"):
        assert torch.optim.Adam(parameters()).defaults["fused"] is None


class OwnAdam(torch.optim.Adam):
    """A user's optimizer."""


def test_a_subclass_of_adam_stays() -> None:
    with iin_fast.patch("nflows", fused_optimizer=True):
        assert OwnAdam(parameters()).defaults["fused"] is None


def unknown(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for table in (sources.SOURCES, sources.PROGRAM_SOURCES):
        for name in [name for name in table if name.startswith(package)]:
            monkeypatch.setitem(table, name, ("0",))


def test_an_unknown_version_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown(monkeypatch, "nflows")
    model = transforms.CompositeTransform([transforms.LULinear(3)])
    text = rf"nothing of nflows was replaced. nflows \S+ is installed; known: {LIBRARIES['nflows'].versions[0]}"
    with pytest.warns(UserWarning, match=f"patch: {text}"), iin_fast.patch("nflows"):
        pass
    with pytest.warns(UserWarning, match=f"accelerate: {text}"):
        iin_fast.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iin_fast.accelerate(model)
        with iin_fast.patch("nflows"):
            pass
        iin_fast.accelerate(nn.Linear(2, 2))


@pytest.mark.parametrize("first", ["AffineCouplingTransform", "AdditiveCouplingTransform"])
def test_additive_couplings_are_taken_whatever_the_order(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One derives from the other, so the source of its methods is looked up while the other is patched."""
    library = LIBRARIES["nflows"]
    order = sorted(library.entries, key=lambda entry: not entry.name.endswith(f".{first}"))
    monkeypatch.setattr(type(library), "by_name", property(lambda self: {entry.name: entry for entry in order}))
    registry._digest.cache_clear()
    with iin_fast.patch("nflows") as patched:
        assert not patched.report.left, str(patched)


def test_a_model_elsewhere_is_not_called_fast() -> None:
    for model, why in (
        (transforms.CompositeTransform([transforms.LULinear(3)]).to("meta"), "torch.float32 on meta"),
        (transforms.CompositeTransform([transforms.LULinear(3)]).half(), "torch.float16 on cpu"),
    ):
        with pytest.warns(UserWarning) if not _warned else warnings.catch_warnings():
            report = iin_fast.accelerate(model)
        assert not report.replaced and why in str(report)


def fingerprint(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "iin_fast.dropin.fingerprint", *names]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_fingerprints_of_a_class() -> None:
    name = "nflows.transforms.base.CompositeTransform"
    made = fingerprint(name)
    assert made.returncode == 0
    for table in ("SOURCES", "PROGRAM_SOURCES"):
        assert f'{table}: "{name}": ("{getattr(sources, table)[name][0]}",),  # known\n' in made.stdout
    assert fingerprint("nflows.transforms.nothing.X").returncode == 1
    if has("glasflow"):  # whose flows rely on a module that they import late, and hold a copy of another library
        made = fingerprint("glasflow.flows.nsf.CouplingNSF", "glasflow.nflows.transforms.lu.LULinear")
        assert made.returncode == 0 and made.stdout.count("# known") == 2, made.stdout
    assert fingerprint().returncode == 2


def made_in_a_block(cls: Any, given: list[nn.Parameter], **options: Any) -> Any:
    with iin_fast.patch("nflows", fused_optimizer=True):
        return cls(given, **options)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.1}, {"lr": torch.tensor(0.1)}], ids=str
)
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_fused_optimizer_steps_as_torch_s(cls: Any, options: dict[str, Any], decoupled: bool) -> None:
    options = {"lr": 0.1} | options
    decay = {"weight_decay": 0.5, "decoupled_weight_decay": decoupled}
    given, wanted, pairs = parameters(), parameters(), []
    for params in (given, wanted):
        options = copy.deepcopy(options)  # the schedule changes a tensor in place
        groups = [{"params": params[:1]}, {"params": params[1:], "betas": (0.5, 0.9), **decay}]
        made = made_in_a_block(cls, groups, **options) if params is given else cls(groups, fused=True, **options)
        pairs.append((made, torch.optim.lr_scheduler.ExponentialLR(made, 0.9)))
    hooks: list[int] = []
    for number in range(8):
        for params, (optimizer, schedule) in zip((given, wanted), pairs, strict=True):
            for p in params:
                p.grad = (p.detach() * (number + 1)).sin()
            if number == 2:
                params[0].grad = None
            if number == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            handle = optimizer.register_step_post_hook(lambda *_: hooks.append(1)) if number == 4 else None
            if number == 5:
                optimizer.step(lambda: torch.tensor(1.0))
            elif number == 6:
                twin = copy.deepcopy(optimizer)
                for group, own in zip(twin.param_groups, optimizer.param_groups, strict=True):
                    for p, of in zip(group["params"], own["params"], strict=True):
                        p.grad = of.grad
                twin.step()
                optimizer.step()
                for group, own in zip(twin.param_groups, optimizer.param_groups, strict=True):
                    for p, of in zip(group["params"], own["params"], strict=True):
                        assert torch.equal(p, of)
            else:
                optimizer.step()
            if handle is not None:
                handle.remove()
            schedule.step()
        for got, want in zip(given, wanted, strict=True):
            assert torch.equal(got, want)
    assert hooks == [1, 1]
    states = [optimizer.state_dict()["state"] for optimizer, _ in pairs]
    for got, want in zip(*(s.values() for s in states), strict=True):
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("asked", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("before", [0, 2])
def test_accelerate_an_optimizer(cls: Any, asked: dict[str, bool], before: int) -> None:
    """Before its first step or after some, in place, to the bits of torch's fused form; and back."""
    given, wanted = parameters(), parameters()
    made, plain = cls(given, lr=0.1, **asked), cls(wanted, lr=0.1, **asked)

    def steps(count: int) -> None:
        for _ in range(count):
            for params, optimizer in ((given, made), (wanted, plain)):
                optimizer.zero_grad()
                assert all(p.grad is None for p in params)
                for p in params:
                    p.grad = p.detach().sin()
                optimizer.step()

    steps(before)
    report = iin_fast.accelerate(made)
    assert [line.replaced for line in report.lines] == [True] and cls.__qualname__ in str(report)
    assert isinstance(made, cls) and type(made) is not cls
    assert iin_fast.accelerate(made).lines[0].why == "already" and not made.param_groups[0]["foreach"]
    for group in plain.param_groups:
        group["fused"] = True
    steps(3)
    assert all(torch.equal(got, want) for got, want in zip(given, wanted, strict=True))
    assert made.state[given[0]]["step"] == 3 + before
    made.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in given if p.grad is not None) and given[0].grad is not None
    iin_fast.restore(made)
    iin_fast.restore(made)
    assert type(made) is cls and made.defaults["fused"] is made.param_groups[0]["fused"] is asked.get("fused")
    steps(1)
    assert made.state[given[0]]["step"] == 4 + before
    for got, want in zip(given, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_gradients_that_lie_in_another_order() -> None:
    """torch's fused kernel takes them for the parameter's order."""
    given, wanted = (nn.Parameter(torch.arange(12.0).view(3, 4)) for _ in range(2))
    turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    made = torch.optim.Adam([given, turned], lr=0.1)
    plain = torch.optim.Adam([wanted, other := nn.Parameter(turned.detach().clone())], lr=0.1)
    iin_fast.accelerate(made)
    for number in range(4):
        for p in (given, wanted):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(number)).t()
        for p in (turned, other):
            p.grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(number))
        made.step()
        plain.step()
        torch.testing.assert_close(given, wanted)
        torch.testing.assert_close(turned, other)


def test_parameters_without_gradients_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """FrEIA's modules hold some that never have one; others have one now and then. Neither needs torch's longer way."""
    pairs = []
    for _ in range(2):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n)) for n in (3, 4, 5)]
        params.append(nn.Parameter(torch.randn(2), requires_grad=False))
        pairs.append((params, torch.optim.Adam(params, lr=0.1, fused=True)))
    (given, made), (wanted, plain) = pairs
    iin_fast.accelerate(made)

    def steps(*missing: int) -> None:
        for params, optimizer in pairs:
            optimizer.zero_grad()
            for number, p in enumerate(params[:3]):
                p.grad = None if number in missing else p.detach().cos()
            optimizer.step()

    steps(1)
    steps()  # the second gets its state
    own: list[int] = []  # calls of torch's longer way
    monkeypatch.setattr(made, "_init_group", lambda *_, **__: own.append(1))
    for missing in ((), (0,), (), (), (1, 2), ()):
        steps(*missing)
        assert all(torch.equal(got, want) for got, want in zip(given, wanted, strict=True))
        for got, want in zip(given[:3], wanted[:3], strict=True):
            assert made.state[got]["step"] == plain.state[want]["step"]
    assert not own and given[3] not in made.state


def test_moments_that_lie_in_another_order() -> None:
    """As after ``model.to(memory_format=torch.channels_last)``, which keeps the state of the optimizer as it lay."""
    torch.manual_seed(0)
    nets = [nn.Conv2d(3, 4, 3)]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    plain, before, after = (torch.optim.Adam(net.parameters(), lr=0.1) for net in nets)
    iin_fast.accelerate(before)

    def steps() -> None:
        for number in range(3):
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(number))
            for net, optimizer in zip(nets, (plain, before, after), strict=True):
                optimizer.zero_grad()
                net(x).square().sum().backward()
                optimizer.step()

    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        for net in nets:
            net.to(memory_format=layout)
        steps()
        iin_fast.accelerate(after)
        steps()
        for net in nets[1:]:
            torch.testing.assert_close(net.weight, nets[0].weight, rtol=1e-4, atol=1e-4)


def test_a_gradient_buffer_of_the_user_stays() -> None:
    """torch's longer way runs at the first step; it too must read what the user writes at the next ones."""
    given, wanted = (nn.Parameter(torch.zeros(6, 4).t()) for _ in range(2))
    pairs = [(p, torch.optim.Adam([p], lr=0.1), torch.zeros(4, 6)) for p in (given, wanted)]
    iin_fast.accelerate(pairs[0][1])
    for number in range(4):
        for p, optimizer, buffer in pairs:
            p.grad = p.grad if number else buffer
            buffer.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(number)))
            optimizer.step()
            assert p.grad is buffer
        torch.testing.assert_close(given, wanted)


def test_a_scaler_takes_its_scale_off_gradients_in_another_order() -> None:
    found = []
    for fast in (True, False):
        p = nn.Parameter(torch.arange(12.0).view(3, 4))
        optimizer = torch.optim.Adam([p], lr=0.1, fused=fast)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        if fast:
            iin_fast.accelerate(optimizer)
        for number in range(3):
            buffer = torch.randn(4, 3, generator=torch.Generator().manual_seed(number)).t()
            scaler.scale(torch.zeros((), requires_grad=True)).backward()
            p.grad = 4 * buffer
            scaler.step(optimizer)
            scaler.update()
            assert p.grad is not None
            torch.testing.assert_close(p.grad, buffer)
        found.append(p.detach())
    torch.testing.assert_close(*found)


def test_a_hook_may_take_a_gradient_away() -> None:
    p = nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.Adam([p], fused=True)
    iin_fast.accelerate(optimizer)
    optimizer.register_step_post_hook(lambda made, *_: made.zero_grad())
    p.grad = torch.ones(4, 3).t()
    optimizer.step()
    assert p.grad is None


@pytest.mark.parametrize("schedule", ["before", "after"])
def test_a_schedule_follows_its_optimizer(schedule: str) -> None:
    given, plain = parameters(), parameters()
    pairs = [(params, torch.optim.Adam(params, lr=0.1, fused=True)) for params in (given, plain)]
    made = pairs[0][1]

    def schedules() -> list[Any]:
        return [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, 20) for _, optimizer in pairs]

    made_first = schedules() if schedule == "before" else []
    iin_fast.accelerate(made)
    rates = made_first or schedules()

    def steps(short: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as of a schedule that saw no step
            for _ in range(3):
                for (params, optimizer), rate in zip(pairs, rates, strict=True):
                    for p in params:
                        p.grad = p.detach().cos()
                    optimizer.step()
                    rate.step()
        assert ("_iin_fast_steps" in vars(made)) == short
        assert all(torch.equal(got, want) for got, want in zip(given, plain, strict=True))

    steps(True)
    iin_fast.restore(made)
    steps(False)


def test_groups_keep_what_was_asked_for() -> None:
    one, two, three = parameters(), parameters(), parameters()
    made = torch.optim.Adam([{"params": one, "fused": True}, {"params": two}])
    iin_fast.accelerate(made)
    made.add_param_group({"params": three, "fused": False})
    made.add_param_group({"params": parameters()})
    made.add_param_group({"params": parameters(), "foreach": True})
    made.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert [group["fused"] for group in made.param_groups] == [True, True, False, True, None, None]
    for group in made.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    made.step()
    made.step()
    iin_fast.restore(made)
    assert [group["fused"] for group in made.param_groups] == [True, None, False, None, None, None]
    assert made.defaults["fused"] is None


def test_a_file_of_a_plain_optimizer_makes_it_a_plain_one_until_the_next_call() -> None:
    given = parameters()
    made, plain = torch.optim.Adam(given), torch.optim.Adam(given)
    iin_fast.accelerate(made)
    for number in range(3):
        made.load_state_dict(plain.state_dict())
        assert made.param_groups[0]["fused"] is None
        report = iin_fast.accelerate(made)
        assert made.param_groups[0]["fused"] and report.lines[0].why != "already"
        for _ in range(2):
            for p in given:
                p.grad = torch.ones_like(p)
            made.step()
        assert len(vars(made)["_iin_fast_steps"]) == 1, number


def test_a_parameter_that_is_there_twice_is_torch_s_business() -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        made, plain = (torch.optim.Adam([t, t], fused=True) for t in (p, q))
    iin_fast.accelerate(made)
    for _ in range(3):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        made.step()
        plain.step()
        assert torch.equal(p, q)


def test_a_step_in_inference_mode_between_others() -> None:
    given, wanted = parameters(), parameters()
    made, plain = (torch.optim.Adam(params, fused=True) for params in (given, wanted))
    iin_fast.accelerate(made)
    for number in range(6):
        with torch.inference_mode(number in (2, 3)):
            for params, optimizer in ((given, made), (wanted, plain)):
                for p in params:
                    p.grad = torch.ones_like(p) * number
                optimizer.step()
        assert all(torch.equal(got, want) for got, want in zip(given, wanted, strict=True))


def test_optimizers_that_accelerate_leaves() -> None:
    for made, why in (
        (torch.optim.SGD(parameters()), "no faster form"),
        (OwnAdam(parameters()), "no faster form"),
        (torch.optim.Adam(parameters(), fused=False), "fused=False was asked for"),
        (torch.optim.AdamW(parameters(), foreach=True), "foreach=True was asked for"),
        (torch.optim.Adam(parameters(), foreach=False), "foreach=False was asked for"),
        (torch.optim.Adam([torch.zeros(4, 6)[:, :3].requires_grad_()]), "gaps between their elements"),
        (torch.optim.Adam([torch.zeros(1).expand(8).requires_grad_()]), "or that share elements"),
        (torch.optim.Adam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "floating-point parameters"),
    ):
        cls, report = type(made), iin_fast.accelerate(made)
        assert type(made) is cls and not report.replaced and why in str(report)
    counted = torch.optim.Adam([nn.Parameter(torch.zeros(2, device="meta"))])
    assert "on cpu and cuda" in str(iin_fast.accelerate(counted))


def test_the_optimizer_alone() -> None:
    with iin_fast.patch(fused_optimizer=True) as patched:
        assert len(patched.report.lines) == 1
        assert torch.optim.Adam(parameters()).defaults["fused"]
    assert torch.optim.Adam(parameters()).defaults["fused"] is None
    with pytest.raises(ValueError, match="no library given"):
        iin_fast.patch()


def test_a_fused_optimizer_counts_steps_in_one_tensor_and_pickles_as_torch_s() -> None:
    given = parameters()
    made = made_in_a_block(torch.optim.Adam, given)
    for _ in range(3):
        for p in given:
            p.grad = torch.ones_like(p)
        made.step()
    steps = [made.state[p]["step"] for p in given]
    assert len({step.untyped_storage().data_ptr() for step in steps}) == 1
    assert [float(step) for step in steps] == [3.0, 3.0]
    assert isinstance(made, torch.optim.Adam)
    assert type(pickle.loads(pickle.dumps(made))) is torch.optim.Adam
    given[0].grad = given[0].detach().to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        made.step()


class Adams(TorchDispatchMode):
    """Notes how many threads each fused Adam may take, in its own thread and in a new one; `fails`: and raises."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.threads, self.elsewhere = fails, [], []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._fused_adam_.default:
            self.threads.append(torch.get_num_threads())
            thread = threading.Thread(target=lambda: self.elsewhere.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            if self.fails:
                raise MemoryError
        return func(*args, **(kwargs or {}))


def test_a_fused_optimizer_steps_small_tensors_on_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        sizes = [7, 301, 4999], [4999, 5003], [20000]
        pairs = []
        for made in (made_in_a_block, lambda cls, groups: cls(groups, fused=True)):
            torch.manual_seed(0)
            groups = [[nn.Parameter(torch.randn(n)) for n in group] for group in sizes]
            pairs.append((made(torch.optim.Adam, [{"params": group} for group in groups]), sum(groups, [])))
        for number in range(3):
            for optimizer, params in pairs:
                for p in params:
                    p.grad = (p.detach() * (number + 1)).sin()
                with Adams() as seen:
                    optimizer.step()
                small = [1, 3, 3] if optimizer is pairs[0][0] and number > 0 else [3, 3, 3]
                assert seen.threads == small and seen.elsewhere == [3, 3, 3] and torch.get_num_threads() == 3
            for got, want in zip(*(params for _, params in pairs), strict=True):
                assert torch.equal(got, want)
        with Adams(fails=True) as seen, pytest.raises(MemoryError):
            pairs[0][0].step()
        assert seen.threads == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
