"""Self-contained HTML pages: one style for light and dark, wide and narrow screens, and pictures inside the page."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["card", "page", "picture", "pixels", "plot", "require_matplotlib", "row", "table"]

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1f2430; --lead: #3a4253; --muted: #667085; --line: #e4e7ec;
  --iin: #2f6fde; --other: #d97706; --soft: #f6f8fb; --heat: 47, 111, 222; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171f; --ink: #e6e9f0; --lead: #c3c9d6; --muted: #98a2b3; --line: #2b3140; --iin: #6ea0ff;
    --other: #f0a04b; --soft: #1c212c; --heat: 82, 139, 255; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 17px/1.6 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 48px 24px 80px; }
h1 { font-size: 38px; line-height: 1.15; margin: 0 0 12px; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 24px; line-height: 1.25; margin: 56px 0 8px; letter-spacing: -0.01em; }
h3 { font-size: 18px; margin: 28px 0 4px; }
p { max-width: 46em; margin: 8px 0 16px; }
.lead { font-size: 20px; color: var(--lead); }
.small, figcaption { color: var(--muted); font-size: 14.5px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 16px; margin: 28px 0; }
.card { background: var(--soft); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
.card b { display: block; font-size: 34px; line-height: 1.2; letter-spacing: -0.02em; }
.card span { color: var(--muted); font-size: 14.5px; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 24px; }
figure { margin: 16px 0; }
figcaption { margin-top: 6px; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
.paper { background: #fff; padding: 6px; }
.pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 16px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 12px; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; font-size: 14.5px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.best { font-weight: 650; }
td .small { display: block; line-height: 1.35; max-width: 34em; }
.text td { text-align: left; vertical-align: top; }
.text th { text-align: left; }
.facts { width: auto; font-size: 15.5px; }
.facts td { padding: 3px 12px 3px 0; border: 0; }
.facts td:first-child { color: var(--muted); min-width: 9em; }
.heat { width: auto; }
.heat td:not(:first-child) { text-align: center; min-width: 92px; border: 2px solid var(--ground); border-radius: 6px; }
.heat th:not(:first-child) { text-align: center; }
.bar { height: 14px; border-radius: 3px; background: var(--other); min-width: 2px; }
.bar.iin { background: var(--iin); }
.bars td { border: 0; padding: 3px 12px; }
.bars td { white-space: nowrap; }
.bars td.track { width: 45%; min-width: 110px; }
.bars tr.first td { padding-top: 16px; }
code { background: var(--soft); padding: 1px 5px; border-radius: 4px; font-size: 0.9em; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  body { font-size: 16px; }
  main { padding: 28px 16px 56px; }
  h1 { font-size: 29px; }
  h2 { margin-top: 40px; }
  .lead { font-size: 18px; }
  th, td { padding: 8px 7px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; }
  .card { padding: 12px 14px; }
  .card b { font-size: 26px; }
  .bars .small { white-space: normal; }
  .facts td { padding: 2px 10px 2px 0; }
  .still { overflow: visible; }
  .metrics tr:first-child { position: sticky; top: 0; background: var(--ground); }
  .metrics tr { display: grid; grid-template-columns: repeat(5, 1fr); border-bottom: 1px solid var(--line); }
  .metrics :is(td, th) { border: 0; padding: 4px; font-size: 15px; }
  .metrics :is(td, th):first-child { grid-column: 1 / -1; padding-top: 10px; }
  .metrics th { font-size: 13px; }
}
"""

# What a plot is drawn in: on light and on dark ground.
LIGHT = {"ink": "#1f2430", "muted": "#667085", "line": "#e4e7ec", "iin": "#2f6fde", "other": "#d97706"}
DARK = {"ink": "#e6e9f0", "muted": "#98a2b3", "line": "#2b3140", "iin": "#6ea0ff", "other": "#f0a04b"}


def require_matplotlib(where: str) -> None:
    """ImportError that names the extra, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{where} needs matplotlib: pip install 'iin-fast[evaluate]'")


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page of HTML sections; it asks nothing of other servers or files."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def card(value: str, text: str) -> str:
    """A large number and what it is."""
    return f'<div class="card"><b>{value}</b><span>{text}</span></div>'


def row(cells: Sequence[str], tag: str = "td") -> str:
    """A row of a table; a cell that begins with ``*`` is the best of its row."""
    return (
        "<tr>"
        + "".join(
            f'<{tag} class="best">{cell[1:]}</{tag}>' if cell.startswith("*") else f"<{tag}>{cell}</{tag}>"
            for cell in cells
        )
        + "</tr>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself where the screen is too narrow for it."""
    body = "".join(row(cells) for cells in rows)
    return f'<div class="scroll"><table class="{kind}">{row(head, "th") if head else ""}{body}</table></div>'


def picture(path: Path, alt: str, caption: str = "") -> str:
    """A picture file, on white paper also where the page is dark."""
    return _figure(f'<img class="paper" alt="{escape(alt)}" src="{_uri(path.read_bytes())}">', caption)


def pixels(image: NDArray[np.floating[Any]], alt: str, caption: str = "", scale: int = 1) -> str:
    """An image ``[height, width, 3 or 4]`` in [0, 1]; each pixel ``scale`` wide where there is room."""
    require_matplotlib("a picture")
    from matplotlib import image as files

    stream = io.BytesIO()
    files.imsave(stream, np.clip(image, 0, 1))
    width = image.shape[1] * scale
    tag = f'<img class="pixels" style="width:{width}px" alt="{escape(alt)}" src="{_uri(stream.getvalue())}">'
    return _figure(tag, caption)


def plot(
    draw: Callable[[Any, dict[str, str]], None], alt: str, caption: str = "", size: tuple[float, float] = (9, 3)
) -> str:
    """A matplotlib figure, drawn twice: in colors for light and for dark ground.

    Args:
        draw: given the figure and colors (``ink``, ``muted``, ``line``, ``iin``, ``other``), draws into it.
        alt: what it shows, in words.
        caption: HTML below it.
        size: in inches.
    """
    require_matplotlib("a plot")
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
    return _figure(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{uris[1]}">'
        f'<img alt="{escape(alt)}" src="{uris[0]}"></picture>',
        caption,
    )


def _figure(tag: str, caption: str) -> str:
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{tag}{note}</figure>"


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
