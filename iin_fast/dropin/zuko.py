"""zuko: the affine and the rational-quadratic transformation.

zuko's lazy modules make a new transformation at every call. Such an object becomes an instance of the fast class as it is
made, keeps the raw parameters, and computes what the library's own would hold (knots, scale) only where it is asked for.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import broadcast_shapes
from ..functional import affine_coupling, rational_quadratic_spline
from .base import Library
from .programs import zuko as programs
from .programs.zuko import RAW, LazyAttribute, default_slope
from .registry import Entry, eligible, worth_it

__all__ = ["LIBRARY"]

TRANSFORMS = "zuko.transforms"
AFFINE = f"{TRANSFORMS}.MonotonicAffineTransform"
SPLINE = f"{TRANSFORMS}.MonotonicRQSTransform"
COMPOSED_METHODS = ("__init__", "_call", "_inverse", "call_and_ladj", "log_abs_det_jacobian", "inv")


def affine_init(
    original: Any, self: Any, shift: Tensor, scale: Tensor, slope: float | None = None, **kwargs: Any
) -> None:
    slope = default_slope(original) if slope is None else slope
    if not (worth_it(shift) and shift.shape == scale.shape and 0 < slope < 1 and eligible(shift, scale)):
        original(self, shift, scale, slope, **kwargs)
        return
    vars(self)[RAW] = ()
    _base_init(self, **kwargs)
    self.shift = shift
    self.log_scale = scale / (1 + abs(scale / math.log(slope)))


def _affine_scale(self: Any) -> None:
    self.scale = self.log_scale.exp()


def _affine(original: Any, self: Any, x: Tensor, inverse: bool) -> Tensor:
    if RAW not in vars(self) or x.shape != self.shift.shape or not eligible(x, self.log_scale, self.shift):
        return original(self, x)  # type: ignore[no-any-return]
    return affine_coupling(x, self.log_scale, self.shift, squash="identity", inverse=inverse)[0]


def affine_call(original: Any, self: Any, x: Tensor) -> Tensor:
    return _affine(original, self, x, False)


def affine_inverse(original: Any, self: Any, y: Tensor) -> Tensor:
    return _affine(original, self, y, True)


def spline_init(
    original: Any,
    self: Any,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float = 5.0,
    slope: float | None = None,
    **kwargs: Any,
) -> None:
    slope = default_slope(original) if slope is None else slope
    shapes = (widths.shape, heights.shape, (*derivatives.shape[:-1], derivatives.shape[-1] + 1))
    simple = eligible(widths, heights, derivatives) and shapes[0] == shapes[1] == shapes[2]
    if not simple or not isinstance(bound, int | float) or not bound > 0 or not 0 < slope < 1:
        original(self, widths, heights, derivatives, bound, slope, **kwargs)
        return
    _base_init(self, **kwargs)
    vars(self)[RAW] = (original, widths, heights, derivatives, float(bound), float(slope))


def _knots(self: Any) -> None:
    original, *arguments = vars(self)[RAW]
    twin: Any = object.__new__(type(self).__mro__[1])
    original(twin, *arguments)
    for name in ("horizontal", "vertical", "derivatives"):
        setattr(self, name, vars(twin)[name])


def _base_init(self: Any, **kwargs: Any) -> None:
    torch.distributions.Transform.__init__(self, **kwargs)


def _spline(self: Any, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
    raw = vars(self).get(RAW)
    if raw is None or not eligible(x, raw[1]):
        return None
    _, widths, heights, derivatives, bound, slope = raw
    shape = broadcast_shapes(x.shape, widths.shape[:-1])
    return rational_quadratic_spline(
        x.expand(shape),
        *(value.expand(*shape, value.shape[-1]) for value in (widths, heights, derivatives)),
        inverse=inverse,
        tail_bound=bound,
        min_derivative=slope,
        parameterization="zuko",
    )


def spline_call(original: Any, self: Any, x: Tensor) -> Tensor:
    found = _spline(self, x, False)
    return original(self, x) if found is None else found[0]  # type: ignore[no-any-return]


def spline_inverse(original: Any, self: Any, y: Tensor) -> Tensor:
    found = _spline(self, y, True)
    return original(self, y) if found is None else found[0]  # type: ignore[no-any-return]


def spline_call_and_ladj(original: Any, self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    found = _spline(self, x, False)
    return original(self, x) if found is None else found  # type: ignore[no-any-return]


def state(self: Any) -> dict[str, Any]:
    """What pickle and deepcopy see: an object of the library's own class."""
    for name, attribute in vars(type(self)).items():
        if isinstance(attribute, LazyAttribute) and RAW in vars(self) and name not in vars(self):
            attribute.compute(self)
    kept = {name: value for name, value in vars(self).items() if name != RAW}
    return kept | {"_inv": None}


LIBRARY = Library(
    name="zuko",
    package="zuko",
    modules=("zuko.transforms",),
    install="pip install zuko",
    entries=(
        Entry(
            AFFINE,
            {"__init__": affine_init, "_call": affine_call, "_inverse": affine_inverse},
            attributes={"scale": LazyAttribute(_affine_scale), "__getstate__": state},
            relies_on=(f"{AFFINE}.log_abs_det_jacobian",),
            affine=True,
            at_init=True,
        ),
        Entry(
            SPLINE,
            {
                "__init__": spline_init,
                "_call": spline_call,
                "_inverse": spline_inverse,
                "call_and_ladj": spline_call_and_ladj,
            },
            attributes={
                **{name: LazyAttribute(_knots) for name in ("horizontal", "vertical", "derivatives")},
                "__getstate__": state,
            },
            relies_on=(f"{SPLINE}.log_abs_det_jacobian", f"{SPLINE}.bin", f"{SPLINE}.searchsorted", f"{SPLINE}.bins"),
            at_init=True,
        ),
        Entry(
            programs.COMPOSED,
            {"forward": programs.composed_forward},
            relies_on=tuple(f"{TRANSFORMS}.ComposedTransform.{name}" for name in COMPOSED_METHODS),
            root=True,
            whole=True,
        ),
        *(
            Entry(
                name,
                {"forward": programs.flow_forward},
                relies_on=tuple(f"{programs.NORMALIZING}.{name}" for name in ("__init__", "log_prob", "rsample")),
                whole=True,
            )
            for name in programs.FLOWS
        ),
    ),
    versions=("1.2", "1.3", "1.4", "1.5", "1.6"),
    programs=programs.PROGRAMS,
    bases=frozenset({"zuko.lazy.LazyTransform"}),
    containers=frozenset({"zuko.lazy.LazyComposedTransform", "zuko.lazy.LazyInverse"}),
    attributes=("univariate", "f", "meta"),
)
