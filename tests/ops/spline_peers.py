"""What spline_coupling is compared with: the splines of nflows and zuko, and inputs that are hard on all of them.

For test_spline_peers.py and benchmarks/spline_accuracy.py.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from iin_fast.functional import rational_quadratic_spline

BOUND, LEAST = 3.0, 1e-3  # LEAST: smallest bin and slope of nflows, smallest slope of zuko
NAMES = ("y", "log-det", "by x", "by widths", "by heights", "by derivatives")


def nflows() -> SimpleNamespace:
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    def run(x: Tensor, *raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return unconstrained_rational_quadratic_spline(x, *raw, inverse=inverse, tail_bound=BOUND)

    def knots(raw: Tensor) -> Tensor:
        sizes = LEAST + (1 - LEAST * raw.shape[-1]) * raw.softmax(-1)
        found = 2 * BOUND * F.pad(sizes.cumsum(-1), (1, 0)) - BOUND
        found[..., 0], found[..., -1] = -BOUND, BOUND
        return found

    return SimpleNamespace(name="nflows", run=run, knots=knots)


def zuko() -> SimpleNamespace:
    from zuko.transforms import MonotonicRQSTransform

    def run(x: Tensor, *raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        spline = MonotonicRQSTransform(*raw, bound=BOUND, slope=LEAST)
        return spline.inv.call_and_ladj(x) if inverse else spline.call_and_ladj(x)

    def knots(raw: Tensor) -> Tensor:
        shares = (raw / (1 + (2 * raw / math.log(LEAST)).abs())).softmax(-1)
        return BOUND * (2 * F.pad(shares, (1, 0)).cumsum(-1) - 1)

    return SimpleNamespace(name="zuko", run=run, knots=knots)


def ours(peer: SimpleNamespace) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, *raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(x, *raw, inverse=inverse, tail_bound=BOUND, parameterization=peer.name)

    return run


def case(
    peer: SimpleNamespace, bins: int, spread: float, inverse: bool, dtype: torch.dtype, random_rows: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    """x on every knot of its peer, on the numbers next to them, at the ends of the box, far outside, and at random; raw
    parameters; and which elements lie on a knot or beside one."""
    random = torch.Generator().manual_seed(0)
    rows = bins + 1 + random_rows
    x = (2.5 * torch.randn(rows, 4, generator=random, dtype=torch.float64)).to(dtype)
    raw = (spread * torch.randn(rows, 4, 3 * bins - 1, generator=random, dtype=torch.float64)).to(dtype)
    knots = peer.knots(raw[..., bins : 2 * bins] if inverse else raw[..., :bins])
    every = torch.arange(bins + 1)
    x[every, 0] = knots[every, 0, every]
    x[every, 1] = torch.nextafter(knots[every, 1, every], torch.tensor(math.inf, dtype=dtype))
    x[every, 2] = torch.nextafter(knots[every, 2, every], torch.tensor(-math.inf, dtype=dtype))
    x[:6, 3] = torch.tensor([-BOUND, BOUND, 1e6, -1e6, 1e30, -1e30], dtype=dtype)
    near = torch.zeros_like(x, dtype=torch.bool)
    near[every, :3] = near[:2, 3] = True
    return x, raw, near


def results(
    run: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    raw: Tensor,
    near: Tensor,
    inverse: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Values and gradients in this type. The log-det has a kink at a knot, so that nothing is asked of its gradient there."""
    bins = (raw.shape[-1] + 1) // 3
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *raw.split([bins, bins, bins - 1], -1))]
    y, logdet = run(*leaves, inverse=inverse)
    weights = torch.linspace(-1, 1, x.numel(), dtype=dtype).view_as(x) * ~near
    return [
        t.detach().double() for t in (y, logdet, *torch.autograd.grad([y.sum() + (logdet * weights).sum()], leaves))
    ]


def distance(found: Tensor, truth: Tensor) -> Tensor:
    return (found - truth).abs() / (1 + truth.abs())


def round_trip(
    run: Callable[..., tuple[Tensor, Tensor]], bins: int, spread: float, dtype: torch.dtype, seed: int
) -> Tensor | None:
    """|inverse(forward(x)) - x| of 1000 elements; None where nflows refuses a root."""
    random = torch.Generator().manual_seed(seed)
    x = 2.5 * torch.randn(250, 4, generator=random, dtype=torch.float64).to(dtype)
    raw = (spread * torch.randn(250, 4, 3 * bins - 1, generator=random, dtype=torch.float64)).to(dtype)
    parts = raw.split([bins, bins, bins - 1], -1)
    try:
        back = run(run(x, *parts, inverse=False)[0], *parts, inverse=True)[0]
    except AssertionError:
        return None
    return (back - x).abs().double()
