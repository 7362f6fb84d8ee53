"""Normalizing-flow layers as torch.nn modules: ``forward`` and ``inverse`` return (y, log-det)."""

from .actnorm import ActNorm
from .compose import Compose
from .coupling import AffineCoupling, SplineCoupling
from .distribution import FlowDistribution, FlowTransform
from .flow import Flow
from .linear import LULinear
from .masked_autoregressive_flow import MaskedAutoregressiveFlow
from .neural_spline_flow import NeuralSplineFlow
from .permutation import Permutation
from .real_nvp import RealNVP
from .residual import ResidualNet

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Compose",
    "Flow",
    "FlowDistribution",
    "FlowTransform",
    "LULinear",
    "MaskedAutoregressiveFlow",
    "NeuralSplineFlow",
    "Permutation",
    "RealNVP",
    "ResidualNet",
    "SplineCoupling",
]
