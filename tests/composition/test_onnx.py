"""Modules in ONNX files, through the definition: their numbers, by onnxruntime, are the module's, at any batch size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import iin_fast

from .cases import MODULES, Case, same, tensors

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


NAMES = ["Flow", "Flow inverse", "Flow context", "SplineCoupling", "NeuralSplineFlow", "IIN", "IIN spline", "compat.iin FactorTransformer"]  # fmt: skip
EXPORTED = [case for case in MODULES if case.name in NAMES]


class Tensors(nn.Module):
    """Tensors out, as an exporter takes them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return tuple(tensors(self.module(*args)))


@pytest.mark.parametrize("case", EXPORTED, ids=[case.name for case in EXPORTED])
@pytest.mark.filterwarnings("ignore")
def test_onnx(case: Case, tmp_path: Path) -> None:
    module, inputs, file = Tensors(case.module()).eval(), case.inputs(5), tmp_path / "model.onnx"
    with iin_fast.backend("reference"), torch.no_grad():
        torch.onnx.export(module, inputs, file, dynamo=True, verbose=False, dynamic_shapes=(case.dynamic(),))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (5, 9):
        inputs = case.inputs(batch)
        names = [given.name for given in session.get_inputs()]
        found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        same([torch.from_numpy(array) for array in found], module(*inputs), rtol=1e-4, atol=1e-4)
