"""nflows: affine, additive and rational-quadratic couplings, and the masked autoregressive spline; its copy in glasflow."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..functional import affine_coupling
from . import splines
from .base import Library
from .programs import nflows as programs
from .registry import Entry, eligible, worth_it

__all__ = ["GLASFLOW", "LIBRARY"]

COUPLING = "nflows.transforms.coupling"
SPLINE = "nflows.transforms.splines.rational_quadratic"
SPLINE_FUNCTIONS = (f"{SPLINE}.unconstrained_rational_quadratic_spline", f"{SPLINE}.rational_quadratic_spline")


def _affine(original: Any, self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool) -> Any:
    if not worth_it(inputs) or not eligible(inputs, transform_params):
        return original(self, inputs=inputs, transform_params=transform_params)
    shift, raw = transform_params.split([self.num_transform_features] * 2, dim=1)
    return affine_coupling(inputs, raw, shift, squash="sigmoid", inverse=inverse)


def affine_forward(original: Any, self: Any, inputs: Tensor, transform_params: Tensor) -> Any:
    return _affine(original, self, inputs, transform_params, False)


def affine_inverse(original: Any, self: Any, inputs: Tensor, transform_params: Tensor) -> Any:
    return _affine(original, self, inputs, transform_params, True)


def _additive(original: Any, self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool) -> Any:
    if not worth_it(inputs) or not eligible(inputs, transform_params) or inputs.shape != transform_params.shape:
        return original(self, inputs=inputs, transform_params=transform_params)
    # one addition; nflows also multiplies by ones, and sums their logarithms
    outputs = inputs - transform_params if inverse else inputs + transform_params
    return outputs, inputs.new_zeros(inputs.shape[0])


def additive_forward(original: Any, self: Any, inputs: Tensor, transform_params: Tensor) -> Any:
    return _additive(original, self, inputs, transform_params, False)


def additive_inverse(original: Any, self: Any, inputs: Tensor, transform_params: Tensor) -> Any:
    return _additive(original, self, inputs, transform_params, True)


TWO_WAYS = {"forward": programs.forward, "inverse": programs.inverse}

LIBRARY = Library(
    name="nflows",
    package="nflows",
    modules=("nflows.transforms",),
    install="pip install nflows",
    entries=(
        Entry(
            f"{COUPLING}.AffineCouplingTransform",
            {"_coupling_transform_forward": affine_forward, "_coupling_transform_inverse": affine_inverse},
            relies_on=(f"{COUPLING}.AffineCouplingTransform._scale_and_shift",),
            affine=True,
        ),
        Entry(
            f"{COUPLING}.AdditiveCouplingTransform",
            {"_coupling_transform_forward": additive_forward, "_coupling_transform_inverse": additive_inverse},
            relies_on=(f"{COUPLING}.AdditiveCouplingTransform._scale_and_shift",),
            affine=True,
        ),
        Entry(
            f"{COUPLING}.PiecewiseRationalQuadraticCouplingTransform",
            {"_coupling_transform": splines.coupling},
            relies_on=(f"{COUPLING}.PiecewiseRationalQuadraticCouplingTransform._piecewise_cdf", *SPLINE_FUNCTIONS),
            refuse=splines.refuse_tails((None, "linear")),
        ),
        Entry(
            "nflows.transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
            {"_elementwise": splines.autoregressive},
            relies_on=SPLINE_FUNCTIONS,
            refuse=splines.refuse_tails((None, "linear")),
        ),
        Entry(
            "nflows.transforms.nonlinearities.PiecewiseRationalQuadraticCDF",
            {"_spline": splines.cdf},
            relies_on=SPLINE_FUNCTIONS,
            refuse=splines.refuse_tails((None, "linear")),
        ),
        Entry(programs.COMPOSITE, TWO_WAYS, relies_on=(f"{programs.COMPOSITE}._cascade",), root=True, whole=True),
        Entry(programs.INVERSE, TWO_WAYS, root=True, whole=True),
        Entry(programs.MASKED_AFFINE, TWO_WAYS, root=True, whole=True),
        *(
            Entry(name, {"_log_prob": programs.flow_log_prob}, relies_on=(f"{programs.NORMAL}._log_prob",), whole=True)
            for name in programs.FLOWS
        ),
    ),
    versions=("0.13", "0.14"),
    programs=programs.PROGRAMS,
    bases=frozenset({"nflows.transforms.base.Transform"}),
    containers=frozenset(
        f"nflows.transforms.base.{name}"
        for name in ("CompositeTransform", "InverseTransform", "MultiscaleCompositeTransform")
    ),
)


def _copied(name: str) -> str:
    return programs.COPY + name


GLASFLOW = replace(
    LIBRARY,
    name="glasflow",
    package="glasflow",
    modules=("glasflow.flows", "glasflow.nflows.transforms", "glasflow.nflows.distributions"),
    install="pip install glasflow",
    entries=(
        *(
            replace(entry, name=_copied(entry.name), relies_on=tuple(map(_copied, entry.relies_on)))
            for entry in LIBRARY.entries
            if not entry.affine and entry.name not in programs.FLOWS
        ),
        *(
            Entry(
                name,
                {"log_prob": programs.glasflow_log_prob},
                relies_on=(_copied(f"{programs.NORMAL}._log_prob"),),
                whole=True,
            )
            for name in programs.GLASFLOWS
        ),
    ),
    versions=("0.4",),
    bases=frozenset(map(_copied, LIBRARY.bases)),
    containers=frozenset(map(_copied, LIBRARY.containers)),
)
