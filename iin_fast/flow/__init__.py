"""Flows as data: programs, how they are built, written, read and printed.

Names of layers and steps, and what options they take, stand in :mod:`iin_fast.flow.layers`.
"""

from .builder import Block, NetBuilder, ProgramBuilder, Weights, affine, mlp, residual, spline
from .layers import ABSENT, Ref
from .program import FlowProgram

__all__ = [
    "ABSENT",
    "Block",
    "FlowProgram",
    "NetBuilder",
    "ProgramBuilder",
    "Ref",
    "Weights",
    "affine",
    "mlp",
    "residual",
    "spline",
]
