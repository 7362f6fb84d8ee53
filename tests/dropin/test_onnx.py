"""Accelerated models in ONNX files: their numbers, by onnxruntime, are those of the library's own code."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from cases import has, spread
from torch import Tensor, nn

import iin_fast
from iin_fast.dropin import registry, stacks

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small affine couplings and small batches of stacks take the fused ops too."""
    monkeypatch.setattr(registry, "AFFINE_DEVICES", ("cpu",))
    monkeypatch.setattr(stacks, "ROWS", 0)


class Model(nn.Module):
    """One input and tensors out, as an exporter takes them."""

    def __init__(self, inner: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.inner, x)


def nflows() -> Model:
    from nflows import transforms as T
    from nflows.nn.nets import ResidualNet

    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=8, num_blocks=1)

    spline = T.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0], net, num_bins=4, tails="linear")
    return Model(T.CompositeTransform([T.AffineCouplingTransform([1, 0, 1], net), spline]), lambda m, x: m(x))


def normflows() -> Model:
    import normflows as nf

    return Model(nf.flows.CoupledRationalQuadraticSpline(3, 1, 8, num_bins=4), lambda m, x: m(x))


def zuko() -> Model:
    from zuko.flows import NSF

    return Model(NSF(3, transforms=1, hidden_features=(8,)), lambda m, x: m().log_prob(x))


def freia() -> Model:
    import FrEIA.modules as Fm

    def net(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))

    blocks = nn.ModuleList(
        [Fm.AllInOneBlock([(3,)], subnet_constructor=net), Fm.GLOWCouplingBlock([(3,)], subnet_constructor=net)]
    )

    def call(blocks: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(len(x))
        for block in blocks:
            (x,), more = block([x])
            logdet = logdet + more
        return x, logdet

    return Model(blocks, call)


LIBRARIES = {"nflows": nflows, "normflows": normflows, "zuko": zuko, "FrEIA": freia}


def exported(model: nn.Module, x: Tensor, dynamo: bool, folder: Path) -> list[Tensor]:
    """What onnxruntime computes of ``x``."""
    if dynamo:
        torch.onnx.export(model, (x,), folder / "model.onnx", dynamo=True, verbose=False, external_data=False)
        file: Any = (folder / "model.onnx").read_bytes()
    else:
        written = io.BytesIO()
        torch.onnx.export(model, (x,), written, dynamo=False)
        file = written.getvalue()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(t) for t in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def equal(got: list[Tensor], want: Any) -> None:
    tensors = [want] if isinstance(want, Tensor) else list(want)
    assert len(got) == len(tensors)
    for g, w in zip(got, tensors, strict=True):
        torch.testing.assert_close(g, w.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reference", [False, True], ids=("own code", "definition"))
@pytest.mark.parametrize("dynamo", [False, True], ids=("torchscript", "dynamo"))
@pytest.mark.parametrize("library", LIBRARIES)
def test_numbers(library: str, dynamo: bool, reference: bool, tmp_path: Path) -> None:
    if not has(library):
        pytest.skip(f"{library} is not installed")
    torch.manual_seed(0)
    model, x = spread(LIBRARIES[library](), 0.3).eval(), torch.randn(200, 3)
    own = model(x)
    assert iin_fast.accelerate(model).replaced
    if reference:
        with iin_fast.backend("reference"):
            equal(exported(model, x, dynamo, tmp_path), own)
    else:
        equal(exported(model, x, dynamo, tmp_path), own)
    equal([t.detach() for t in ([own] if isinstance(own, Tensor) else own)], model(x))


@pytest.mark.filterwarnings("ignore")
def test_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin.install(monkeypatch)
    torch.manual_seed(0)
    stack = spread(standin.EfficientVRNVP(6, 2, 10, 1), 0.2)
    x = torch.randn(20, 6)
    with torch.no_grad():
        stack(x)
    model = Model(stack.eval(), lambda m, x: m(x))
    own = model(x)
    iin_fast.accelerate(model)
    equal(exported(model, x, False, tmp_path), own)


@pytest.mark.filterwarnings("ignore")
def test_the_ops_run_again_after_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has("nflows"):
        pytest.skip("nflows is not installed")
    from iin_fast.ops.flow_program import engine

    model, x = nflows().eval(), torch.randn(20, 3)
    iin_fast.accelerate(model)
    calls = []
    run = engine.call
    monkeypatch.setattr(engine, "call", lambda *args: (calls.append(1), run(*args))[1])
    torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
    assert not calls
    model(x)
    assert calls
