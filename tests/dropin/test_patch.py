"""What patch prints, warns of, and does to optimizers."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from cases import has
from torch import nn

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
    assert fingerprint().returncode == 2
