"""Normalizing-flow layers as torch.nn modules: ``forward`` and ``inverse`` return (y, log-det)."""

from .actnorm import ActNorm
from .coupling import AffineCoupling, SplineCoupling
from .distribution import FlowDistribution, FlowTransform
from .flow import Flow
from .linear import LULinear
from .neural_spline_flow import NeuralSplineFlow
from .permutation import Permutation
from .residual import ResidualNet

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Flow",
    "FlowDistribution",
    "FlowTransform",
    "LULinear",
    "NeuralSplineFlow",
    "Permutation",
    "ResidualNet",
    "SplineCoupling",
]
