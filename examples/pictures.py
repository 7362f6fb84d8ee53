"""Sheets of small images as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

INK = "#1f2430"


def sheet(
    path: Path,
    images: Tensor,  # [rows, columns, channels, h, w] in [0, 1]
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    zoom: float = 1.5,
) -> None:
    """Draws images in rows and columns with their names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n, m, _, h, w = images.shape
    page = np.ones((n * (h + 2) - 2, m * (w + 2) - 2, 3))
    values = images.clamp(0, 1).expand(n, m, 3, h, w).permute(0, 1, 3, 4, 2).numpy()
    for i in range(n):
        for j in range(m):
            page[i * (h + 2) :, j * (w + 2) :][:h, :w] = values[i, j]
    left = 0.09 * max(map(len, rows), default=0) if rows else 0
    top = 0.2 * max(name.count("\n") + 1 for name in columns) + 0.05 if columns else 0
    width, height = page.shape[1] * zoom / 100, page.shape[0] * zoom / 100
    figure = Figure(figsize=(left + width, top + height), dpi=100)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((left / (left + width), 0, width / (left + width), height / (top + height)))
    axis.imshow(page, interpolation="nearest", aspect="auto")
    axis.axis("off")
    for i, name in enumerate(rows or ()):
        axis.text(-3, i * (h + 2) + h / 2, name, ha="right", va="center", fontsize=9, color=INK)
    for j, name in enumerate(columns or ()):
        axis.text(j * (w + 2) + w / 2, -3, name, ha="center", va="bottom", fontsize=9, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
