"""Splines at their ends, with raw values that are huge or not finite, and over long rows: the definition and the C++ code."""

import itertools
import math

import pytest
import spline_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import check_sums
from op_cases import DEFINED, DTYPES, FORMS, TAILS, few
from spline_cases import definition, elements, weights
from torch import Tensor

import iin_fast
from iin_fast.functional import spline_coupling
from iin_fast.ops.spline_coupling import parameter_count


def run(
    x: Tensor, raw: Tensor, bins: int, tails: str, form: str, box: tuple[float, ...], inverse: bool
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, raw)]
    where = {"tails": None, "box": box} if tails == "none" else {"tails": tails, "tail_bound": box[1]}
    outputs = spline_coupling(*leaves, bins=bins, inverse=inverse, parameterization=form, **where)
    grads = torch.autograd.grad(outputs, leaves, weights(x, outputs[1].dtype))
    return [t.detach() for t in (*outputs, *grads)]


@pytest.fixture(params=DEFINED)
def backend(request: pytest.FixtureRequest):
    with iin_fast.backend(request.param):
        yield request.param


@pytest.mark.triton
@pytest.mark.parametrize("dtype", few(DTYPES, 3))
def test_ends_are_exact(backend: str, dtype: torch.dtype) -> None:
    spline_cases.check_ends(run, dtype)


def test_a_box_that_is_not_square_has_exact_ends(backend: str) -> None:
    left, right, bottom, top = box = (-1.0, 0.3, 0.1, 2.0)
    for form, inverse in itertools.product(FORMS, (False, True)):
        raw = elements(300, 8, "none", 3.0, 1.0)[1].float()
        (low, high), (image_low, image_high) = (
            ((bottom, top), (left, right)) if inverse else ((left, right), (bottom, top))
        )
        for start, end in ((low, image_low), (high, image_high)):
            y = run(torch.full((300, 1), start), raw, 8, "none", form, box, inverse)[0]
            assert torch.equal(y, torch.full((300, 1), end))


@pytest.mark.triton
def test_what_is_not_finite_stays_so() -> None:
    spline_cases.check_not_finite(run)


def test_the_definition_shows_what_is_not_finite() -> None:
    spline_cases.check_not_finite(definition)


@pytest.mark.parametrize("inverse", [False, True])
def test_samples_of_a_flow_with_a_nan_bias_are_nan(inverse: bool) -> None:
    raw = torch.randn(500, 1, 23, generator=torch.Generator().manual_seed(0))
    raw[..., 9] = math.nan
    x = torch.linspace(-2.9, 2.9, 500)[:, None]
    y, logdet = spline_coupling(x, raw, bins=8, tail_bound=3.0, inverse=inverse)
    assert y.isnan().all() and logdet.isnan().all()


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_of_the_box_every_bit_stays(backend: str, dtype: torch.dtype) -> None:
    spline_cases.check_identity(run, dtype)


raw_values = st.one_of(
    st.floats(-1e4, 1e4),
    st.sampled_from([1e4, -1e4, 0.0, -0.0, 5e-324, -5e-324, 1e-40, -1e-40, 88.8, 709.8, -104.0, -746.0]),
    st.floats(-3, 3),
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_extreme_parameters_against_the_truth(data: st.DataObject) -> None:
    """Every backend of this machine, in float32 and float64, in both directions."""
    bins, tails = data.draw(st.sampled_from([1, 2, 5, 16])), data.draw(st.sampled_from(TAILS))
    count = parameter_count(bins, tails)
    rows = data.draw(st.lists(st.lists(raw_values, min_size=count, max_size=count), min_size=1, max_size=4))
    raw = torch.tensor(rows, dtype=torch.float64)[:, None]
    x = torch.tensor(data.draw(st.lists(st.floats(-3.5, 3.5), min_size=len(rows), max_size=len(rows))))
    not_finite = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf]))
    if not_finite is not None:
        raw[data.draw(st.integers(0, len(rows) - 1)), 0, data.draw(st.integers(0, count - 1))] = not_finite
    options = bins, tails, data.draw(st.sampled_from(FORMS)), (-3.0, 3.0, -3.0, 3.0), data.draw(st.booleans())
    for dtype, name in itertools.product((torch.float32, torch.float64), ("cpp", "reference")):
        inputs = x[:, None].to(dtype), raw.to(dtype)
        with iin_fast.backend(name):
            found = run(*inputs, *options)
        # an input that rounding cannot tell from a knot may lie in the bin before it or after it
        rounding = 16 * torch.finfo(dtype).eps
        truths = [
            definition(inputs[0].double() + step, inputs[1].double(), *options) for step in (-rounding, 0.0, rounding)
        ]
        for row in range(len(rows)):
            places = [got[row].isnan() for got in found]
            assert any(
                all(torch.equal(place, want[row].isnan()) for place, want in zip(places, truth, strict=True))
                for truth in truths
            ), (name, dtype, row)
        fine = inputs[1][:, 0].isfinite().all(1)
        spline_cases.check_against_the_truth([t[fine] for t in found], *(t[fine] for t in inputs), *options)


@pytest.mark.triton
def test_strong_raw_values_against_the_truth(backend: str) -> None:
    """Rounding once took the root of some of these out of its bin, or made it NaN."""
    spline_cases.check_strong_values(run)


@pytest.mark.parametrize(("dtype", "top"), [(torch.float32, 100.0), (torch.float64, 800.0)])
def test_derivatives_of_every_kind_where_exp_overflows(dtype: torch.dtype, top: float) -> None:
    """A softplus beyond the range of exp: autograd, create_graph, torch.func and forward mode give one finite derivative."""
    x = torch.tensor([[0.5]], dtype=dtype, requires_grad=True)
    raw = torch.tensor([[[0.0, 0.0, 1.0, top]]], dtype=dtype, requires_grad=True)

    def y(x: Tensor) -> Tensor:
        return spline_coupling(x, raw, bins=1, tails=None, tail_bound=1.0)[0].sum()

    (plain,) = torch.autograd.grad(y(x), x)
    by_x, by_raw = torch.autograd.grad(y(x), (x, raw), create_graph=True)
    # dy/dx of one bin of slope 1: Durkan et al. 2019, Eq. 5, at 3/4
    first, second = 1e-3 + math.log1p(math.exp(1.0)), 1e-3 + top
    below = 1 + (first + second - 2) * 3 / 16
    expected = (second * 9 / 16 + 2 * 3 / 16 + first / 16) / below**2
    for found in (plain, by_x, torch.func.grad(y)(x), torch.func.jvp(y, (x,), (torch.ones_like(x),))[1]):
        assert found.item() == pytest.approx(expected, rel=1e-5)
    second_order = torch.autograd.grad(by_x.sum() + by_raw.sum(), (x, raw))
    assert all(g.isfinite().all() for g in second_order)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logdets_of_long_rows(dtype: torch.dtype, inverse: bool) -> None:
    """As right as torch.sum, to 10^6 elements in a row; rows of every length between blocks."""
    generator = torch.Generator().manual_seed(0)
    for rows, features, equal in (
        (1, 196_608, True),
        (1, 1_000_000, False),
        (2, 70_001, False),
        (7, 19, False),
        (40, 1, False),
    ):
        x = 0.5 * torch.rand(rows, features, generator=generator, dtype=torch.float64).to(dtype)
        raw = torch.randn(rows, features, 4, generator=generator, dtype=torch.float64).to(dtype)
        if equal:
            x, raw = x[:, :1].expand_as(x), raw[:, :1].expand_as(raw)
        options = {"bins": 1, "tails": None, "inverse": inverse}
        terms = spline_coupling(x.reshape(-1, 1), raw.reshape(-1, 1, 4), **options)[1].view(rows, features)
        check_sums(spline_coupling(x, raw, **options)[1], terms)


def test_two_splines_of_nflows_in_a_row_keep_the_end() -> None:
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(24)
    spline = transforms.PiecewiseRationalQuadraticCDF
    model = transforms.CompositeTransform([spline([1], num_bins=8, tails=None) for _ in range(2)])
    report = iin_fast.accelerate(model)
    assert "Spline" in str(report) or "Quadratic" in str(report), report
    assert model(torch.ones(1, 1))[0].item() == model.inverse(torch.ones(1, 1))[0].item() == 1


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_vanishing_bins(backend: str, dtype: torch.dtype) -> None:
    def run(x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return spline_coupling(x, raw, bins=8, tail_bound=3.0, min_bin_width=0.0, min_bin_height=0.0, inverse=inverse)

    spline_cases.check_ends_of_vanishing_bins(run, dtype)
