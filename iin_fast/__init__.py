"""iin-fast: fused normalizing-flow layers for PyTorch, and the Invertible Interpretation Network on them."""

from importlib.metadata import PackageNotFoundError, version

from . import _interrupt as _interrupt
from . import allocator, data, functional, nn, testing
from .backends import backend
from .dropin import accelerate, patch, restore, unpatch
from .iin import IIN, FactorLoss, Factors, LinearIIN, PairSampler, concept_pairs, estimate_factor_dims
from .ops.flops import register_formulas
from .ops.flow_program.direct import direct_gradients

try:
    __version__ = version("iin-fast")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

register_formulas()

__all__ = [
    "IIN",
    "FactorLoss",
    "Factors",
    "LinearIIN",
    "PairSampler",
    "__version__",
    "accelerate",
    "allocator",
    "backend",
    "concept_pairs",
    "data",
    "direct_gradients",
    "estimate_factor_dims",
    "functional",
    "nn",
    "patch",
    "restore",
    "testing",
    "unpatch",
]
