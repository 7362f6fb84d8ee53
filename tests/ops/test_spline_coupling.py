"""spline_coupling: the C++ code agrees with the definition, and is a bijection. Against nflows and zuko: test_spline_peers.py."""

import itertools
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import with_gradients
from op_cases import BACKEND, FORMS, SPLINE_COUPLING, cases, environment, spline_inputs
from torch import Tensor

import iin_fast
from iin_fast.functional import rational_quadratic_spline, spline_coupling
from iin_fast.ops import spline_coupling as op
from iin_fast.ops.spline_coupling import parameter_count

TAILS = [None if name == "none" else name for name in op.TAILS]


@pytest.mark.parametrize(("kind", "codes"), [("Tails", op.TAILS), ("Parameterization", op.PARAMETERIZATIONS)])
def test_codes_are_those_of_the_library(kind: str, codes: dict[str, int]):
    header = (Path(__file__).parents[2] / "csrc/spline_coupling/spline_coupling.h").read_text()
    found = re.search(rf"enum class {kind} : int64_t {{(.*?)}}", header)
    assert found and {name: int(code) for name, code in re.findall(r"(\w+) = (\d+)", found[1])} == codes


def both(x: Tensor, raw: Tensor, **options: Any) -> list[list[Tensor]]:
    """Values and gradients of the kernels and of the definition."""
    return [with_gradients(partial(spline_coupling, **options), (x, raw), name) for name in (BACKEND, "reference")]


@pytest.mark.triton
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("rows", "features", "bins"), cases(SPLINE_COUPLING))
def test_against_the_definition(tails, form, inverse, rows, features, bins) -> None:
    x, raw = spline_inputs(rows, features, bins, tails)
    if x.numel() > 1:
        x.view(-1)[0], x.view(-1)[1] = 2.0, -50.0  # the end of the box, and far outside
    options = {"bins": bins, "tails": tails, "tail_bound": 2.0, "parameterization": form, "inverse": inverse}
    ours, truth = both(x, raw, **options)
    for found, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.triton
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype, inverse) -> None:
    """As close to the float64 truth as the definition in the same type, up to a small factor."""
    x, raw = spline_inputs(40, 6, 8, "linear", dtype, spread=0.7)
    options = {"bins": 8, "tail_bound": 3.0, "inverse": inverse}
    ours, plain = both(x, raw, **options)
    truth = both(x.double(), raw.double(), **options)[1]
    assert ours[1].dtype == torch.float32
    for found, same_type, expected in zip(ours, plain, truth, strict=True):
        errors = ((t.double() - expected).abs().flatten().quantile(0.9) for t in (found, same_type))
        error, plain_error = errors  # not the worst element: that of a narrow bin is a matter of luck
        assert error <= 2 * plain_error + torch.finfo(found.dtype).eps * expected.abs().mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tails", TAILS)
def test_bijection(form, tails) -> None:
    x, raw = spline_inputs(64, 5, 8, tails)
    options = {"bins": 8, "tails": tails, "tail_bound": 2.0, "parameterization": form}
    y, logdet = spline_coupling(x, raw, **options)
    back, back_logdet = spline_coupling(y, raw, inverse=True, **options)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back_logdet, -logdet, rtol=1e-8, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(lambda v: spline_coupling(v, raw[:1], **options)[0], x[:1])
    torch.testing.assert_close(jacobian.reshape(5, 5).slogdet().logabsdet, logdet[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(tails, form, inverse) -> None:
    x, raw = spline_inputs(3, 2, 4, tails, spread=0.8, seed=3)
    inputs = x.requires_grad_(), raw.requires_grad_()
    options = {"bins": 4, "tails": tails, "tail_bound": 2.0, "parameterization": form, "inverse": inverse}
    assert torch.autograd.gradcheck(lambda a, b: spline_coupling(a, b, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: spline_coupling(a, b, **options), inputs, fast_mode=True)


def test_extreme_parameters_stay_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        x, raw = spline_inputs(64, 4, 8, "linear", dtype, spread=300.0)
        inputs = x.requires_grad_(), raw.requires_grad_()
        for inverse in (False, True):
            y, logdet = spline_coupling(*inputs, bins=8, tail_bound=3.0, inverse=inverse)
            assert y.isfinite().all() and logdet.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad([y.sum() + logdet.sum()], inputs))


@pytest.mark.triton
def test_layouts() -> None:
    """Slices of a wider output, expanded parameters, the flat form and more dimensions give what a plain tensor gives."""
    x, raw = spline_inputs(6, 4, 8, "linear")
    expected = spline_coupling(x, raw, bins=8)
    wide = torch.randn(6, 4, 40, dtype=torch.float64)
    wide[..., 9:32] = raw
    for found in (
        spline_coupling(x, wide[..., 9:32], bins=8),
        spline_coupling(x, raw.reshape(6, -1), bins=8),
        spline_coupling(x.t().contiguous().t(), raw.transpose(0, 1).contiguous().transpose(0, 1), bins=8),
        spline_coupling(x.reshape(6, 2, 2), raw.reshape(6, 2, 2, 23), bins=8),
    ):
        torch.testing.assert_close(found[0].reshape(6, 4), expected[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    same = spline_coupling(x, raw[:1].expand(6, 4, 23), bins=8)[0]
    torch.testing.assert_close(same, spline_coupling(x, raw[:1].repeat(6, 1, 1), bins=8)[0], rtol=0, atol=0)


def copies(function, *inputs) -> set[str]:
    """The copying operations of torch in a forward and backward, also those inside of the ops."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = function(*inputs)
        torch.autograd.grad(outputs, inputs, [torch.ones(t.shape) for t in outputs])
    copying = {"aten::clone", "aten::cat"}
    if BACKEND != "triton":  # whose interpreter copies every tensor to and fro
        copying.add("aten::copy_")
    return {event.key for event in profile.key_averages()} & copying


@pytest.mark.triton
def test_slices_are_read_in_place() -> None:
    """Raw values side by side in a wider tensor, as slices of one, or in three tensors: neither direction copies them."""
    x = torch.zeros(6, 4).requires_grad_()
    wide, rows = torch.zeros(6, 4, 40).requires_grad_(), torch.zeros(6, 4 * 23 + 9).requires_grad_()
    for packed in (wide[..., 9:32], rows[:, 4:-5]):
        assert not copies(lambda x, packed: spline_coupling(x, packed, bins=8), x, packed)
    parts = wide[..., 9:32].split([8, 8, 7], -1)
    assert not copies(rational_quadratic_spline, x, *parts)
    assert not copies(rational_quadratic_spline, x, *(part.clone() for part in parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("bins", [1, 2, 3, 7, 8, 16, 17])
def test_three_tensors_give_what_one_gives(dtype, tails, bins) -> None:
    """Bit for bit, whatever lies between the rows: fewer values than a vector has lanes must not read or write beyond them."""
    for inverse, form, n in itertools.product([False, True], FORMS, [1, 5, 16, 37]):
        x, packed = spline_inputs(n, 1, bins, tails, dtype)
        counts = bins, bins, packed.shape[-1] - 2 * bins
        options = {"tails": tails, "inverse": inverse, "parameterization": form}
        options |= {"tail_bound": 2.0} if tails else {}
        found = []
        for gap in (None, 0, 3):
            inputs = [x[:, 0].clone().requires_grad_()]
            if gap is None:
                inputs.append(packed[:, 0].clone().requires_grad_())
                parts: tuple[Tensor, ...] = inputs[1].split(counts, -1)
            else:
                held = [torch.full((n, count + gap), torch.nan, dtype=dtype) for count in counts]
                for part, values in zip(held, packed[:, 0].split(counts, -1), strict=True):
                    part[:, : values.shape[-1]] = values
                parts = tuple(part[:, :count].requires_grad_() for part, count in zip(held, counts, strict=True))
                inputs += parts
            y, logdet = rational_quadratic_spline(inputs[0], *parts, **options)
            grads = torch.autograd.grad(y.sin().sum() + logdet.sum(), inputs, allow_unused=True)
            raw = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs[1:], grads[1:], strict=True)]
            found.append([y, logdet, grads[0], torch.cat(raw, -1)])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a, b), (inverse, form, n)


@pytest.mark.triton
@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inverse", [False, True])
def test_three_tensors_against_the_definition(tails, form, inverse) -> None:
    """In float64, with odd strides, as one spline for all, and where none has a derivative."""
    options = {"tails": tails, "inverse": inverse, "parameterization": form} | ({"tail_bound": 2.0} if tails else {})
    for bins in (1, 5):
        x, packed = spline_inputs(9, 1, bins, tails)
        parts = packed[:, 0].tensor_split((bins, 2 * bins), -1)
        held = [torch.full((2 * 9, part.shape[1] + 3), torch.nan, dtype=torch.float64) for part in parts]
        for part, values in zip(held, parts, strict=True):
            part[::2, 1 : 1 + values.shape[1]] = values
        odd = [part[::2, 1 : 1 + values.shape[1]] for part, values in zip(held, parts, strict=True)]
        for given in (odd, [part[:1].expand(9, -1) for part in odd]):
            found = []
            for name in (BACKEND, "reference"):
                leaves = [t.detach().requires_grad_() for t in (x[:, 0], *given)]  # with the strides that they have
                with iin_fast.backend(name):
                    y, log = rational_quadratic_spline(*leaves, **options)
                grads = torch.autograd.grad(y.sin().sum() + log.sum(), leaves, materialize_grads=True)
                found.append([y, log, *grads])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    small = [t.detach().clone().requires_grad_() for t in (x[:3, 0], *(part[:3] for part in odd))]
    assert torch.autograd.gradcheck(partial(rational_quadratic_spline, **options), small, fast_mode=True)


@pytest.mark.triton
def test_three_tensors_of_any_shape_and_layout() -> None:
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    parts = [torch.randn(count, 3, 5, 4, dtype=torch.float64).permute(2, 3, 1, 0) for count in (6, 6, 5)]
    expected = spline_coupling(x.reshape(-1, 1), torch.cat(parts, -1).reshape(60, 1, 17), bins=6, tail_bound=2.0)
    y, logdet = rational_quadratic_spline(x, *parts, tail_bound=2.0)
    assert torch.equal(y.reshape(-1), expected[0][:, 0]) and torch.equal(logdet.reshape(-1), expected[1])
    row = [part[:1, :1, :1].expand(5, 4, 3, -1) for part in parts]  # one spline for all elements
    assert torch.equal(
        rational_quadratic_spline(x, *row)[0], rational_quadratic_spline(x, *(part.clone() for part in row))[0]
    )
    none = rational_quadratic_spline(x[:0], *(part[:0] for part in parts))
    assert none[0].shape == none[1].shape == (0, 4, 3)


@pytest.mark.triton
def test_slices_and_tensors_of_their_own_give_the_same() -> None:
    x, packed = spline_inputs(6, 4, 5, "linear")
    wide = torch.cat([packed, packed], -1).requires_grad_()
    x.requires_grad_()
    found = []
    for start in (0, 14):
        slices = wide[..., start : start + 14].split([5, 5, 4], -1)
        for parts in (slices, [part.clone() for part in slices], (slices[0], slices[1].clone(), slices[2])):
            outputs = rational_quadratic_spline(x, *parts, tail_bound=2.0)
            by_x, by_wide = torch.autograd.grad(outputs[0].sin().sum() + outputs[1].sum(), (x, wide))
            assert not by_wide[..., 14 - start : 28 - start].any()
            found.append([*outputs, by_x, by_wide[..., start : start + 14]])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    slices = wide.detach()[..., :14].split([5, 5, 4], -1)
    swapped = slices[1], slices[0], slices[2]  # of one tensor, but in another order
    torch.testing.assert_close(
        rational_quadratic_spline(x, *swapped), rational_quadratic_spline(x, *(part.clone() for part in swapped))
    )
    small = wide.detach()[:2, :2, :14].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda a, p: rational_quadratic_spline(a, *p.split([5, 5, 4], -1), tail_bound=2.0),
        (x[:2, :2], small),
        fast_mode=True,
    )


@pytest.mark.parametrize("changed", range(3))
def test_neighbours_with_counters_of_their_own(changed: int) -> None:
    """Parameters that are views of one memory: what is written into one of them before backward is noticed."""
    flat = torch.randn(6, 11)
    parts = [torch.nn.Parameter(view.data) for view in (flat[:, :4], flat[:, 4:8], flat[:, 8:])]
    y, _ = rational_quadratic_spline(torch.rand(6), *parts)
    with torch.no_grad():
        parts[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_slices_under_transforms() -> None:
    x, packed = spline_inputs(6, 4, 5, "linear")
    direction = torch.ones_like(packed)

    def run(packed: Tensor) -> Tensor:
        y, log = rational_quadratic_spline(x, *packed.split([5, 5, 4], -1), tail_bound=2.0)
        return y.sin().sum() + log.sum()

    slope = (torch.autograd.functional.jacobian(run, packed) * direction).sum()
    torch.testing.assert_close(torch.func.jvp(run, (packed,), (direction,))[1], slope)
    torch.testing.assert_close(torch.func.vmap(run)(packed[None])[0], run(packed))
    with torch.autograd.forward_ad.dual_level():
        dual = run(torch.autograd.forward_ad.make_dual(packed, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)


def test_nan_stays_visible() -> None:
    x, raw = spline_inputs(2, 2, 4, "linear")
    x[0, 0] = float("nan")
    y, logdet = spline_coupling(x, raw, bins=4)
    assert y[0, 0].isnan() and not y[1].isnan().any() and not logdet[1].isnan()


@pytest.mark.triton
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_box_that_is_not_square(form, inverse) -> None:
    x, raw = spline_inputs(30, 4, 6, None)
    options = {"bins": 6, "tails": None, "box": (-1.0, 0.5, 0.0, 2.0), "parameterization": form, "inverse": inverse}
    for found, expected in zip(*both(x, raw, **options), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inverse", [False, True])
def test_beyond_an_open_box_the_slope_is_that_of_the_outer_knot(inverse) -> None:
    """In float32 to a few units in the last place: the bend of 64 narrow bins must not come in."""
    x, raw = spline_inputs(200, 1, 64, None, torch.float32)
    x = torch.where(x < 0, x - 2, x + 2)
    logdet = spline_coupling(x, raw, bins=64, tails=None, tail_bound=2.0, inverse=inverse)[1]
    knot = torch.where(x < 0, raw[..., 128], raw[..., -1])[:, 0].double()
    slope = 1e-3 + torch.nn.functional.softplus(knot)
    torch.testing.assert_close(logdet.double(), -slope.log() if inverse else slope.log(), rtol=2e-6, atol=2e-6)


@pytest.mark.triton
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_gradients_far_outside_are_those_of_the_identity(tails, form, inverse) -> None:
    """Where the spline doesn't count, nothing that overflows beside it does either."""
    x = torch.tensor([[math.inf, -math.inf, 1e38, -1e38, 0.1]]).requires_grad_()
    raw = torch.randn(1, 5, parameter_count(4, tails), generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = {"bins": 4, "tails": tails, "parameterization": form, "inverse": inverse}
    y, logdet = spline_coupling(x, raw, **options)
    by_x, by_raw = torch.autograd.grad(100 * y.sum() + logdet.sum(), (x, raw))
    assert torch.equal(y[0, :4], x[0, :4]) and logdet.isfinite()
    assert (
        torch.equal(by_x[0, :4], torch.full((4,), 100.0)) and not by_raw[0, :4].any() and by_raw[0, 4].isfinite().all()
    )


def worst_errors() -> dict[str, float]:
    """Over forms, tails, directions and bins: float64 from the definition, at worst; float32 from the definition in float64,
    at worst and at the 90 % quantile, as a narrow bin multiplies rounding."""
    worst = {"float64": 0.0, "float32": 0.0, "float32, 90 %": 0.0}
    for form, tails, inverse, bins in itertools.product(FORMS, TAILS, (False, True), (1, 8, 64)):
        options = {"bins": bins, "tails": tails, "tail_bound": 2.0, "parameterization": form, "inverse": inverse}
        x, raw = spline_inputs(
            37, 3, bins, tails, torch.float32, spread=1.0
        )  # the last block of every instruction set is part full
        single = both(x, raw, **options)[0]
        double, truth = both(x.double(), raw.double(), **options)
        for ours, rounded, expected in zip(double, single, truth, strict=True):
            if expected.numel():
                scale = 1 + expected.abs()
                errors = ((rounded - expected).abs() / scale).flatten()
                found = ((ours - expected).abs() / scale).max(), errors.max(), errors.quantile(0.9)
                worst = {name: max(v, e.item()) for (name, v), e in zip(worst.items(), found, strict=True)}
    return worst


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa) -> None:
    program = "import json, test_spline_coupling as t; print(json.dumps(t.worst_errors()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(isa))
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    assert worst["float64"] < 1e-10 and worst["float32"] < 2e-3 and worst["float32, 90 %"] < 3e-5, worst


@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(inverse) -> None:
    x, raw = spline_inputs(3, 2, 4, "linear")
    options = (4, 0, 0, -1.0, 1.0, -1.0, 1.0, 1e-3, 1e-3, 1e-3, inverse)
    x, raw = x.requires_grad_(), raw.requires_grad_()
    torch.library.opcheck(torch.ops.iin_fast.spline_coupling, (x, raw, None, None, *options))
    three = [part.contiguous() for part in raw.detach().split([4, 4, 3], -1)]
    torch.library.opcheck(torch.ops.iin_fast.spline_coupling, (x, *(part.requires_grad_() for part in three), *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 0}, "ValueError: bins is 0, expected a positive integer"),
        ({"bins": 8.0}, "TypeError: bins is 8.0, expected a positive integer"),
        ({"bins": "8"}, "TypeError: bins is '8', expected a positive integer"),
        ({"bins": True}, "TypeError: bins is True, expected a positive integer"),
        (
            {"bins": 9},
            r"ValueError: parameters has shape \[2, 3, 23\], expected \[2, 3, 26\]: 9 widths, 9 heights and 8 derivatives",
        ),
        ({"tails": "square"}, "ValueError: tails is 'square', expected 'linear', 'circular' or None"),
        ({"tail_bound": 0.0}, "ValueError: tail_bound is 0.0, expected a number above 0"),
        ({"tail_bound": "3"}, "TypeError: tail_bound is '3', expected a finite number"),
        ({"tail_bound": math.inf}, "ValueError: tail_bound is inf, expected a finite number"),
        ({"min_bin_width": 0.2}, "ValueError: min_bin_width is 0.2, expected between 0 and 1 / bins = 0.125"),
        ({"min_bin_height": math.nan}, "ValueError: min_bin_height is nan, expected a finite number"),
        ({"min_derivative": math.inf}, "ValueError: min_derivative is inf, expected a finite number"),
        ({"min_derivative": None}, "TypeError: min_derivative is None, expected a finite number"),
        ({"parameterization": "glow"}, "ValueError: parameterization is 'glow'"),
        (
            {"parameterization": "zuko", "min_derivative": 1.5},
            "ValueError: min_derivative is 1.5, expected a slope between 0 and 1",
        ),
        ({"box": (0, 1, 0, 1)}, "ValueError: box is .*, expected None with tails 'linear'"),
        (
            {"tails": None, "box": (0, 1, 0)},
            r"ValueError: box is \(0, 1, 0\), expected four numbers: left, right, bottom, top",
        ),
        ({"tails": None, "box": (0, math.inf, 0, 1)}, "ValueError: an edge of box is inf, expected a finite number"),
        ({"tails": None, "box": (1, 1, 0, 1)}, "ValueError: box is .*, expected left < right and bottom < top"),
    ],
)
def test_bad_arguments(options, message) -> None:
    kind, _, text = message.partition(": ")
    with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[kind], match="spline_coupling: " + text):
        spline_coupling(torch.zeros(2, 3), torch.zeros(2, 3, 23), **({"bins": 8} | options))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((None, (2, 4), (2, 3)), "TypeError: widths is a NoneType, expected a torch.Tensor"),
        (
            ((2, 0), (2, 0), (2, 3)),
            r"ValueError: widths has shape \[2, 0\], expected \[2, 'bins'\], of one bin at least",
        ),
        (((2, 4), (2, 5), (2, 3)), r"ValueError: heights has shape \[2, 5\], expected \[2, 4\]"),
        (((2, 4), (2, 4), (2, 4)), r"ValueError: derivatives has shape \[2, 4\], expected \[2, 3\]"),
    ],
)
def test_bad_tensors(shapes, message) -> None:
    kind, _, text = message.partition(": ")
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[kind], match="quadratic_spline: " + text):
        rational_quadratic_spline(torch.zeros(2), *tensors)


def test_tensors_without_data() -> None:
    """A model can be planned on the meta device."""
    y, logdet = spline_coupling(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, 23, device="meta"), bins=8)
    assert y.shape == (2, 3) and logdet.shape == (2,) and y.is_meta


def test_gradients_with_a_graph_when_inputs_depend_on_each_other() -> None:
    x = torch.linspace(-0.8, 0.7, 6, dtype=torch.float64).view(3, 2).requires_grad_()
    y, logdet = spline_coupling(x, x[..., None].sin() * torch.arange(8.0, dtype=torch.float64), bins=3)
    total = y.sum() + logdet.sum()
    (with_graph,) = torch.autograd.grad(total, x, create_graph=True)
    (without,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(with_graph, without)


@pytest.mark.triton
@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives_where_parameters_depend_on_x(inverse: bool) -> None:
    """What the parameters owe to x counts once, as autograd has it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 22, generator=generator, dtype=torch.float64)
    x = torch.rand(3, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        y, logdet = spline_coupling(x, (x @ weight).tanh(), bins=4, tail_bound=2.0, inverse=inverse)
        return y.sum() + logdet.sum()

    assert torch.autograd.gradgradcheck(run, x)
