"""Pictures of a page: sheets of images, and plots, each inside the page as a data URI."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..files import write_file

__all__ = ["as_images", "grid", "inside", "plot", "require_matplotlib", "with_margins", "write_sheet"]

# What a plot is drawn in: on light and on dark ground.
LIGHT = {"ink": "#1f2430", "muted": "#667085", "line": "#e4e7ec", "iin": "#2f6fde", "other": "#d97706"}
DARK = {"ink": "#e6e9f0", "muted": "#98a2b3", "line": "#2b3140", "iin": "#6ea0ff", "other": "#f0a04b"}


def require_matplotlib(where: str) -> None:
    """ImportError that names the extra, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{where} needs matplotlib: pip install 'iin-fast[evaluate]'")


def plot(draw: Callable[[Any, dict[str, str]], None], alt: str, size: tuple[float, float]) -> dict[str, str]:
    """A matplotlib figure, drawn twice: ``light`` and ``dark``, for either ground.

    Args:
        draw: given the figure and colors (``ink``, ``muted``, ``line``, ``iin``, ``other``), draws into it.
        alt: what it shows, in words.
        size: in inches.
    """
    from matplotlib.figure import Figure

    uris = []
    for colors in (LIGHT, DARK):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, colors)
        for axis in figure.axes:
            axis.set_facecolor("none")
            axis.tick_params(colors=colors["muted"], labelsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(colors["line"])
            axis.grid(color=colors["line"], linewidth=0.6)
            axis.set_axisbelow(True)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150, transparent=True)
        uris.append(_uri(stream.getvalue()))
    return {"alt": alt, "light": uris[0], "dark": uris[1]}


def inside(sheet: NDArray[np.float64], room: int) -> dict[str, Any]:
    """A sheet ``[height, width, 4]`` for a page: its ``uri``, and its ``width`` there, whole pixels for each where ``room``
    allows it."""
    scale = max(1, room // sheet.shape[1])
    return {"uri": _uri(_png(sheet)), "width": sheet.shape[1] * scale}


def write_sheet(folder: Path, name: str, sheet: NDArray[np.float64]) -> None:
    """A sheet on white, three pixels to each, as a file in ``pictures``; ``name`` without what a file's may not hold."""
    white = 1 - sheet[..., 3:] * (1 - sheet[..., :3])
    file = re.sub(r"[^-\w]+", "_", name)
    (folder / "pictures").mkdir(exist_ok=True)
    write_file(folder / "pictures" / f"{file}.png", _png(white.repeat(3, axis=0).repeat(3, axis=1)))


def as_images(images: Any) -> NDArray[np.float64]:
    """Images in any usual layout as ``[n, h, w, 3]`` in [0, 1]."""
    if isinstance(images, Tensor):
        array = images.detach().cpu().float().numpy() if images.is_floating_point() else images.cpu().numpy()
    else:
        array = np.stack([np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image) for image in images])
    if array.dtype.kind in "iu":
        array = array / 255.0
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ValueError(
            f"write_report: images have shape {list(array.shape)}, expected [n, h, w], [n, h, w, 3] or [n, 3, h, w]"
        )
    return np.clip(np.nan_to_num(np.broadcast_to(array, (*array.shape[:3], 3)).astype(np.float64)), 0, 1)


def _gap(width: int) -> int:
    """Pixels between two images; four times that lie between the originals and what was made of them."""
    return max(1, width // 16)


def grid(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[rows, columns, h, w, 3]`` side by side, with gaps one sees through: ``[height, width, 4]``."""
    rows, columns, h, w, _ = images.shape
    gap = _gap(w)
    sheet = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, 4))
    for r in range(rows):
        for c in range(columns):
            cell = sheet[r * (h + gap) :, c * (w + gap) :][:h, :w]
            cell[..., :3], cell[..., 3] = images[r, c], 1
    return sheet


def with_margins(body: NDArray[np.float64], top: NDArray[np.float64], left: NDArray[np.float64]) -> NDArray[np.float64]:
    """A grid with the images that its columns and rows come from at the top and at the left."""
    h, w = top.shape[1:3]
    rule = 4 * _gap(w)
    sheet = np.zeros((h + rule + body.shape[0], w + rule + body.shape[1], 4))
    sheet[:h, w + rule :] = grid(top[None])
    sheet[h + rule :, :w] = grid(left[:, None])
    sheet[h + rule :, w + rule :] = body
    return sheet


def _png(image: NDArray[np.float64]) -> bytes:
    from matplotlib import image as files

    stream = io.BytesIO()
    files.imsave(stream, np.clip(image, 0, 1))
    return stream.getvalue()


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
