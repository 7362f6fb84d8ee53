"""FrEIA's spline where its raw parameters are far out: values and gradients of a stand-in are those of the textbook formula.

The stand-in has the parts of FrEIA's spline that the fast form asks for, so that it is tested where FrEIA is not installed.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from iin_fast.dropin.freia import SOFTPLUS_ONE, _scaled_slope, _spline

BINS = 4
DTYPES = [torch.float32, torch.float64]
FAR = [-1e4, -800.0, -200.0, -110.0, -104.5, -95.0, -60.0, -45.0, -30.0, -8.0, 8.0, 30.0, 60.0]


class Base:
    """The box, 6 wide and high at raw 0, and positive sizes of at least ``smallest``."""

    default_width, default_domain = 6.0, torch.tensor(0.0)

    def __init__(self, tails: str, smallest: float, dtype: torch.dtype) -> None:
        self.smallest, self.default_domain = smallest, torch.zeros(4, dtype=dtype)
        ends = {"total_width": 1} if tails == "identity" else {"left": 1, "bottom": 1}
        self.parameter_counts = {"widths": BINS, "heights": BINS, **ends, "deltas": BINS - 1}

    def split_parameters(self, raw: Tensor, length: int) -> dict[str, Tensor]:
        parts = raw.unflatten(-1, (length, -1)).split(list(self.parameter_counts.values()), -1)
        return dict(zip(self.parameter_counts, parts, strict=True))

    def clamp_domain(self, domain: Tensor) -> Tensor:
        return domain

    def constrain_parameters(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = {name: self.smallest + F.softplus(p[name] + SOFTPLUS_ONE) for name in ("widths", "heights")}
        return p | sizes | {name: p[name] - 3 for name in ("left", "bottom")}


def textbook(base: Base, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:  # [rows, 1], [rows, 1, values]
    """Durkan et al. 2019, eq. 4 and 5, with straight lines beyond the box."""
    p = base.split_parameters(raw.flatten(-2), 1)
    if "total_width" in p:
        total = 6 * F.softplus(p["total_width"] + SOFTPLUS_ONE)
        p |= {name: total * p[name].softmax(-1) for name in ("widths", "heights")}
        p["left"] = p["bottom"] = -total / 2
    else:
        p = base.constrain_parameters(p)
    scale = p["heights"].sum(-1, keepdim=True) / p["widths"].sum(-1, keepdim=True)
    slopes = torch.cat([scale, F.softplus(p["deltas"] + SOFTPLUS_ONE), scale], -1)
    left, bottom = (
        torch.cat([p[end], p[end] + p[sizes].cumsum(-1)], -1)
        for end, sizes in (("left", "widths"), ("bottom", "heights"))
    )
    k = (x[..., None] >= left[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (v.gather(-1, i).squeeze(-1) for v in (left, bottom, slopes) for i in (k, k + 1))
    inside = (x > left[..., 0]) & (x <= left[..., -1])
    s, t = (y1 - y0) / (x1 - x0), (torch.where(inside, x, (x0 + x1) / 2) - x0) / (x1 - x0)
    bottom_line = s + (d0 + d1 - 2 * s) * t * (1 - t)
    y = y0 + (y1 - y0) * (s * t**2 + d0 * t * (1 - t)) / bottom_line
    logdet = (s**2 * (d1 * t**2 + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2) / bottom_line**2).log()
    scale = scale.squeeze(-1)
    line = (x - p["left"].squeeze(-1)) * scale + p["bottom"].squeeze(-1)
    return torch.where(inside, y, line), torch.where(inside, logdet, scale.log())


def fast(base: Base, x: Tensor, raw: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
    block = SimpleNamespace(spline_base=base, net=lambda u: u, length=1)

    def original(*args: Any) -> Any:
        raise AssertionError("the library's own code ran")

    return _spline("net", "length")(original, block, x, raw.flatten(1), rev)


def case(tails: str, smallest: float, part: str, value: float, dtype: torch.dtype) -> tuple[Base, Tensor, Tensor]:
    base = Base(tails, smallest, dtype)
    random = torch.Generator().manual_seed(0)
    raw = torch.randn(1, sum(base.parameter_counts.values()), generator=random, dtype=torch.float64)
    start = list(base.parameter_counts).index(part)
    raw[0, sum(list(base.parameter_counts.values())[:start])] = value
    x = torch.linspace(-5, 5, 40, dtype=torch.float64)[:, None]
    return base, x.to(dtype), raw.expand(40, 1, -1).to(dtype)


def gradients(found: tuple[Tensor, Tensor], *wanted: Tensor, graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(found[0].sum() + 0.7 * found[1].sum(), wanted, create_graph=graph)


PARTS = [
    *((tails, 0.1, part) for tails in ("lines", "identity") for part in ("widths", "heights", "deltas")),
    *(("lines", 0.0, part) for part in ("widths", "heights", "deltas")),
    ("identity", 0.0, "total_width"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))
@pytest.mark.parametrize("value", FAR)
@pytest.mark.parametrize("tails, smallest, part", PARTS)
def test_values_and_gradients(tails: str, smallest: float, part: str, value: float, dtype: torch.dtype) -> None:
    base, x, raw = case(tails, smallest, part, value, dtype)
    x, raw = x.requires_grad_(), raw.clone().requires_grad_()
    y, logdet = fast(base, x, raw)
    found = (y, logdet, *gradients((y, logdet), x, raw))
    assert all(t.isfinite().all() for t in found)
    # Sizes near 0 are differences of knots, exact to few digits; of those only what is finite is asked.
    if part == "deltas" or abs(value) < 10 or (part != "total_width" and (tails, smallest) == ("lines", 0.1)):
        true_x, true_raw = x.detach().double().requires_grad_(), raw.detach().double().requires_grad_()
        want = textbook(base, true_x, true_raw)
        limit = 1e-3 if dtype == torch.float32 else 1e-9
        for got, true in zip(found[2:], gradients(want, true_x, true_raw), strict=True):
            assert float((got - true).abs().max()) < limit * max(1, float(true.abs().max()))
        torch.testing.assert_close(y.double(), want[0], rtol=limit, atol=limit)
        torch.testing.assert_close(logdet.double(), want[1].flatten(1).sum(1), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))
@pytest.mark.parametrize("value", [-1e4, -110.0, -60.0, 20.0])
def test_the_inverse_leads_back_and_has_finite_gradients(value: float, dtype: torch.dtype) -> None:
    base, x, raw = case("lines", 0.1, "deltas", value, dtype)
    y, logdet = fast(base, x, raw)
    y, raw = y.requires_grad_(), raw.clone().requires_grad_()
    back = fast(base, y, raw, rev=True)
    torch.testing.assert_close(back[0], x, rtol=1e-3, atol=1e-3)
    assert all(t.isfinite().all() for t in gradients(back, y, raw))


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))
@pytest.mark.parametrize("value", [-1e4, -800.0, -110.0, -95.0, -60.0, -45.0])
def test_second_derivatives_are_finite(value: float, dtype: torch.dtype) -> None:
    for tails, smallest, part in [("lines", 0.1, "deltas"), ("lines", 0.0, "widths"), ("identity", 0.0, "total_width")]:
        base, x, raw = case(tails, smallest, part, value, dtype)
        x, raw = x.requires_grad_(), raw.clone().requires_grad_()
        first = gradients(fast(base, x, raw), x, raw, graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, raw))
        assert all(t.isfinite().all() for t in second), (tails, part)


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))
@pytest.mark.parametrize("scale", [1e-6, 0.3, 1.0, 20.0, 1e6])
def test_a_scaled_slope(scale: float, dtype: torch.dtype) -> None:
    """softplus of the result is scale * softplus(raw); for low raw slopes the result is raw + log(scale)."""
    raw = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-41.0, -39.0, -80, -104.5, -1e4, 1e4])]).to(dtype)
    raw.requires_grad_()
    factor = torch.tensor(scale, dtype=dtype, requires_grad=True)
    found = _scaled_slope(raw, factor)
    eps = torch.finfo(dtype).eps
    middle = raw.abs() <= 30
    # torch's softplus is the identity from 20 on, which is 1e-10 off
    want = F.softplus(raw.double(), threshold=60) * factor.double()
    torch.testing.assert_close(
        F.softplus(found.double(), threshold=60)[middle], want[middle], rtol=200 * eps + 2e-10, atol=0
    )
    low = raw < -39.5
    torch.testing.assert_close(found[low], (raw + factor.log())[low], rtol=4 * eps, atol=4 * eps + 1e-12)
    first = torch.autograd.grad(found.sum(), (raw, factor), create_graph=True)
    assert all(g.isfinite().all() for g in first)
    torch.testing.assert_close(first[0][low], torch.ones_like(raw[low]))
    second = torch.autograd.grad(sum(g.sum() for g in first), (raw, factor))
    assert all(g.isfinite().all() for g in second)


NOT_FINITE = [
    *(("identity", part, value) for part in ("total_width", "widths", "heights") for value in (torch.nan, torch.inf)),
    *(("lines", part, torch.nan) for part in ("widths", "heights")),
]


@pytest.mark.parametrize("tails, part, value", NOT_FINITE)
def test_what_is_not_finite_stays_so(tails: str, part: str, value: float) -> None:
    base, x, raw = case(tails, 0.0, part, value, torch.float32)
    for rev in (False, True):
        y, logdet = fast(base, x, raw, rev)
        assert not y.isfinite().any() and not logdet.isfinite().any()


def test_a_scaled_slope_of_nan_is_nan() -> None:
    one = torch.ones(())
    assert _scaled_slope(one * torch.nan, one).isnan() and _scaled_slope(one, one * torch.nan).isnan()
