"""Inputs that have caught splines out, and what must hold of them: the tests of every backend share them."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from op_cases import BACKEND, FORMS, SPLINE_ENDS, SPLINE_NOT_FINITE, SPLINE_STRONG, TAILS, cases
from torch import Tensor

from iin_fast.ops.spline_coupling import parameter_count, reference

LEAST = 1e-3

Run = Callable[..., list[Tensor]]
"""run(x, raw, bins, tails, form, box, inverse): y, log-det, and the gradients of their weighted sum by x and raw. ``x`` is
[rows, features]; ``box`` is left, right, bottom, top."""


def definition(x: Tensor, raw: Tensor, bins: int, tails: str, form: str, box: Any, inverse: bool) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, raw)]
    outputs = reference.spline_coupling(*leaves, bins, tails, form, box, LEAST, LEAST, LEAST, inverse)
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, weights(x, outputs[1].dtype)))]


def weights(x: Tensor, logdet: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of y and of the log-det, in the sum that gradients are taken of. None is 0."""
    generator = torch.Generator().manual_seed(1)
    draws = (1 + torch.rand(shape, generator=generator, dtype=torch.float64) for shape in (x.shape, x.shape[:1]))
    return tuple(draw.to(dtype) for draw, dtype in zip(draws, (x.dtype, logdet), strict=True))  # type: ignore[return-value]


def elements(rows: int, bins: int, tails: str, spread: float, bound: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [rows, 1], a third of it outside of [-bound, bound], and raw values."""
    generator = torch.Generator().manual_seed(seed)
    x = bound * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    raw = spread * torch.randn(rows, 1, parameter_count(bins, tails), generator=generator, dtype=torch.float64)
    return x, raw


def check_ends(run: Run, dtype: torch.dtype, backend: str = BACKEND) -> None:
    """The bounds map to the bounds bit for bit, and nothing that lies in the box is mapped out of it."""
    for (bins, bound), spread in itertools.product(cases(SPLINE_ENDS, backend), (1.0, 6.0)):
        for tails, form, inverse in itertools.product(TAILS, FORMS, (False, True)):
            x, raw = (t.to(dtype) for t in elements(200, bins, tails, spread, bound))
            low, high = (torch.tensor(s * bound, dtype=dtype).item() for s in (-1, 1))
            x.clamp_(low, high)
            for i, start in enumerate((high, low)):  # the end itself, and the numbers next to it
                x[60 * i : 60 * i + 40] = start
                x[60 * i + 40 : 60 * i + 60] = torch.nextafter(
                    torch.tensor(start, dtype=dtype), torch.zeros((), dtype=dtype)
                )
            box = (-bound, bound, -bound, bound)
            y = run(x, raw, bins, tails, form, box, inverse)[0]
            case = f"{bins} bins, spread {spread}, bound {bound}, {tails}, {form}, inverse {inverse}"
            assert (y[:40] == high).all() and (y[60:100] == low).all(), case
            assert y.max() <= high and y.min() >= low, case


def check_not_finite(run: Run, backend: str = BACKEND) -> None:
    """NaN and infinities among x and the raw values: results and gradients are NaN or infinite just where those of the
    definition are, and a NaN that an element uses shows in its y and in its log-det."""
    chosen = cases(SPLINE_NOT_FINITE, backend)
    for (bins, rows), tails, form, inverse in itertools.product(chosen, TAILS, FORMS, (False, True)):
        x, raw = elements(rows, bins, tails, 1.0, 2.0)
        generator = torch.Generator().manual_seed(2)
        bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
        row = torch.arange(rows // 6, rows)  # the first ones stay as they are
        place = torch.randint(raw.shape[2] + 1, (len(row),), generator=generator)
        value = bad[torch.randint(3, (len(row),), generator=generator)]
        in_x = place == raw.shape[2]
        x[row[in_x], 0] = value[in_x]
        raw[row[~in_x], 0, place[~in_x]] = value[~in_x]
        options = bins, tails, form, (-2.0, 2.0, -2.0, 2.0), inverse
        found, truth = run(x, raw, *options), definition(x, raw, *options)
        for grad in (
            *found[2:],
            *truth[2:],
        ):  # of an infinite x: where autograd adds an infinity to its opposite, it has NaN
            grad[x[:, 0].isinf() & ~grad.flatten(1).isfinite().all(1)] = math.nan
        for name, got, want in zip(("y", "log-det", "by x", "by raw"), found, truth, strict=True):
            for what in (torch.isnan, torch.isposinf, torch.isneginf):
                differ = (what(got) != what(want)).flatten(1).any(1) if got.dim() > 1 else what(got) != what(want)
                at = differ.nonzero().flatten().tolist()
                assert not at, (
                    f"{name}, {what.__name__}, {options}: {[(x[i], raw[i], got[i], want[i]) for i in at[:2]]}"
                )
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7, equal_nan=True)
        y, logdet = found[:2]
        sizes = raw[:, 0, : 2 * bins]
        lost = x[:, 0].isnan() | ((sizes.isnan() | (sizes == math.inf)).any(1) & (x[:, 0].abs() <= 2))
        assert y[lost, 0].isnan().all() and logdet[lost].isnan().all(), options


def check_identity(run: Run, dtype: torch.dtype) -> None:
    """Outside of the box an element keeps every bit, also where the bound is no multiple of its last place, and whatever
    its raw values are."""
    for tails, form, inverse in itertools.product(("linear", "circular"), FORMS, (False, True)):
        x, raw = (t.to(dtype) for t in elements(500, 4, tails, 1.0, 5.0))
        raw[::2] = math.nan
        y, logdet, by_x, by_raw = run(x, raw, 4, tails, form, (-0.1, 0.1, -0.1, 0.1), inverse)
        outside = x[:, 0].abs() > 0.11
        assert torch.equal(y[outside], x[outside]) and not logdet[outside].any()
        assert torch.equal(by_x[outside], weights(x, logdet.dtype)[0][outside]) and not by_raw[outside].any()


def check_against_the_truth(found: list[Tensor], x: Tensor, raw: Tensor, *options: Any) -> None:
    """Values of finite inputs ``[rows, 1]``, against the definition in float64, moved as far as rounding may move them: x by
    some units in the last place of the box, and the knots alike."""
    y, logdet = (t.double() for t in found[:2])
    bins, tails, form, box, inverse = options
    step = 16 * torch.finfo(found[0].dtype).eps * box[1]
    truths = []
    for move in (-1.0, -0.5, 0.0, 0.5, 1.0):
        moved = definition(x.double() + move * step, raw.double(), *options)
        truths.append((moved[0], moved[1]))
    values, logs = (torch.stack(list(t)) for t in zip(*truths, strict=True))
    assert y.isfinite().all() and logdet.isfinite().all() and all(g.isfinite().all() for g in found[2:]), options
    assert (y >= values[0] - step).all() and (y <= values[-1] + step).all(), options  # the map is monotone
    room = 1e-3 + 4 * (logs.amax(0) - logs.amin(0))
    assert (logdet >= logs.amin(0) - room).all() and (logdet <= logs.amax(0) + room).all(), options


def check_strong_values(run: Run, backend: str = BACKEND) -> None:
    (rows,) = cases(SPLINE_STRONG, backend)
    for form, inverse in itertools.product(FORMS, (False, True)):
        x, raw = (t.float() for t in elements(rows, 8, "linear", 6.0, 3.0))
        options = 8, "linear", form, (-3.0, 3.0, -3.0, 3.0), inverse
        x.clamp_(-3, 3)
        check_against_the_truth(run(x, raw, *options), x, raw, *options)


def check_ends_of_vanishing_bins(run: Run, dtype: torch.dtype) -> None:
    """Where bins may be smaller than the rounding of the box, its ends are exact all the same, and nothing is NaN. Here
    run(x, raw, inverse) has no least width and height."""
    generator = torch.Generator().manual_seed(0)
    for spread, inverse in itertools.product((6.0, 50.0, 300.0), (False, True)):
        raw = (spread * torch.randn(300, 1, 23, generator=generator, dtype=torch.float64)).to(dtype)
        x = torch.cat([torch.full((100, 1), 3.0), torch.full((100, 1), -3.0), torch.linspace(-3, 3, 100)[:, None]])
        y, logdet = run(x.to(dtype), raw, inverse)
        assert torch.equal(y[:200], x[:200].to(dtype)), (spread, inverse)
        assert y.abs().max() <= 3 and not logdet.isnan().any(), (spread, inverse)
