"""compare_backends: agrees where the backends agree, and says so where one is wrong."""

import os

import pytest
import torch

import iin_fast
from iin_fast.compat.iin import VectorTransformer
from iin_fast.ops.registry import OPS
from iin_fast.testing import check_ops, compare_backends
from iin_fast.testing.backends import Comparison, Row, relative_error


def model() -> iin_fast.IIN:
    network = iin_fast.IIN(8, {"color": 3}, n_flows=2, hidden_dim=16, generator=torch.Generator().manual_seed(0))
    network(torch.randn(32, 8))
    return network


def test_a_model_agrees_with_the_reference() -> None:
    comparison = compare_backends(model(), torch.randn(5, 8))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    expected = {"cpp", "triton"} if interpreted else {"cpp"}
    assert comparison.ok and {row.backend for row in comparison.rows} == expected
    names = {row.name for row in comparison.rows}
    assert {"output 0", "output 1", "grad of input 0", "grad of flow.weight_in", "grad of flow.scale"} <= names
    assert ("triton" in comparison.skipped) != interpreted
    config = {"Transformer": {"in_channel": 6, "n_flow": 2, "hidden_depth": 1, "hidden_dim": 16}}
    published = VectorTransformer(config)
    published(torch.randn(20, 6, 1, 1))
    assert compare_backends(published, torch.randn(5, 6, 1, 1)).ok


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            from iin_fast import backends

            return x * (1.001 if backends.chosen("flow", x) == "cpp" else 1.0)

    comparison = compare_backends(Wrong(), torch.randn(5, 8))
    assert not comparison.ok
    assert "differs" in str(comparison)


def test_relative_error_sees_what_is_not_finite() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    assert relative_error(x, x) == 0
    assert relative_error(x + torch.tensor([0.0, 0.0, 0.4]), x) == pytest.approx(0.1)
    hole = torch.tensor([1.0, torch.nan, 4.0])
    assert relative_error(hole, hole) == 0
    for got, want in ((hole, x), (x, hole)):
        assert not Row("x", "cpp", relative_error(got, want), 1.0).ok


def test_all_ops_agree_and_the_table_shows_them() -> None:
    comparison = check_ops("cpu")
    assert comparison.ok, str(comparison)
    text = str(comparison)
    for op in OPS:
        assert op in text
    assert Comparison().ok
