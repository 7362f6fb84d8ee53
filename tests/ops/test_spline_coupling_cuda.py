"""The CUDA kernels of spline_coupling, run on the host (tests/cuda_emulator), against the definition."""

import ctypes
import math
from functools import partial
from typing import Any

import pytest
import spline_cases
import torch
from cuda_emulator import DTYPES, call, data, load, matrix, type_name
from numerics import check_sums
from op_cases import FORMS, SPLINE_COUPLING, TAILS, cases, spline_inputs
from torch import Tensor
from torch.testing import assert_close

from iin_fast.ops.spline_coupling import PARAMETERIZATIONS, parameter_count, reference
from iin_fast.ops.spline_coupling import TAILS as TAIL_CODES

inputs = partial(spline_inputs, spread=0.7, reach=1.3)
BOX = (-2.0, 2.0, -2.0, 2.0)


class Values(ctypes.Structure):
    """Raw widths, heights or derivatives, or their gradients (spline_coupling.cpp)."""

    _fields_ = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in "row_stride feature_stride count".split())]


class Spline(ctypes.Structure):
    """Raw values and options of a call (spline_coupling.cpp)."""

    _fields_ = [
        ("values", Values * 3),
        *((n, ctypes.c_int64) for n in "rows features bins count tails form".split()),
        *((n, ctypes.c_double) for n in "left right bottom top min_width min_height min_derivative softness".split()),
        ("inverse", ctypes.c_bool),
    ]


class SplineLaunch(ctypes.Structure):
    """What a test asks of a launch, and learns of it (spline_coupling.cpp)."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "multiprocessors threads tile_rows tile_features pitch wide_in wide_out pieces_in pieces_out blocks parts "
            "launches"
        ).split()
    ]

    def __init__(self, multiprocessors: int = 1) -> None:
        super().__init__(multiprocessors)


Raw = Tensor | list[Tensor]  # in one tensor, or widths, heights and derivatives apart


def together(raw: Raw) -> Tensor:
    return raw if isinstance(raw, Tensor) else torch.cat(raw, -1)


def values_of(raw: Raw, bins: int) -> Any:
    parts = raw.tensor_split((bins, 2 * bins), -1) if isinstance(raw, Tensor) else raw
    for part in parts:
        assert part.shape[2] < 2 or part.stride(2) == 1
    return (Values * 3)(*(Values(part.data_ptr(), *part.stride()[:2], part.shape[2]) for part in parts))


def spline(x: Tensor, raw: Raw, bins: int, tails: str, form: str, inverse: bool, **limits: Any) -> Spline:
    box, low = limits.get("box", BOX), limits.get("low", 1e-3)
    count = parameter_count(bins, tails)
    assert together(raw).shape == (*x.shape, count)
    softness = 1 / math.log(low) if form == "zuko" else 0.0
    codes = TAIL_CODES[tails], PARAMETERIZATIONS[form]
    return Spline(values_of(raw, bins), *x.shape, bins, count, *codes, *box, low, low, low, softness, inverse)


def forward(x: Tensor, raw: Raw, *options: Any, launch: SplineLaunch, **limits: Any) -> tuple[Tensor, Tensor]:
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    logdet = torch.full(x.shape[:1], torch.nan, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    job = spline(x, raw, *options, **limits)
    arguments = type_name(x.dtype), ctypes.byref(job), matrix(x), data(y), data(logdet), ctypes.byref(launch)
    call(load("spline_coupling").spline_forward, *arguments)
    return y, logdet


def backward(
    grad_y: Tensor, grad_logdet: Tensor, x: Tensor, raw: Raw, *options: Any, launch: SplineLaunch, **limits: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the raw values, which the kernel writes in as many tensors as it reads."""
    grad_x = torch.full(x.shape, torch.nan, dtype=x.dtype)
    parts = [torch.full(t.shape, torch.nan, dtype=x.dtype) for t in ([raw] if isinstance(raw, Tensor) else raw)]
    grad_raw = parts if len(parts) == 3 else parts[0]
    call(
        load("spline_coupling").spline_backward,
        *(type_name(x.dtype), ctypes.byref(spline(x, raw, *options, **limits)), matrix(x), matrix(grad_y)),
        *(data(grad_logdet), data(grad_x), ctypes.byref(values_of(grad_raw, options[0])), ctypes.byref(launch)),
    )
    return grad_x, together(grad_raw)


def assert_near(got: Tensor, want: Tensor, plain: Tensor) -> None:
    """float64 to rounding; other types in the norm, as an element near a knot or in a narrow bin is a matter of luck,
    and no further from the truth than a few times what the definition is in the same type."""
    assert got.shape == want.shape and got.dtype == plain.dtype
    if got.dtype == torch.float64:
        largest = float(want.abs().max()) if want.numel() else 1.0
        assert_close(got, want, rtol=1e-9, atol=1e-9 * max(1.0, largest))
        return
    assert bool((got.isfinite() == want.isfinite()).all())
    norm, error, plain_error = (float(torch.linalg.vector_norm(t)) for t in (want, got - want, plain - want))
    tolerance = {torch.float32: 5e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[got.dtype]
    times = 4 if want.numel() > 64 else 16  # of few elements each is a matter of luck
    assert error <= max(tolerance * max(norm, 0.01 * want.numel() ** 0.5), times * plain_error)


def check(
    x: Tensor,
    raw: Raw,
    *options: Any,
    multiprocessors: int = 1,
    weight: float = 1.0,
    **limits: Any,
) -> tuple[SplineLaunch, SplineLaunch]:
    """Forward and backward of these tensors against the definition in float64. `weight`: of the log-det's gradient."""
    launches = SplineLaunch(multiprocessors), SplineLaunch(multiprocessors)
    y, logdet = forward(x, raw, *options, launch=launches[0], **limits)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    grad_logdet = weight * torch.randn(len(x), generator=generator, dtype=torch.float64).to(logdet.dtype)
    got = y, logdet, *backward(grad_y, grad_logdet, x, raw, *options, launch=launches[1], **limits)
    raw = together(raw)
    bins, tails, form, inverse = options
    low = limits.get("low", 1e-3)

    def definition(x: Tensor, raw: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, raw)]
        outputs = reference.spline_coupling(*leaves, bins, tails, form, limits.get("box", BOX), low, low, low, inverse)
        weights = grad_y.to(outputs[0].dtype), grad_logdet.to(outputs[1].dtype)
        grads = torch.autograd.grad(outputs, leaves, weights)
        return [t.detach() for t in (*outputs, *grads)]

    for found, want, plain in zip(got, definition(x.double(), raw.double()), definition(x, raw), strict=True):
        assert_near(found, want, plain)
    return launches


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(tails: str, form: str, dtype: torch.dtype) -> None:
    for inverse in (False, True):
        for rows, features, bins in cases(SPLINE_COUPLING, "cuda"):
            check(*inputs(rows, features, bins, tails, dtype), bins, tails, form, inverse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_many_bins(form: str, dtype: torch.dtype) -> None:
    """The tile shrinks with the bins, until threads work in global memory."""
    found = []
    for bins in (16, 64, 100, 1500):
        for inverse in (False, True):
            launches = check(*inputs(2, 40, bins, "linear", dtype), bins, "linear", form, inverse, low=1e-4)
            for wide in (launches[0].wide_in, launches[1].wide_in, launches[1].wide_out):
                assert wide == (launches[0].pitch > 0)
            found.append(launches[0].pitch > 0)
    assert found == [True] * 6 + [False] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_counts_are_read_16_bytes_at_a_time(dtype: torch.dtype) -> None:
    """Wherever a tile begins and ends between two 16-byte boundaries; an even count is padded instead."""
    for rows, features in [(1, 1), (3, 1), (9, 7), (61, 5), (400, 1)]:
        for bins, tails in [(8, "linear"), (1, "none"), (3, "circular")]:
            for launch in check(*inputs(rows, features, bins, tails, dtype), bins, tails, "nflows", False):
                assert launch.pitch == parameter_count(bins, tails) | 1
                assert launch.wide_in == parameter_count(bins, tails) % 2
            assert launch.wide_out == launch.wide_in


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors_are_read_in_place(dtype: torch.dtype) -> None:
    x, raw = inputs(11, 6, 8, "linear", dtype)
    count = raw.shape[2]
    rows = torch.zeros(11, 6 * count + 5, dtype=dtype)  # rows of a wider output
    rows[:, 2 : 2 + 6 * count] = raw.flatten(1)
    values = torch.zeros(11, 6, count + 9, dtype=dtype)  # raw values of a wider output
    values[..., 4 : 4 + count] = raw
    offset = torch.zeros(raw.numel() + 1, dtype=dtype)  # contiguous, but not aligned
    offset[1:] = raw.flatten()
    wide_x = torch.zeros(11, 13, dtype=dtype)
    wide_x[:, 5:11] = x
    for strided in (
        rows[:, 2 : 2 + 6 * count].unflatten(1, (6, count)),
        values[..., 4 : 4 + count],
        offset[1:].view(raw.shape),
        raw.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(strided, raw)
        first, second = check(wide_x[:, 5:11], strided, 8, "linear", "nflows", False)
        assert first.wide_in == second.wide_in == 0 and second.wide_out == 1
    for same in (raw[:1].expand_as(raw), raw[:, :1].expand_as(raw)):  # strides of 0
        check(x[:1].expand_as(x), same, 8, "linear", "zuko", True)
    for launch in check(x[::2], raw[::2].contiguous(), 8, "linear", "nflows", True):
        assert launch.wide_in == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tails", TAILS)
def test_three_tensors_are_read_where_they_are(tails: str, form: str, dtype: torch.dtype) -> None:
    """Contiguous, as slices of wider rows of a net's output, as one spline for all, and too many bins for shared memory."""
    for rows, features, bins in [(45, 1, 8), (7, 3, 5), (2, 300, 1), (3, 4, 1500 if tails == "linear" else 9)]:
        x, raw = inputs(rows, features, bins, tails, dtype)
        low = 1e-4
        plain = [part.contiguous() for part in raw.tensor_split((bins, 2 * bins), -1)]
        wider, longer = [], []
        for gap, part in enumerate(plain, 1):
            held = torch.full((rows, features, part.shape[2] + gap), torch.nan, dtype=dtype)
            held[..., : part.shape[2]] = part
            wider.append(held[..., : part.shape[2]])
            rest = torch.full((rows, gap), torch.nan, dtype=dtype)
            longer.append(torch.cat([part.flatten(1), rest], 1)[:, : part[0].numel()].view_as(part))
        one = [part[:1, :1].expand_as(part) for part in plain]
        mixed = [plain[0], wider[1], one[2]]
        for parts in (plain, wider, longer, one, mixed):
            for inverse in (False, True):
                launches = check(x, parts, bins, tails, form, inverse, low=low)
                packed = forward(x, together(parts), bins, tails, form, inverse, launch=SplineLaunch(), low=low)
                apart = forward(x, parts, bins, tails, form, inverse, launch=SplineLaunch(), low=low)
                assert all(torch.equal(a, b) for a, b in zip(packed, apart, strict=True))
                if launches[0].pitch > 0:
                    assert launches[0].pieces_in == launches[1].pieces_out == 3


def test_neighbours_in_one_tensor_are_read_as_one() -> None:
    x, raw = inputs(45, 3, 8, "linear", torch.float32)
    for launch in check(x, list(raw.split([8, 8, 7], -1)), 8, "linear", "nflows", False):
        assert (launch.pieces_in, launch.wide_in) == (1, 1)


def test_every_mapping_of_elements_to_threads_is_used() -> None:
    found = set()
    for rows, features in [(300, 1), (100, 6), (20, 32), (5, 70), (3, 200), (2, 256), (1, 257), (3, 3000)]:
        x, raw = inputs(rows, features, 2, "linear", torch.float32)
        first, second = check(x, raw, 2, "linear", "nflows", False)
        assert first.launches == 1 + (first.parts > 1) and second.launches == 1
        assert first.threads >= first.tile_rows * first.tile_features > first.threads - 32
        found.add((first.tile_rows, first.tile_features, first.threads, first.parts))
    assert found == {
        (96, 1, 96, 1),
        (16, 6, 96, 1),
        (3, 32, 96, 1),
        (3, 70, 224, 1),
        (1, 200, 224, 1),
        (1, 256, 256, 1),
        (1, 129, 160, 2),
        (1, 250, 256, 12),
    }


def test_small_launches_are_spread_over_the_gpu() -> None:
    x, raw = inputs(50, 16, 8, "linear", torch.float32)
    for launch in check(x, raw, 8, "linear", "nflows", False, multiprocessors=100):
        assert (launch.threads, launch.tile_rows, launch.blocks) == (32, 2, 25)


def test_no_rows_launch_nothing_and_no_features_give_0() -> None:
    for launch in check(*inputs(0, 8, 4, "linear", torch.float32), 4, "linear", "nflows", False):
        assert launch.launches == 0
    _, logdet = forward(
        *inputs(300, 0, 4, "linear", torch.float32),
        4,
        "linear",
        "nflows",
        False,
        launch=SplineLaunch(),
    )
    assert torch.equal(logdet, torch.zeros(300))


@pytest.mark.values
def test_the_same_bits_every_time() -> None:
    x, raw = inputs(2, 3000, 2, "linear", torch.float32)
    runs = [forward(x, raw, 2, "linear", "nflows", False, launch=SplineLaunch(multiprocessors=n)) for n in (4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", TAILS)
def test_edges(tails: str, inverse: bool, form: str) -> None:
    """Coordinates on knots, at the ends of the box, next to them and far outside."""
    x, raw = inputs(20, 3, 8, tails, torch.float64)
    low = 1e-3
    widths = raw[..., 8:16] if inverse else raw[..., :8]
    if form == "zuko":
        widths, low = widths / (1 + (2 * widths / math.log(1e-3)).abs()), 0.0
    knots = reference._knots(widths, -2.0, 2.0, low)
    x[:9] = torch.stack([knots[i, :, i] for i in range(9)])
    x[9:17] = torch.tensor([-2.0, 2.0, -2 - 1e-12, 2 + 1e-12, -2 + 1e-12, 2 - 1e-12, 1e6, -1e6]).double()[:, None]
    # on a knot the log-det has one slope to the left and another to the right
    check(x, raw, 8, tails, form, inverse, weight=0.0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_parameters_stay_finite(dtype: torch.dtype, inverse: bool) -> None:
    x, raw = inputs(64, 4, 8, "linear", dtype, spread=300.0)
    options = 8, "linear", "nflows", inverse
    y, logdet = forward(x, raw, *options, launch=SplineLaunch())
    ones = torch.ones_like(x), torch.ones_like(logdet)
    for found in (y, logdet, *backward(*ones, x, raw, *options, launch=SplineLaunch())):
        if found.dtype == torch.float16 and found.shape == raw.shape:
            assert not found.isnan().any()  # some are beyond 65504
        else:
            assert found.isfinite().all()


def test_nan_stays_where_it_is() -> None:
    x, raw = inputs(40, 3, 8, "linear", torch.float32)
    x[5, 1] = torch.nan
    y, logdet = forward(x, raw, 8, "linear", "nflows", False, launch=SplineLaunch())
    at = torch.zeros(40, 3, dtype=torch.bool)
    at[5, 1] = True
    assert torch.equal(y.isnan(), at)
    assert not logdet[torch.arange(40) != 5].isnan().any()
    grad_x, grad_raw = backward(
        y.nan_to_num(), logdet.nan_to_num(), x, raw, 8, "linear", "nflows", False, launch=SplineLaunch()
    )
    assert not grad_x[~at].isnan().any() and not grad_raw[~at].isnan().any()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_gradients_far_outside_are_those_of_the_identity(tails: str, form: str, inverse: bool) -> None:
    x = torch.tensor([[math.inf, -math.inf, 1e38, -1e38, 0.1]])
    raw = inputs(1, 5, 4, tails, torch.float32)[1]
    grads = torch.full_like(x, 100.0), torch.ones(1)
    grad_x, grad_raw = backward(*grads, x, raw, 4, tails, form, inverse, launch=SplineLaunch())
    assert torch.equal(grad_x[0, :4], grads[0][0, :4]) and not grad_raw[0, :4].any() and grad_raw[0, 4].isfinite().all()


@pytest.mark.values
@pytest.mark.parametrize("form", FORMS)
def test_a_box_that_is_not_square(form: str) -> None:
    x, raw = inputs(30, 4, 6, "none", torch.float64)
    for inverse in (False, True):
        check(x, raw, 6, "none", form, inverse, box=(-1.0, 0.5, 0.0, 2.0))


@pytest.mark.values
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tails", TAILS)
def test_the_inverse_undoes_the_forward_map(tails: str, form: str) -> None:
    x, raw = inputs(40, 5, 8, tails, torch.float64)
    y, logdet = forward(x, raw, 8, tails, form, False, launch=SplineLaunch())
    back, back_logdet = forward(y, raw, 8, tails, form, True, launch=SplineLaunch())
    assert_close(back, x, rtol=1e-9, atol=1e-9)
    assert_close(back_logdet, -logdet, rtol=1e-8, atol=1e-8)


def run(x: Tensor, raw: Tensor, *options: Any) -> list[Tensor]:
    """As the tests of every backend call it (spline_cases.py)."""
    bins, tails, form, box, inverse = options
    y, logdet = forward(x, raw, bins, tails, form, inverse, launch=SplineLaunch(), box=box)
    grads = spline_cases.weights(x, logdet.dtype)
    return [y, logdet, *backward(*grads, x, raw, bins, tails, form, inverse, launch=SplineLaunch(), box=box)]


@pytest.mark.values
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_are_exact(dtype: torch.dtype) -> None:
    spline_cases.check_ends(run, dtype, "cuda16" if dtype.itemsize == 2 else "cuda")


def test_what_is_not_finite_stays_so() -> None:
    spline_cases.check_not_finite(run, "cuda")


@pytest.mark.values
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_of_the_box_every_bit_stays(dtype: torch.dtype) -> None:
    spline_cases.check_identity(run, dtype)


@pytest.mark.values
def test_strong_raw_values_against_the_truth() -> None:
    spline_cases.check_strong_values(run, "cuda")


@pytest.mark.values
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logdets_of_long_rows(dtype: torch.dtype) -> None:
    """Of a row that many blocks share. Every term is the log of the slope of the first knot, of a size whose multiples round
    to one side."""
    slope = math.log(math.expm1(math.exp(0.618793) - 1e-3))
    x, raw = torch.full((1, 1), -2.0, dtype=dtype), torch.tensor([[[0.0, 0.0, slope, 0.0]]], dtype=dtype)
    options = 1, "none", "nflows", False
    (term,) = forward(x, raw, *options, launch=SplineLaunch())[1]
    features, launch = 196_608, SplineLaunch()
    found = forward(x.repeat(1, features), raw.expand(1, features, 4), *options, launch=launch)[1]
    assert launch.parts == 768
    check_sums(found, term.expand(1, features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_vanishing_bins(dtype: torch.dtype) -> None:
    def run(x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        job = spline(x, raw, 8, "linear", "nflows", inverse, box=(-3.0, 3.0, -3.0, 3.0))
        job.min_width = job.min_height = 0.0
        y, logdet = torch.empty_like(x), x.new_empty(len(x))
        arguments = (
            type_name(x.dtype),
            ctypes.byref(job),
            matrix(x),
            data(y),
            data(logdet),
            ctypes.byref(SplineLaunch()),
        )
        call(load("spline_coupling").spline_forward, *arguments)
        return y, logdet

    spline_cases.check_ends_of_vanishing_bins(run, dtype)
