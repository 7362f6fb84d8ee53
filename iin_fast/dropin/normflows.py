"""normflows: affine couplings, masked affine flows, and rational-quadratic splines."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import affine_coupling
from . import splines
from .base import Library
from .programs import normflows as programs
from .registry import Entry, eligible, worth_it

__all__ = ["LIBRARY"]

AFFINE = "normflows.flows.affine.coupling"
NEURAL = "normflows.flows.neural_spline"
UTILS = "normflows.utils.splines"
SPLINE_FUNCTIONS = (
    f"{UTILS}.searchsorted",
    f"{UTILS}.unconstrained_rational_quadratic_spline",
    f"{UTILS}.rational_quadratic_spline",
)
SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv")


def _refuse_affine(module: Any) -> str | None:
    if module.scale not in (True, False):
        return f"scale={module.scale!r}"
    if not module.scale:
        return "scale=False is one addition"
    return None if module.scale_map in SCALE_MAPS else f"scale_map={module.scale_map!r}"


def _affine(original: Any, self: Any, z: Any, inverse: bool) -> Any:
    z1, z2 = z
    if not isinstance(z2, Tensor) or not worth_it(z2):
        return original(self, z)
    param = self.param_map(z1)
    shift, raw = param[:, 0::2, ...], param[:, 1::2, ...]
    if not eligible(z2, param) or shift.shape != z2.shape:
        return _given(original, self, z, param)
    # "sigmoid" divides by sigmoid(raw + 2), "sigmoid_inv" multiplies
    s = raw if self.scale_map == "exp" else F.logsigmoid(raw + 2)
    z2, log_det = affine_coupling(
        z2, -s if self.scale_map == "sigmoid" else s, shift, squash="identity", inverse=inverse
    )
    return [z1, z2], log_det


class _WithResults:
    """A stand-in ``self`` whose conditioner has run already, so that a fallback doesn't run it (and its hooks) twice."""

    def __init__(self, module: Any, **results: Any) -> None:
        self._module = module
        for name, result in results.items():
            setattr(self, name, lambda *args, result=result: result)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _given(original: Any, self: Any, z: Any, param: Tensor) -> Any:
    return original(_WithResults(self, param_map=param), z)


def affine_forward(original: Any, self: Any, z: Any) -> Any:
    return _affine(original, self, z, False)


def affine_inverse(original: Any, self: Any, z: Any) -> Any:
    return _affine(original, self, z, True)


_binary: "WeakKeyDictionary[Any, tuple[Tensor, int, bool]]" = WeakKeyDictionary()


def _refuse_mask(module: Any) -> str | None:
    """The fused form holds for masks of 0 and 1. For a mask on a GPU the answer is kept until it changes."""
    if not isinstance(module.b, Tensor):
        return "b is not a tensor"
    if torch.compiler.is_compiling() or module.b.is_inference():  # an inference tensor has no version
        return "a mask that can't be read now"
    seen = None if module.b.device.type == "cpu" else _binary.get(module)
    if seen is None or seen[0] is not module.b or seen[1] != module.b._version:
        binary = bool(((module.b == 0) | (module.b == 1)).all())
        _binary[module] = seen = (module.b, module.b._version, binary)
    return None if seen[2] else "a mask with values other than 0 and 1"


def _masked(original: Any, self: Any, z: Tensor, inverse: bool) -> Any:
    if (
        not isinstance(z, Tensor)
        or not worth_it(z)
        or not eligible(z, self.b)
        or z.shape[1:] != self.b.shape[1:]
        or _refuse_mask(self)
    ):
        return original(self, z)
    z_masked = self.b * z
    scale, shift = self.s(z_masked), self.t(z_masked)
    if not eligible(z, scale, shift) or not z.shape == scale.shape == shift.shape:
        return original(_WithResults(self, s=scale, t=shift), z)
    rest = 1 - self.b
    scale, shift = (rest * torch.where(torch.isfinite(value), value, torch.nan) for value in (scale, shift))
    return affine_coupling(z, scale, shift, squash="identity", inverse=inverse)


def masked_forward(original: Any, self: Any, z: Tensor) -> Any:
    return _masked(original, self, z, False)


def masked_inverse(original: Any, self: Any, z: Tensor) -> Any:
    return _masked(original, self, z, True)


TAILS = (None, "linear", "circular")

LIBRARY = Library(
    name="normflows",
    package="normflows",
    modules=("normflows",),
    install="pip install normflows",
    entries=(
        Entry(
            f"{AFFINE}.AffineCoupling",
            {"forward": affine_forward, "inverse": affine_inverse},
            refuse=_refuse_affine,
            affine=True,
        ),
        Entry(
            f"{AFFINE}.MaskedAffineFlow",
            {"forward": masked_forward, "inverse": masked_inverse},
            refuse=_refuse_mask,
            affine=True,
            rechecks=False,  # it reads the mask; _masked asks where the fused op is to run
        ),
        Entry(
            f"{NEURAL}.coupling.PiecewiseRationalQuadraticCoupling",
            {"_coupling_transform": splines.coupling},
            relies_on=(f"{NEURAL}.coupling.PiecewiseRationalQuadraticCoupling._piecewise_cdf", *SPLINE_FUNCTIONS),
            refuse=splines.refuse_tails(TAILS),
        ),
        Entry(
            f"{NEURAL}.coupling.PiecewiseRationalQuadraticCDF",
            {"_spline": splines.cdf},
            relies_on=SPLINE_FUNCTIONS,
            refuse=splines.refuse_tails(TAILS),
        ),
        Entry(
            f"{NEURAL}.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive",
            {"_elementwise": splines.autoregressive},
            relies_on=SPLINE_FUNCTIONS,
            refuse=splines.refuse_tails(TAILS),
        ),
        *(Entry(name, methods, root=True, whole=True) for name, methods in programs.METHODS.items()),
    ),
    versions=("1.6.1", "1.7.0", "1.7.1", "1.7.2", "1.7.3"),
    programs=programs.PROGRAMS,
    bases=frozenset({"normflows.flows.base.Flow"}),
    containers=frozenset(
        {
            "normflows.flows.base.Reverse",
            "normflows.flows.base.Composite",
            f"{AFFINE}.AffineCouplingBlock",
            "normflows.flows.reshape.Split",
            "normflows.flows.reshape.Merge",
            "normflows.flows.affine.glow.GlowBlock",
            *(
                f"{NEURAL}.wrapper.{circular}{kind}RationalQuadraticSpline"
                for circular in ("", "Circular")
                for kind in ("Coupled", "Autoregressive")
            ),
        }
    ),
)
