"""Factors: a mapping of names to views of one tensor."""

import copy
import pickle

import pytest
import torch
import torch.utils._pytree as pytree

from iin_fast.iin import Factors
from iin_fast.iin.factors import factor_sizes

SIZES = {"digit": 3, "color": 2, "residual": 4}


@pytest.fixture
def factors() -> Factors:
    return Factors.split(torch.arange(45.0).reshape(5, 9), SIZES)


def test_split_gives_views_in_order(factors):
    assert list(factors) == list(SIZES)
    assert factors.sizes == SIZES
    assert len(factors) == 3
    assert [part.shape for part in factors.values()] == [(5, 3), (5, 2), (5, 4)]
    assert torch.equal(torch.cat(list(factors.values()), 1), factors.tensor)
    assert factors["color"].data_ptr() == factors.tensor[:, 3:].data_ptr()


def test_mapping_protocol(factors):
    assert "digit" in factors
    assert "shape" not in factors
    assert factors.get("shape") is None
    assert dict(**factors).keys() == SIZES.keys()
    with pytest.raises(KeyError, match=r"no factor 'shape', expected one of \['digit', 'color', 'residual'\]"):
        factors["shape"]


def test_immutable(factors):
    with pytest.raises(TypeError):
        factors["digit"] = torch.zeros(5, 3)
    with pytest.raises(AttributeError):
        factors.tensor = torch.zeros(5, 9)
    with pytest.raises(AttributeError):
        factors.digit = torch.zeros(5, 3)
    factors.sizes["digit"] = 7
    assert factors.sizes == SIZES


def test_from_parts_equals_split(factors):
    again = Factors(factors)
    assert torch.equal(again.tensor, factors.tensor)
    assert again.sizes == SIZES


def test_replace(factors):
    new = torch.full((5, 2), -1.0)
    replaced = factors.replace(color=new)
    assert torch.equal(replaced["color"], new)
    assert torch.equal(replaced["digit"], factors["digit"])
    assert torch.equal(replaced["residual"], factors["residual"])
    assert torch.equal(factors.replace({"color": new}).tensor, replaced.tensor)
    assert factors["color"].min() >= 0


@pytest.mark.parametrize(
    "index, rows",
    [
        (slice(1, 3), [1, 2]),
        (3, [3]),
        (-1, [4]),
        ([0, 4], [0, 4]),
        (torch.tensor([True, False] * 2 + [True]), [0, 2, 4]),
    ],
)
def test_rows(factors, index, rows):
    chosen = factors[index]
    assert chosen.sizes == SIZES
    assert torch.equal(chosen.tensor, factors.tensor[rows])


def test_rows_refuse_other_shapes(factors):
    with pytest.raises(IndexError, match="picks samples"):
        factors[torch.zeros(2, 2, dtype=torch.int64)]
    for index in ((slice(None), 0), (slice(None), slice(3)), (0, 1)):  # dimensions are no factors
        with pytest.raises(IndexError, match="picks samples"):
            factors[index]


def test_repr(factors):
    assert repr(factors) == "Factors(batch=5, digit=3, color=2, residual=4)"
    assert "batch=None" in repr(pytree.tree_map(lambda _: None, factors))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda factors: pickle.loads(pickle.dumps(factors))])
def test_copies(factors, clone):
    other = clone(factors)
    assert other.sizes == SIZES
    assert torch.equal(other.tensor, factors.tensor)
    assert other.tensor.data_ptr() != factors.tensor.data_ptr()


def test_pytree(factors):
    leaves, spec = pytree.tree_flatten(factors)
    assert len(leaves) == 1 and leaves[0] is factors.tensor
    doubled = pytree.tree_map(lambda t: 2 * t, factors)
    assert isinstance(doubled, Factors)
    assert torch.equal(doubled["digit"], 2 * factors["digit"])
    loaded = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert pytree.tree_unflatten(leaves, loaded).sizes == SIZES


def test_gradient_reaches_parts(factors):
    tensor = factors.tensor.clone().requires_grad_()
    Factors.split(tensor, SIZES).replace(digit=torch.zeros(5, 3))["color"].sum().backward()
    assert tensor.grad is not None and tensor.grad.sum() == 10


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Factors:
        factors = Factors.split(2 * x, SIZES)
        return factors.replace(color=factors["color"] + 1)


def test_compile(factors):
    compiled = torch.compile(Double(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(factors.tensor).tensor, Double()(factors.tensor).tensor)
    take = torch.compile(lambda f: f[1:3].replace(digit=f[1:3]["digit"] * 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(take(factors)["digit"], factors["digit"][1:3] * 2)


def test_export(factors):
    program = torch.export.export(Double(), (factors.tensor,))
    result = program.module()(factors.tensor)
    assert isinstance(result, Factors)
    assert torch.equal(result.tensor, Double()(factors.tensor).tensor)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Factors([torch.zeros(2, 2)]), TypeError, "parts is a list"),
        (lambda: Factors({}), ValueError, "parts is empty"),
        (lambda: Factors({1: torch.zeros(2, 2)}), TypeError, "parts has the name 1"),
        (lambda: Factors({"a": [1.0]}), TypeError, "'a' is a list"),
        (lambda: Factors({"a": torch.zeros(2)}), ValueError, r"'a' has shape \[2\], expected \[batch, size\]"),
        (lambda: Factors({"a": torch.zeros(2, 0)}), ValueError, "size >= 1"),
        (
            lambda: Factors({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}),
            ValueError,
            "'b' has batch size 3, expected 2",
        ),
        (
            lambda: Factors({"a": torch.zeros(2, 1), "b": torch.zeros(2, 1).double()}),
            ValueError,
            "'b' has type .*float64",
        ),
        (
            lambda: Factors({"a": torch.zeros(2, 1), "b": torch.zeros(2, 1, device="meta")}),
            ValueError,
            "'b' has device meta, expected cpu like 'a'",
        ),
        (lambda: Factors.split(torch.zeros(2, 5), SIZES), ValueError, r"shape \[2, 5\], expected \[batch, 9\]"),
        (lambda: Factors.split(torch.zeros(9), SIZES), ValueError, r"shape \[9\], expected \[batch, 9\]"),
        (lambda: Factors.split([1.0], SIZES), TypeError, "tensor is a list"),
        (lambda: Factors.split(torch.zeros(2, 5), [2, 3]), TypeError, "sizes is a list"),
        (lambda: Factors.split(torch.zeros(2, 5), {"a": 6, "b": -1}), ValueError, r"sizes\['b'\] is -1"),
        (lambda: Factors.split(torch.zeros(2, 9), SIZES).replace(x=torch.zeros(2, 1)), ValueError, "no factor 'x'"),
        (
            lambda: Factors.split(torch.zeros(2, 9), SIZES).replace(color=torch.zeros(2, 1)),
            ValueError,
            r"expected \[2, 2\]",
        ),
        (lambda: Factors.split(torch.zeros(2, 9), SIZES).replace(color=None), TypeError, "'color' is a NoneType"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_sizes():
    assert list(factor_sizes(64, {"digit": 22, "color": 11}).items()) == [
        ("digit", 22),
        ("color", 11),
        ("residual", 31),
    ]
    assert factor_sizes(5, None) == factor_sizes(5, {}) == {"residual": 5}
    assert factor_sizes(5, {"a": 2, "residual": 3}) == {"a": 2, "residual": 3}
    assert factor_sizes(5, {"a": 2, "b": 3}) == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    "factors, error, message",
    [
        ({"a": 3, "b": 3}, ValueError, "sum to 6, expected at most dim = 5"),
        ({"a": 3, "residual": 1}, ValueError, "sum to 4, expected dim = 5"),
        ({"residual": 3, "a": 2}, ValueError, "expected 'residual' last"),
        ({"a": 0}, ValueError, r"factors\['a'\] is 0, expected a positive integer"),
        ({"a": -2}, ValueError, r"factors\['a'\] is -2"),
        ({"a": 2.0}, TypeError, r"factors\['a'\] is 2.0"),
        ({"a": True}, TypeError, r"factors\['a'\] is True"),
        ({"": 2}, TypeError, "has the name ''"),
        ({3: 2}, TypeError, "has the name 3"),
        ([2, 3], TypeError, "factors is a list"),
    ],
)
def test_bad_sizes(factors, error, message):
    with pytest.raises(error, match=message):
        factor_sizes(5, factors)
