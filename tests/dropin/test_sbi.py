"""sbi as its users call it: training inside of a patch, and a trained posterior for sampling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import has
from torch import Tensor
from torch.utils.data import TensorDataset

import iin_fast
from iin_fast.ops.flow_program import engine

if not has("sbi"):
    pytest.skip("sbi is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where sbi writes its logs


def trained(name: str) -> tuple[Any, Tensor]:
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    torch.manual_seed(0)
    theta = torch.rand(120, 2)
    npe = NPE(BoxUniform(torch.zeros(2), torch.ones(2)), density_estimator=name, show_progress_bars=False)
    npe.append_simulations(theta, theta + 0.1 * torch.randn(120, 2))
    npe.train(max_num_epochs=2, training_batch_size=50)
    return npe.build_posterior(), torch.tensor([[0.4, 0.6]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nsf", "maf", "zuko_nsf", "zuko_maf"])
def test_a_training_inside_of_a_patch_and_a_posterior_after_it(name: str, calls: list[int]) -> None:
    own, observed = trained(name)
    assert not calls
    with iin_fast.patch("sbi", fused_optimizer=True):
        fast, _ = trained(name)
        assert calls, "the training ran the libraries' own code"
    # Adam turns a gradient within rounding of 0 into a step of full length, so single weights may differ; the density does not.
    theta = torch.rand(200, 1, 2)
    got, want = (p.posterior_estimator.log_prob(theta, observed) for p in (fast, own))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    torch.manual_seed(1)
    wanted = own.sample((50,), x=observed, show_progress_bars=False)
    calls.clear()
    report = iin_fast.accelerate(own.posterior_estimator)
    assert report.replaced and not report.left, str(report)
    torch.manual_seed(1)
    found = own.sample((50,), x=observed, show_progress_bars=False)
    assert calls, "sampling ran the library's own code"
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nsf", "maf", "zuko_nsf", "zuko_maf"])
def test_direct_gradients_train_the_same_net(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    add = engine.direct.add_to_grad
    monkeypatch.setattr(engine.direct, "add_to_grad", lambda *given: added.append(1) or add(*given))  # type: ignore[func-returns-value]
    nets = []
    for on in (False, True):
        with iin_fast.patch("sbi", fused_optimizer=True), iin_fast.direct_gradients(on):
            posterior, _ = trained(name)
        nets.append(posterior.posterior_estimator.state_dict())
        assert bool(added) == on
    assert nets[0].keys() == nets[1].keys() and all(map(torch.equal, nets[0].values(), nets[1].values()))


def loaders(**options: Any) -> Any:
    from sbi.inference import NPE

    torch.manual_seed(3)
    npe = NPE(show_progress_bars=False)
    npe.append_simulations(torch.rand(70, 2), torch.rand(70, 3))
    return npe.get_dataloaders(training_batch_size=20, **options)


def batches(loader: Any) -> list[list[Tensor]]:
    torch.manual_seed(4)
    return [batch for _ in range(2) for batch in loader]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 1}, {"batch_size": None, "drop_last": False}, {"collate_fn": lambda rows: rows[0]}],
    ids=["as it is", "workers", "no batches", "collate_fn"],
)
def test_a_patched_loader_gives_the_same_batches(options: dict[str, Any]) -> None:
    given = {"dataloader_kwargs": options}
    wanted = batches(loaders(**given)[0])
    with iin_fast.patch("sbi") as patched:
        assert any(line.name.startswith("sbi.") for line in patched.report.replaced), str(patched)
        train, validation = loaders(**given)
    found = batches(train)
    assert type(found[0]) is type(wanted[0])
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert len(got) == len(want) == 3
        assert all(torch.equal(g, w) and g.is_contiguous() for g, w in zip(got, want, strict=True))
    assert isinstance(train, torch.utils.data.DataLoader) and isinstance(validation, torch.utils.data.DataLoader)


@pytest.mark.filterwarnings("ignore")
def test_a_patched_loader_takes_no_row_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with iin_fast.patch("sbi"):
        train, _ = loaders()
    own, _ = loaders()
    rows: list[Any] = []
    get = TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, i: (rows.append(i), get(self, i))[1])
    batches(train)
    assert not rows
    batches(own)
    assert rows
    dataset = train.dataset
    dataset.tensors = tuple(t[:5] for t in dataset.tensors)
    with pytest.raises(IndexError, match="out of bounds for dimension 0 with size 5"):
        batches(train)


def gradients(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 5), (7,), (), (2, 4), (0, 3), (9,))]
    for p in made[:-1]:  # the last one has none
        p.grad = scale * torch.randn(p.shape, dtype=dtype, generator=generator)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("max_norm", [5.0, 1, 0.0])
def test_clipping_gives_the_bits_of_torch_s(dtype: torch.dtype, scale: float, max_norm: float) -> None:
    import sbi.inference.trainers.base as module

    own = torch.nn.utils.clip_grad_norm_
    with iin_fast.patch("sbi") as patched:
        fast: Any = vars(module)["clip_grad_norm_"]
        assert fast is not own and "sbi.inference.trainers.base.clip_grad_norm_" in str(patched)
    assert vars(module)["clip_grad_norm_"] is own is torch.nn.utils.clip_grad_norm_
    for given in (lambda ps: ps, iter, lambda ps: ps[0], lambda ps: ps[-1], lambda ps: []):
        got, want = gradients(dtype, scale), gradients(dtype, scale)
        norms = fast(given(got), max_norm), own(given(want), max_norm)
        torch.testing.assert_close(*norms, rtol=0, atol=0, equal_nan=True)
        for g, w in zip(got, want, strict=True):
            assert (g.grad is None) == (w.grad is None)
            if g.grad is not None and w.grad is not None:
                torch.testing.assert_close(g.grad, w.grad, rtol=0, atol=0, equal_nan=True)


def test_what_clipping_leaves_to_torch() -> None:
    from iin_fast.dropin.sbi import clip

    for options in ({"norm_type": 1.0}, {"foreach": False}, {"error_if_nonfinite": True}):
        got, want = gradients(), gradients()
        norms = clip(got, 0.5, **options), torch.nn.utils.clip_grad_norm_(want, 0.5, **options)
        assert torch.equal(*norms) and all(
            torch.equal(g.grad, w.grad) for g, w in zip(got[:-1], want[:-1], strict=True)
        )
    with pytest.raises(RuntimeError, match="non-finite"):
        clip(gradients(scale=float("nan")), 1.0, error_if_nonfinite=True)
    mixed = [*gradients(), *gradients(torch.float64)], [*gradients(), *gradients(torch.float64)]
    assert torch.equal(clip(mixed[0], 0.5), torch.nn.utils.clip_grad_norm_(mixed[1], 0.5))
    meta = torch.nn.Parameter(torch.zeros(3, device="meta"))
    meta.grad = torch.zeros(3, device="meta")
    assert clip([meta], 1.0).is_meta
