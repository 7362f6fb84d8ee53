"""Normalizing-flow layers as torch.nn modules: ``forward`` and ``inverse`` return (y, log-det)."""

from .actnorm import ActNorm
from .coupling import AffineCoupling
from .distribution import FlowDistribution, FlowTransform
from .flow import Flow
from .permutation import Permutation

__all__ = ["ActNorm", "AffineCoupling", "Flow", "FlowDistribution", "FlowTransform", "Permutation"]
