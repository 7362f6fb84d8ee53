"""spline_coupling in Triton against the definition in float64: both forms, all tails, both directions."""

import math

import pytest
import spline_cases
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import iin_fast
from iin_fast.functional import rational_quadratic_spline, spline_coupling
from iin_fast.ops.spline_coupling import parameter_count

TAILS = ["linear", "circular", None]


def case(rows: int, features: int, bins: int, tails: str | None, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2.5 * torch.randn(rows, features, generator=generator, dtype=torch.float64)
    count = parameter_count(bins, tails)
    return x, spread * torch.randn(rows, features, count, generator=generator, dtype=torch.float64)


def outputs(x: Tensor, raw: Tensor, backend: str, **options: object) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, raw)]
    with iin_fast.backend(backend):
        y, logdet = spline_coupling(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, logdet)]
    return [y.detach(), logdet.detach(), *torch.autograd.grad([y, logdet], leaves, weights)]


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("form", ["nflows", "zuko"])
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_definition_in_float64(tails: str | None, form: str, inverse: bool) -> None:
    for rows, features, bins in [(1, 1, 1), (7, 3, 2), (5, 17, 8), (2, 1, 64), (0, 4, 8), (33, 2, 5), (2, 400, 3)]:
        x, raw = case(rows, features, bins, tails)
        if rows > 1:
            x[0, 0], x[1, 0] = 1.9, -50.0  # the end of the box, and far outside
        options = dict(bins=bins, tails=tails, tail_bound=1.9, parameterization=form, inverse=inverse)
        for got, want in zip(
            outputs(x, raw, "triton", **options), outputs(x, raw, "reference", **options), strict=True
        ):
            assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_judged_by_float64(dtype: torch.dtype, inverse: bool) -> None:
    x, raw = (t.to(dtype) for t in case(40, 6, 8, "linear", spread=0.7))
    options = dict(bins=8, tail_bound=3.0, inverse=inverse)
    truth = outputs(x.double(), raw.double(), "reference", **options)
    plain = outputs(x, raw, "reference", **options)
    ours = outputs(x, raw, "triton", **options)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for got, same_type, expected in zip(ours, plain, truth, strict=True):
        error, plain_error = ((t.double() - expected).abs().flatten().quantile(0.9) for t in (got, same_type))
        assert error <= 2 * plain_error + torch.finfo(got.dtype).eps * expected.abs().mean()


def test_packed_strided_and_single_parameters_and_a_box() -> None:
    x, raw = case(6, 5, 4, "linear")
    wide = torch.randn(6, 5 * 11 + 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    packed = wide[:, 4 : 4 + 55]
    with iin_fast.backend("triton"):
        got = spline_coupling(x, packed, bins=4, tail_bound=3.0)
        expected = spline_coupling(x, packed.reshape(6, 5, 11).clone(), bins=4, tail_bound=3.0)
        turned = spline_coupling(x, raw.transpose(0, 2).contiguous().transpose(0, 2), bins=4)
        plain = spline_coupling(x, raw, bins=4)
    assert_close(got, expected, rtol=0, atol=0)
    assert_close(turned, plain, rtol=0, atol=0)
    boxed = case(6, 5, 4, None)[1].split([4, 4, 5], -1)
    results = []
    for backend in ("triton", "reference"):
        with iin_fast.backend(backend):
            results.append(rational_quadratic_spline(x, *boxed, tails=None, box=(-1.0, 2.0, 0.0, 5.0)))
    assert_close(results[0], results[1])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_gradients_far_outside_are_those_of_the_identity(tails: str, inverse: bool) -> None:
    x = torch.tensor([[math.inf, -math.inf, 1e38, -1e38, 0.1]]).requires_grad_()
    raw = torch.randn(1, 5, parameter_count(4, tails), generator=torch.Generator().manual_seed(0)).requires_grad_()
    with iin_fast.backend("triton"):
        y, logdet = spline_coupling(x, raw, bins=4, tails=tails, inverse=inverse)
        by_x, by_raw = torch.autograd.grad(100 * y.sum() + logdet.sum(), (x, raw))
    assert torch.equal(y[0, :4], x[0, :4]) and logdet.isfinite()
    assert (
        torch.equal(by_x[0, :4], torch.full((4,), 100.0)) and not by_raw[0, :4].any() and by_raw[0, 4].isfinite().all()
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_derivatives_to_second_order(inverse: bool) -> None:
    x, raw = (t.requires_grad_() for t in case(2, 2, 3, "linear"))

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        return spline_coupling(*given, bins=3, tail_bound=3.0, inverse=inverse)

    with iin_fast.backend("triton"):
        assert gradcheck(function, (x, raw), fast_mode=True)
        assert gradgradcheck(function, (x, raw), fast_mode=True)


def run(
    x: Tensor, raw: Tensor, bins: int, tails: str, form: str, box: tuple[float, ...], inverse: bool
) -> list[Tensor]:
    """As the tests of every backend call it (spline_cases.py)."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, raw)]
    where = {"tails": None, "box": box} if tails == "none" else {"tails": tails, "tail_bound": box[1]}
    with iin_fast.backend("triton"):
        results = spline_coupling(*leaves, bins=bins, inverse=inverse, parameterization=form, **where)
    grads = torch.autograd.grad(results, leaves, spline_cases.weights(x, results[1].dtype))
    return [t.detach() for t in (*results, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_ends_are_exact(dtype: torch.dtype) -> None:
    spline_cases.check_ends(run, dtype, shapes=(5,), bounds=(0.7,))


def test_what_is_not_finite_stays_so() -> None:
    spline_cases.check_not_finite(run, shapes=((1, 40), (3, 200)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_of_the_box_every_bit_stays(dtype: torch.dtype) -> None:
    spline_cases.check_identity(run, dtype)


def test_strong_raw_values_against_the_truth() -> None:
    spline_cases.check_strong_values(run, 500)


@pytest.mark.parametrize(("bins", "features"), [(64, 252), (1, 16_384)])
def test_logdets_of_long_rows(bins: int, features: int) -> None:
    """Added by one program in many steps, and by many programs. Every term is the log of the slope of the first knot, of a
    size whose multiples round to one side."""
    raw = torch.zeros(1, 1, parameter_count(bins, None))
    raw[..., 2 * bins] = math.log(math.expm1(math.exp(0.618793) - 1e-3))
    x = torch.full((1, 1), -1.0)
    with iin_fast.backend("triton"):
        term = spline_coupling(x, raw, bins=bins, tails=None)[1].double()
        found = spline_coupling(x.repeat(1, features), raw.expand(1, features, -1), bins=bins, tails=None)[1]
    assert found.item() == pytest.approx(features * term.item(), rel=1.2e-7, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_vanishing_bins(dtype: torch.dtype) -> None:
    def run(x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        with iin_fast.backend("triton"):
            return spline_coupling(
                x, raw, bins=8, tail_bound=3.0, min_bin_width=0.0, min_bin_height=0.0, inverse=inverse
            )

    spline_cases.check_ends_of_vanishing_bins(run, dtype)
