"""The panel layout of conditioner weights: how a [out, in] matrix lies in the flat storage that the kernels stream.

A panel holds ``PANEL`` consecutive outputs. Panel ``p`` covers outputs ``p * PANEL … min((p + 1) * PANEL, out) - 1`` and
stores them as a row-major ``[in, width]`` block, so that a kernel reads the weights of one input for all outputs of the
panel as one contiguous run. The last panel is as narrow as what remains: nothing is padded, and the number of stored
elements is the number of parameters. The width is measured in docs/performance.md (decision 3 of the design).
"""

import torch
from torch import Tensor

__all__ = ["PANEL", "matrices", "pack", "unpack"]

PANEL = 64


def pack(weight: Tensor) -> Tensor:
    """Lay a weight out in panels.

    Args:
        weight: ``[..., out, in]``, as torch.nn.Linear stores it.

    Returns:
        ``[..., out * in]``, the same elements in panel order. Differentiable.
    """
    panels = [panel.transpose(-1, -2).flatten(-2) for panel in weight.split(PANEL, dim=-2)]
    return torch.cat(panels, dim=-1)


def unpack(panels: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        panels: ``[..., out_features * in_features]`` in panel order.
        out_features: rows of the result.
        in_features: columns of the result.

    Returns:
        ``[..., out_features, in_features]``. Differentiable.
    """
    return torch.cat([panel.transpose(-1, -2) for panel in _split(panels, out_features, in_features)], dim=-2)


def matrices(panels: Tensor, out_features: int, in_features: int) -> Tensor:
    """As :func:`unpack`, but ``[..., in_features, out_features]``: rows of a panel stay as they lie."""
    return torch.cat(_split(panels, out_features, in_features), dim=-1)


def _split(panels: Tensor, out_features: int, in_features: int) -> list[Tensor]:
    """The panels, each ``[..., in_features, width]``."""
    widths = [min(PANEL, out_features - start) for start in range(0, out_features, PANEL)]
    parts = panels.split([width * in_features for width in widths], dim=-1)
    return [part.unflatten(-1, (in_features, width)) for part, width in zip(parts, widths, strict=True)]
