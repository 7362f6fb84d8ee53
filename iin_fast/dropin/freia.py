"""FrEIA: affine couplings of all kinds, the all-in-one block, and the rational-quadratic spline."""

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import affine_coupling, spline_coupling
from .base import Library
from .programs import freia as programs
from .programs.freia import clamp_name
from .registry import Entry, eligible, worth_it

__all__ = ["LIBRARY"]

COUPLING = "FrEIA.modules.coupling_layers"
BASE = f"{COUPLING}._BaseCouplingBlock"
SPLINES = "FrEIA.modules.splines"


def _couple(self: Any, x: Tensor, raw: Tensor, shift: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
    """The affine map with s = clamp * f_clamp(raw), and the sum of s over all but the batch."""
    name = clamp_name(self.f_clamp)
    if name is None or not isinstance(self.clamp, int | float) or not self.clamp > 0:
        return affine_coupling(x, self.clamp * self.f_clamp(raw), shift, squash="identity", inverse=rev)
    if name == "ATAN":
        return affine_coupling(x, raw, shift, squash="atan", clamp=float(self.clamp), inverse=rev)
    if name == "SIGMOID":  # 2 (sigmoid(u) - 1/2) = tanh(u / 2)
        raw = 0.5 * raw
    return affine_coupling(x, raw, shift, squash="tanh", clamp=float(self.clamp), inverse=rev)


def _takes(self: Any, x: Any, *conditions: Any) -> bool:
    return worth_it(x) and x.dim() == self.ndims + 1 and x.numel() > 0 and eligible(x, *conditions)


def _glow(net: str, length: str) -> Callable[..., Any]:
    def coupling(original: Any, self: Any, x: Tensor, u: Tensor, rev: bool = False) -> Any:
        if not _takes(self, x, u):
            return original(self, x, u, rev)
        raw, shift = getattr(self, net)(u).split([getattr(self, length)] * 2, dim=1)
        return _couple(self, x, raw, shift, rev)

    return coupling


def _gin(net: str, length: str) -> Callable[..., Any]:
    def coupling(original: Any, self: Any, x: Tensor, u: Tensor, rev: bool = False) -> Any:
        if not _takes(self, x, u):
            return original(self, x, u, rev)
        raw, shift = getattr(self, net)(u).split([getattr(self, length)] * 2, dim=1)
        s = self.clamp * self.f_clamp(raw)
        s = s - s.mean(1, keepdim=True)
        return affine_coupling(x, s, shift, squash="identity", inverse=rev)[0], 0.0

    return coupling


def _rnvp(net_s: str, net_t: str) -> Callable[..., Any]:
    def coupling(original: Any, self: Any, x: Tensor, u: Tensor, rev: bool = False) -> Any:
        if not _takes(self, x, u):
            return original(self, x, u, rev)
        return _couple(self, x, getattr(self, net_s)(u), getattr(self, net_t)(u), rev)

    return coupling


def one_sided(original: Any, self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
    if not _takes(self, x[0], *c):
        return original(self, x, c, rev, jac)
    x1, x2 = torch.split(x[0], [self.split_len1, self.split_len2], dim=1)
    u = torch.cat([x1, *c], 1) if self.conditional else x1
    raw, shift = self.subnet(u).split([self.split_len2] * 2, dim=1)
    y2, logdet = _couple(self, x2, raw, shift, rev)
    return (torch.cat((x1, y2), 1),), logdet


def conditional(original: Any, self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
    if not c or not _takes(self, x[0], *c):
        return original(self, x, c, rev, jac)
    raw, shift = self.subnet(torch.cat(c, 1) if len(c) > 1 else c[0]).split([self.channels] * 2, dim=1)
    y, logdet = _couple(self, x[0], raw, shift, rev)
    return (y,), logdet


@lru_cache
def _divides(code: CodeType) -> bool:
    """Whether this version of ``AllInOneBlock._affine`` divides by the clamp inside of tanh; FrEIA 0.2 does not."""
    return "/self.clamp" in "".join(inspect.getsource(code).split())


def all_in_one(original: Any, self: Any, x: Tensor, a: Tensor, rev: bool = False) -> Any:
    """``AllInOneBlock._affine``."""
    if not worth_it(x) or torch.compiler.is_compiling() or not eligible(x, a):
        return original(self, x, a, rev)
    if x.numel() == 0 or not self.clamp > 0:
        return original(self, x, a, rev)
    raw, shift = (a * 0.1).split([x.shape[1]] * 2, dim=1)
    if _divides(original.__code__):
        raw = raw / self.clamp
    if not self.GIN:
        return affine_coupling(x, raw, shift, squash="tanh", clamp=float(self.clamp), inverse=rev)
    s = self.clamp * torch.tanh(raw)
    s = s - torch.mean(s, dim=self.sum_dims, keepdim=True)
    return affine_coupling(x, s, shift, squash="identity", inverse=rev)


def _spline(net: str, length: str) -> Callable[..., Any]:
    """``RationalQuadraticSpline._coupling1`` and ``_coupling2``.

    FrEIA's box differs by element. A linear map of both coordinates takes it to [-1, 1]; there the slope at its ends
    and beyond is 1, the linear tails of the op.
    """

    def coupling(original: Any, self: Any, x: Tensor, u: Tensor, rev: bool = False) -> Any:
        if not eligible(x, u, self.spline_base.default_domain) or x.numel() == 0:
            return original(self, x, u, rev)
        base = self.spline_base
        p = base.split_parameters(getattr(self, net)(u), getattr(self, length))
        x = x.movedim(1, -1)
        slopes = p["deltas"] + SOFTPLUS_ONE
        if "total_width" in base.parameter_counts:
            width = base.clamp_domain(base.default_width * F.softplus(p["total_width"] + SOFTPLUS_ONE))
            width = width.clamp_min(
                torch.finfo(x.dtype).tiny ** (1 / 3)
            )  # second derivatives divide by its third power
            for name in ("widths", "heights"):  # FrEIA's box has no place where one of its sizes is NaN
                width = width + 0 * p[name].detach().amax(-1, keepdim=True)
            raw, height = [p["widths"], p["heights"], slopes], width
            left = bottom = -width / 2
        else:
            p = base.constrain_parameters(p)
            width, height = (p[name].sum(-1, keepdim=True) for name in ("widths", "heights"))
            smallest = torch.finfo(x.dtype).tiny ** 0.5  # second derivatives of the logarithm divide by its square
            raw = [p[name].clamp_min(smallest).log() for name in ("widths", "heights")]
            raw, left, bottom = [*raw, _scaled_slope(slopes, width / height)], p["left"], p["bottom"]
        width, height, left, bottom = (value.squeeze(-1) for value in (width, height, left, bottom))
        if rev:
            width, height, left, bottom = height, width, bottom, left
        y, logdet = spline_coupling(
            (x - left) / width * 2 - 1,
            torch.cat(raw, -1),
            bins=p["widths"].shape[-1],
            inverse=rev,
            min_bin_width=0.0,
            min_bin_height=0.0,
            min_derivative=0.0,
        )
        y = (y + 1) / 2 * height + bottom
        if "total_width" not in base.parameter_counts:
            logdet = logdet + (height / width).log().flatten(1).sum(1)
        else:  # that of a NaN beyond the box is 0 in the op
            logdet = logdet + 0 * width.detach().flatten(1).sum(1)
        return y.movedim(-1, 1), logdet

    return coupling


SOFTPLUS_ONE = math.log(math.e - 1)  # softplus of it is 1
LOW = -40.0  # below it softplus is exp to float64 rounding


def _scaled_slope(raw: Tensor, scale: Tensor) -> Tensor:
    """The raw slope whose softplus is ``scale * softplus(raw)``.

    Where softplus underflows its logarithm and that of ``expm1`` have no gradient, so there the sum of logarithms is taken.
    """
    slope = F.softplus(raw)
    low = raw < LOW
    log = torch.where(low, raw, slope.masked_fill(low, 1).log()) + scale.log()
    low = log < LOW
    slope = (slope * scale).masked_fill(low, 1)
    return torch.where(low, log, slope + torch.log(-torch.expm1(-slope)))


def _two_sided(name: str, make: Callable[..., Any], nets1: tuple[str, ...], nets2: tuple[str, ...]) -> Entry:
    return Entry(
        f"{COUPLING}.{name}",
        {"_coupling1": make(*nets1), "_coupling2": make(*nets2)},
        relies_on=(f"{BASE}.__init__", f"{BASE}.forward"),
        affine=True,
    )


def _refuse_conditional(module: Any) -> str | None:
    return None if module.conditional else "no condition"


LIBRARY = Library(
    name="freia",
    package="FrEIA",
    modules=("FrEIA.modules",),
    install="pip install FrEIA",
    entries=(
        _two_sided("GLOWCouplingBlock", _glow, ("subnet2", "split_len1"), ("subnet1", "split_len2")),
        _two_sided("RNVPCouplingBlock", _rnvp, ("subnet_s2", "subnet_t2"), ("subnet_s1", "subnet_t1")),
        _two_sided("GINCouplingBlock", _gin, ("subnet2", "split_len1"), ("subnet1", "split_len2")),
        Entry(
            f"{COUPLING}.AffineCouplingOneSided", {"forward": one_sided}, relies_on=(f"{BASE}.__init__",), affine=True
        ),
        Entry(
            f"{COUPLING}.ConditionalAffineTransform",
            {"forward": conditional},
            relies_on=(f"{BASE}.__init__",),
            refuse=_refuse_conditional,
            affine=True,
        ),
        Entry("FrEIA.modules.all_in_one_block.AllInOneBlock", {"_affine": all_in_one}, affine=True),
        *(
            Entry(
                name,
                {"forward": programs.graph_forward},
                relies_on=(f"{programs.GRAPH}.forward", f"{programs.GRAPH}._check_output"),
                root=True,
                whole=True,
            )
            for name in (programs.GRAPH, programs.REVERSIBLE)
        ),
        Entry(programs.SEQUENCE, {"forward": programs.sequence_forward}, root=True, whole=True),
        Entry(
            f"{SPLINES}.rational_quadratic.RationalQuadraticSpline",
            {"_coupling1": _spline("subnet1", "split_len1"), "_coupling2": _spline("subnet2", "split_len2")},
            relies_on=(
                f"{SPLINES}.rational_quadratic.RationalQuadraticSpline.constrain_parameters",
                f"{SPLINES}.rational_quadratic.rational_quadratic_spline",
                *(
                    f"{SPLINES}.binned.BinnedSplineBase.{name}"
                    for name in ("split_parameters", "clamp_domain", "constrain_parameters", "binned_spline")
                ),
            ),
        ),
    ),
    versions=("0.2", "its repository at 4212496"),
    programs=programs.PROGRAMS,
    left={f"{COUPLING}.NICECouplingBlock": "one addition; nothing to fuse"},
    bases=frozenset({"FrEIA.modules.base.InvertibleModule"}),
    containers=frozenset(
        f"FrEIA.framework.{name}"
        for name in ("sequence_inn.SequenceINN", "graph_inn.GraphINN", "reversible_graph_net.ReversibleGraphNet")
    ),
)
