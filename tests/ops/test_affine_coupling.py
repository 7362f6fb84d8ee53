"""affine_coupling: every backend against the definition, and the properties of the map."""

import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from numerics import at_the_edge_of_overflow, compare_with_definition
from op_cases import AFFINE_COUPLING, BACKEND, DTYPES, LAYOUTS, LONG_ROWS, cases, coupling_inputs, few, rows_apart
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import iin_fast
from iin_fast.backends import ops
from iin_fast.functional import affine_coupling
from iin_fast.ops.affine_coupling import SQUASHES


@pytest.mark.triton
@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(squash: str, inverse: bool, dtype: torch.dtype) -> None:
    for shape in cases(AFFINE_COUPLING):
        call = partial(affine_coupling, squash=squash, inverse=inverse)
        compare_with_definition(call, coupling_inputs(shape, dtype, squash), float32=2e-6)


@pytest.mark.triton
def test_long_rows() -> None:
    for shape in cases(LONG_ROWS):
        compare_with_definition(affine_coupling, coupling_inputs(shape, torch.float64), float32=2e-6)


@pytest.mark.parametrize("squash", SQUASHES)
def test_inverse_and_its_logdet(squash: str) -> None:
    x, raw, shift = coupling_inputs((9, 17), torch.float64, squash)
    y, logdet = affine_coupling(x, raw, shift, squash=squash)
    back, back_logdet = affine_coupling(y, raw, shift, squash=squash, inverse=True)
    assert_close(back, x)
    assert_close(back_logdet, -logdet)


@pytest.mark.parametrize("squash", SQUASHES)
@pytest.mark.parametrize("inverse", [False, True])
def test_logdet_is_that_of_the_jacobian(squash: str, inverse: bool) -> None:
    x, raw, shift = coupling_inputs((1, 6), torch.float64, squash)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: affine_coupling(v, raw, shift, squash=squash, inverse=inverse)[0], x
    )
    _, logdet = affine_coupling(x, raw, shift, squash=squash, inverse=inverse)
    assert_close(jacobian.reshape(6, 6).slogdet().logabsdet, logdet[0])


@pytest.mark.triton
@pytest.mark.parametrize("squash", few(SQUASHES, 2))
@pytest.mark.parametrize("inverse", [False, True])
def test_first_and_second_derivatives(squash: str, inverse: bool) -> None:
    arguments = [a.requires_grad_() for a in coupling_inputs((3, 4), torch.float64, squash) if a is not None]

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        x, shift = given[0], given[-1]
        return affine_coupling(x, given[1] if len(given) == 3 else None, shift, squash=squash, inverse=inverse)

    assert gradcheck(function, arguments, fast_mode=BACKEND == "triton")
    assert gradgradcheck(function, arguments, fast_mode=BACKEND == "triton")


@pytest.mark.triton
def test_strides_of_every_kind() -> None:
    plain = coupling_inputs((6, 7), torch.float64)
    expected = affine_coupling(*plain)
    for turn in range(3):  # each tensor in another layout, so that no stride stands in for another's
        names = [list(LAYOUTS)[(turn + i) % len(LAYOUTS)] for i in range(3)]
        strided = [LAYOUTS[name](t) for name, t in zip(names, plain, strict=True)]
        assert_close(affine_coupling(*strided), expected, rtol=0, atol=0)
    images = affine_coupling(*(rows_apart(t).reshape(6, 7, 1, 1) for t in plain))
    assert_close((images[0].flatten(1), images[1]), expected, rtol=0, atol=0)
    row = plain[0][:1].expand(6, 7)
    assert_close(affine_coupling(row, *plain[1:])[0], affine_coupling(row.contiguous(), *plain[1:])[0])


def test_gradient_may_be_an_expanded_scalar() -> None:
    arguments = [a.requires_grad_() for a in coupling_inputs((5, 6), torch.float64, "tanh")]
    y, logdet = affine_coupling(*arguments)
    (y.sum() + logdet.sum()).backward()
    with iin_fast.backend("reference"):
        expected = torch.autograd.grad(sum(o.sum() for o in affine_coupling(*arguments)), arguments)
    assert_close([a.grad for a in arguments], list(expected))


def test_only_the_wanted_gradients_are_given() -> None:
    x, raw, shift = coupling_inputs((5, 6), torch.float64, "tanh")
    raw.requires_grad_()
    y, _ = affine_coupling(x, raw, shift)
    y.sum().backward()
    assert x.grad is None and shift.grad is None and raw.grad is not None


def test_clamp_bounds_the_scale() -> None:
    x, raw, shift = coupling_inputs((4, 8), torch.float64, "tanh", scale=100.0)
    _, logdet = affine_coupling(x, raw, shift, squash="tanh", clamp=0.5)
    assert logdet.abs().max() <= 8 * 0.5 + 1e-12
    _, soft = affine_coupling(x, raw, shift, squash="atan", clamp=0.5)
    assert 8 * 0.49 * 0.9 < soft.abs().max() + 8 and soft.abs().max() <= 8 * 0.5 * 0.636 * torch.pi / 2


@pytest.mark.parametrize("eps", [None, 0.0, 0.25])
def test_softplus_scales_by_no_less_than_the_clamp(eps: float | None) -> None:
    x, raw, shift = coupling_inputs((4, 8), torch.float64, "softplus", scale=10.0)
    scale = torch.nn.functional.softplus(raw, threshold=1000) + (1e-3 if eps is None else eps)
    y, logdet = affine_coupling(x, raw, shift, squash="softplus", clamp=eps)
    assert_close(y, x * scale + shift)
    assert_close(logdet, scale.log().sum(1))


def test_codes_are_those_of_the_library() -> None:
    """The names and codes in the header, and that the library refuses any other code."""
    header = (Path(__file__).parents[2] / "csrc/affine_coupling/affine_coupling.h").read_text()
    found = re.search(r"#define IIN_FAST_SQUASHES\(X\)(.*?)\n\n", header, re.DOTALL)
    assert found
    codes = {name: int(code) for name, code in re.findall(r"X\((\w+), (\d+)\)", found[1])}
    assert codes == {name: squash.code for name, squash in SQUASHES.items()}
    x = torch.randn(2, 3)
    for code in (-1, len(SQUASHES)):
        with pytest.raises(RuntimeError, match="is not a known code"):
            torch.ops.iin_fast.affine_coupling(x, x, x, code, 1.0, False)


def test_no_row_leaks_into_another_and_nan_is_not_hidden() -> None:
    x, raw, shift = coupling_inputs((3, 8), torch.float32, "tanh")
    clean = affine_coupling(x, raw, shift)
    raw[1, 2] = torch.nan
    y, logdet = affine_coupling(x, raw, shift)
    assert torch.isnan(y[1, 2]) and torch.isnan(logdet[1])
    assert_close(y[[0, 2]], clean[0][[0, 2]], rtol=0, atol=0)
    assert_close(logdet[[0, 2]], clean[1][[0, 2]], rtol=0, atol=0)


@pytest.mark.triton
@pytest.mark.parametrize("squash", few(SQUASHES))
@pytest.mark.parametrize("inverse", few([False, True]))
def test_opcheck(squash: str, inverse: bool) -> None:
    code, clamp = SQUASHES[squash].code, SQUASHES[squash].clamp
    arguments = coupling_inputs((3, 4), torch.float32, squash)
    torch.library.opcheck(ops(BACKEND).affine_coupling, (*arguments, code, clamp, inverse))
    with_grad = [a if a is None else a.detach().requires_grad_() for a in arguments]
    torch.library.opcheck(ops(BACKEND).affine_coupling, (*with_grad, code, clamp, inverse))
    backward = (arguments[0], torch.ones(3), arguments[2], arguments[1], code, clamp, inverse)
    torch.library.opcheck(ops(BACKEND).affine_coupling_backward, backward)


@pytest.mark.triton
def test_compiles_into_one_graph() -> None:
    arguments = [a.requires_grad_() for a in coupling_inputs((5, 6), torch.float32, "tanh")]
    compiled = torch.compile(lambda *a: affine_coupling(*a, squash="tanh"), fullgraph=True, backend="aot_eager")
    y, logdet = compiled(*arguments)
    expected = affine_coupling(*arguments)
    assert_close((y, logdet), expected)
    got = torch.autograd.grad(y.sum() + logdet.sum(), arguments)
    assert_close(got, torch.autograd.grad(expected[0].sum() + expected[1].sum(), arguments))


def test_autocast_computes_in_float32() -> None:
    x, raw, shift = coupling_inputs((3, 4), torch.float32, "tanh")
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = affine_coupling(x, raw.bfloat16(), shift.bfloat16())
    expected = affine_coupling(x, raw.bfloat16().float(), shift.bfloat16().float())
    assert_close((y, logdet), expected)


@pytest.mark.parametrize(("squash", "inverse"), list(itertools.product(["tanh", "sigmoid"], [False, True])))
def test_extreme_scales_stay_finite_where_the_definition_does(squash: str, inverse: bool) -> None:
    x, _, shift = coupling_inputs((2, 5), torch.float32, squash)
    raw = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]] * 2)
    y, logdet = affine_coupling(x, raw, shift, squash=squash, inverse=inverse)
    assert y.isfinite().all() and logdet.isfinite().all()


@pytest.mark.triton
def test_gradients_at_the_edge_of_overflow() -> None:
    (*arguments, grad), truths = at_the_edge_of_overflow()
    leaves = [a.requires_grad_() for a in arguments]
    y, _ = affine_coupling(*leaves, squash="identity")
    for got, want in zip(torch.autograd.grad(y, leaves, grad), truths, strict=True):
        assert_close(got, want.float(), rtol=1e-5, atol=0)


class TestBadInput:
    def check(self, error: type[Exception], message: str, *arguments: object, **options: object) -> None:
        with pytest.raises(error, match=message):
            affine_coupling(*arguments, **options)

    def test_each(self) -> None:
        x = torch.randn(3, 4)
        self.check(ValueError, r"shift has shape \[3, 5\], expected \[3, 4\] like x", x, x, torch.randn(3, 5))
        self.check(ValueError, r"raw_scale has shape \[4\]", x, x[0], x)
        self.check(TypeError, "x has dtype int64", x.long(), x, x)
        self.check(TypeError, "shift has dtype complex64", x, x, x.to(torch.complex64))
        self.check(TypeError, "raw_scale has dtype float64, expected float32 like x", x, x.double(), x)
        self.check(TypeError, "x is a list", [1.0], x, x)
        self.check(ValueError, "shift is on meta, expected cpu like x", x, x, x.to("meta"))
        self.check(ValueError, "squash is 'relu', expected one of 'identity', 'tanh'", x, x, x, squash="relu")
        self.check(ValueError, "clamp is 0.0", x, x, x, clamp=0.0)
        self.check(
            ValueError, "clamp is -0.1, expected a finite number at least 0", x, x, x, squash="softplus", clamp=-0.1
        )
        self.check(ValueError, "clamp is nan", x, x, x, clamp=float("nan"))
        self.check(ValueError, "squash 'identity' takes none", x, x, x, squash="identity", clamp=1.0)
        self.check(ValueError, "raw_scale is None", x, None, x)
        self.check(ValueError, "raw_scale is a tensor, expected None", x, x, x, squash="none")
        self.check(ValueError, r"x has shape \[\]", x[0, 0], x[0, 0], x[0, 0])


def test_gradients_with_a_graph_when_inputs_depend_on_each_other() -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y, logdet = affine_coupling(x, x.sin(), x.cos())
    total = y.sum() + logdet.sum()
    (with_graph,) = torch.autograd.grad(total, x, create_graph=True)
    (without,) = torch.autograd.grad(total, x)
    assert_close(with_graph, without)
