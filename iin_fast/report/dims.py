"""A picture of what several layers or networks represent: shares of factors, a bar for each."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

from ..files import write_file
from ..iin.factors import RESIDUAL
from .sheets import LIGHT, require_matplotlib

__all__ = ["picture_file", "plot_dims"]


def picture_file(path: str | os.PathLike[str]) -> Path:
    """``path``, whose ending names a kind of picture.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another ending.
    """
    require_matplotlib("plot_dims")
    from matplotlib.backend_bases import FigureCanvasBase

    file, kinds = Path(path), FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:] not in kinds:
        raise ValueError(f"plot_dims: path ends in {file.suffix!r}, expected one of .{', .'.join(sorted(kinds))}")
    return file


def plot_dims(sizes: Mapping[str, Mapping[str, int]], path: str | os.PathLike[str]) -> Path:
    """Draws factor sizes as shares of all dimensions, a bar for each of ``sizes``: name of a layer to factor to size.

    ``path`` ends in ``.png``, ``.pdf``, ``.svg`` or another kind of picture that matplotlib writes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another ending.
    """
    file = picture_file(path)
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    concepts = list(dict.fromkeys(name for of in sizes.values() for name in of if name != RESIDUAL))
    figure = Figure(figsize=(1.8 + 0.9 * len(sizes), 3.4), layout="constrained")
    axis = figure.subplots()
    bottom = [0.0] * len(sizes)
    for k, concept in enumerate([*concepts, RESIDUAL]):
        shares = [of.get(concept, 0) / sum(of.values()) for of in sizes.values()]
        color = LIGHT["line"] if concept == RESIDUAL else colormaps["tab10"](k % 10)
        bars = axis.bar(list(sizes), shares, bottom=bottom, color=color, label=concept)
        axis.bar_label(
            bars, [str(of[concept]) if of.get(concept) else "" for of in sizes.values()], label_type="center"
        )
        bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
    axis.set_ylabel("share of the dimensions")
    axis.tick_params(axis="x", rotation=30 if len(sizes) > 3 else 0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format=file.suffix[1:], dpi=150)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, stream.getvalue())
    return file
