"""What the flow keeps for backward on a GPU: one tensor of bytes, in pieces, the same for Triton, CUDA C++ and torch's products.

No Triton here: torch.compile asks for the size. CUDA C++ has the pieces in arrange_steps (csrc/flow/flow_kernels.cuh).
"""

import torch
from torch import Tensor

from ..types import accumulator_type

__all__ = ["piece_bytes", "pieces_of", "saved_bytes", "views"]

Piece = tuple[tuple[int, ...], torch.dtype]


def pieces_of(x: Tensor, hidden: int, depth: int, n_flows: int, keep_coupled: bool, keep: bool) -> list[Piece]:
    """Shape and type of stages, s, coupled values and activations; of one step at a time for n_flows 0.

    Args:
        keep: s, coupled values and all activations, for backward; else activations of two layers in turn.
        keep_coupled: also what couplings put out.
    """
    batch, dim = x.shape
    steps, out, wide = 2 * n_flows, dim // 2, accumulator_type(x.dtype)
    return [
        ((steps or 2, batch, dim), wide),
        (((steps or 1) if keep else 0, batch, out), wide),
        (((steps or 1) if keep and keep_coupled else 0, batch, out), wide),
        ((steps or 1, 2, depth + 1 if keep else min(depth + 1, 2), batch, hidden), x.dtype),
    ]


def piece_bytes(piece: Piece) -> int:
    """Bytes of a piece, up to the next multiple of 256."""
    shape, dtype = piece
    size = dtype.itemsize
    for extent in shape:
        size = size * extent
    return (size + 255) // 256 * 256


def saved_bytes(x: Tensor, hidden: int, depth: int, n_flows: int, inverse: bool) -> int:
    """Size of ``saved``."""
    return sum(piece_bytes(piece) for piece in pieces_of(x, hidden, depth, n_flows, inverse, True))


def views(saved: Tensor, pieces: list[Piece]) -> list[Tensor]:
    """The pieces in the bytes ``saved``."""
    found, at = [], 0
    for shape, dtype in pieces:
        count = torch.Size(shape).numel()
        found.append(saved[at : at + count * dtype.itemsize].view(dtype).view(shape))
        at += piece_bytes((shape, dtype))
    return found
