"""Normalizing-flow layers as torch.nn modules: ``forward`` and ``inverse`` return (y, log-det)."""

from iin_fast.nn.actnorm import ActNorm
from iin_fast.nn.flow import Flow
from iin_fast.nn.permutation import Permutation

__all__ = ["ActNorm", "Flow", "Permutation"]
