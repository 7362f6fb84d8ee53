"""The figures of the demo, each written as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import iin_fast

from .data import IMAGE_SIZE
from .evaluate import HeldOut, Swap
from .first_stage import VAE

__all__ = ["draw_interpolation", "draw_loss", "draw_samples", "draw_swap"]

GAP = 2  # pixels between two images
RULE = 10  # pixels between the margin of source images and the grid
INK, MUTED = "#1f2430", "#6b7280"
COLORS = {"iin": "#2f6fde", "other": "#d97706"}


def draw_swap(path: Path, factor: str, swap: Swap, data: HeldOut, vae: VAE, *, rows: int = 8) -> None:
    """Draws the grid of the paper's figure 2: each row keeps all of its image but ``factor``, each column gives ``factor``.

    The columns' images show the digits 0 to 9; the rows' images follow them in the held-out set.
    """
    columns = torch.stack([(data.labels == digit).nonzero()[0, 0] for digit in range(10)])
    rest = torch.tensor([i for i in range(len(data)) if i not in columns.tolist()])
    keepers = _varied(data, rest, rows)
    swapped = vae.decode(swap(factor, keepers.repeat_interleave(len(columns)), columns.repeat(len(keepers))))
    body = swapped.unflatten(0, (len(keepers), len(columns)))  # [rows, columns, 3, h, w]
    page = _with_margins(body, data.images[columns], data.images[keepers])
    kept = "digit and style" if factor == "color" else "color and style"
    _save_image(path, page, top=f"gives the {factor}", left=f"keeps {kept}")


def draw_interpolation(path: Path, model: iin_fast.IIN, data: HeldOut, vae: VAE, *, steps: int = 9) -> None:
    """Draws the way from one held-out image to another, for two pairs: one factor at a time, then all of them at once.

    The last row of each pair mixes z itself, without the IIN.
    """
    pairs = [_first(data, 3, 0), _first(data, 7, 0)], [_first(data, 6, 2), _first(data, 2, 3)]
    ways = {"digit": "digit", "color": "color", "all factors": None}
    blocks: list[Tensor] = []
    labels: list[str] = []
    for a, b in pairs:
        start, end = data.z[[a]], data.z[[b]]
        with torch.no_grad():
            lines = {label: model.interpolate(start, end, steps, factor) for label, factor in ways.items()}
        lines["z, without IIN"] = torch.lerp(start, end, torch.linspace(0, 1, steps)[:, None])
        blocks += [vae.decode(line.reshape(steps, -1)) for line in lines.values()]
        labels += lines
    body = torch.stack(blocks)
    source = torch.stack([data.images[i] for a, _ in pairs for i in [a] * 4])
    target = torch.stack([data.images[i] for _, b in pairs for i in [b] * 4])
    page = _beside(_column(source), _beside(_grid(body), _column(target)))
    _save_image(path, page, rows=labels)


def draw_samples(path: Path, model: iin_fast.IIN, vae: VAE, *, seed: int, rows: int = 5, columns: int = 10) -> None:
    """Draws images decoded from samples of the unsupervised IIN, and beside them images decoded from z ~ N(0, I)."""
    n = rows * columns
    with torch.no_grad():
        from_model = vae.decode(model.sample(n, generator=torch.Generator().manual_seed(seed)))
    from_normal = vae.decode(torch.randn(n, model.dim, generator=torch.Generator().manual_seed(seed)))
    grids = [_grid(images.unflatten(0, (rows, columns))) for images in (from_model, from_normal)]

    figure, axes = _plots().subplots(1, 2, figsize=(12, 3.4), layout="constrained")
    titles = ("z sampled from the unsupervised IIN", "z drawn from N(0, I), without IIN")
    for axis, grid, title in zip(axes, grids, titles, strict=True):
        axis.imshow(grid, interpolation="nearest")
        axis.set_title(title, color=INK, fontsize=12)
        axis.axis("off")
    _save(figure, path)


def draw_loss(path: Path, losses: Mapping[str, Sequence[float]], units: Mapping[str, str]) -> None:
    """Draws one panel of loss over steps for each training, smoothed over 1 % of its steps."""
    figure, axes = _plots().subplots(1, len(losses), figsize=(3.2 * len(losses), 2.9), layout="constrained")
    for axis, (name, values) in zip(np.atleast_1d(axes), losses.items(), strict=True):
        series = np.asarray(values)
        window = max(1, len(series) // 100)
        smooth = np.convolve(series, np.ones(window) / window, mode="valid")
        axis.plot(np.arange(len(series)), series, color=COLORS["iin"], alpha=0.2, linewidth=0.6)
        axis.plot(np.arange(len(smooth)) + window / 2, smooth, color=COLORS["iin"], linewidth=1.6)
        low, high = smooth.min(), np.quantile(smooth, 0.9)
        axis.set_ylim(low - 0.1 * (high - low) - 1e-6, high + 0.4 * (high - low) + 1e-6)
        axis.set_title(name, color=INK, fontsize=11)
        axis.set_xlabel("step", color=MUTED, fontsize=9)
        axis.set_ylabel(units[name], color=MUTED, fontsize=9)
        axis.tick_params(colors=MUTED, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _first(data: HeldOut, digit: int, skip: int) -> int:
    """Index of the held-out image of ``digit`` after ``skip`` others of it."""
    return int((data.labels == digit).nonzero()[skip, 0])


def _varied(data: HeldOut, candidates: Tensor, n: int) -> Tensor:
    """``n`` of the ``candidates``, of as many different digits as there are."""
    chosen: list[int] = []
    for digit in [2, 5, 8, 0, 3, 6, 9, 4, 7, 1][:n]:
        chosen.append(int(candidates[data.labels[candidates] == digit][0]))
    return torch.tensor(chosen)


def _grid(images: Tensor) -> np.ndarray:
    """Puts ``images`` ``[rows, columns, 3, h, w]`` side by side with white gaps: ``[height, width, 3]``."""
    rows, columns, _, h, w = images.shape
    page = np.ones((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, 3), dtype=np.float32)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (h + GAP), c * (w + GAP)
            page[top : top + h, left : left + w] = images[r, c].permute(1, 2, 0).numpy()
    return page


def _column(images: Tensor) -> np.ndarray:
    return _grid(images[:, None])


def _beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.concatenate([left, np.ones((len(left), RULE, 3), dtype=np.float32), right], 1)


def _with_margins(body: Tensor, top: Tensor, left: Tensor) -> np.ndarray:
    """A grid with the images that its columns and its rows come from at the top and at the left."""
    grid = _beside(_column(left), _grid(body))
    header = np.ones((IMAGE_SIZE + RULE, grid.shape[1], 3), dtype=np.float32)
    header[:IMAGE_SIZE, IMAGE_SIZE + RULE :] = _grid(top[None])
    return np.concatenate([header, grid], 0)


def _plots():
    """matplotlib's pyplot-free figure maker, so that the demo needs no display and leaves no global state."""
    from matplotlib import figure

    class Plots:
        @staticmethod
        def subplots(*shape: int, **options):
            fig = figure.Figure(figsize=options.pop("figsize"), layout=options.pop("layout"), facecolor="white")
            return fig, fig.subplots(*shape, **options)

    return Plots


def _save_image(path: Path, page: np.ndarray, *, top: str = "", left: str = "", rows: Sequence[str] = ()) -> None:
    """Writes ``page``, three screen pixels to a pixel, with what its sides mean."""
    height, width = page.shape[:2]
    scale, dpi = 3, 100
    margin = 1.35 if rows else 0.45
    size = width * scale / dpi + margin, height * scale / dpi + (0.45 if top else 0.05)
    figure, axis = _plots().subplots(1, 1, figsize=size, layout=None)
    axis.set_position((margin / size[0], 0, 1 - margin / size[0], height * scale / dpi / size[1]))
    axis.imshow(page, interpolation="nearest", aspect="auto")
    axis.axis("off")
    body = IMAGE_SIZE + RULE
    if top:
        axis.text((body + width) / 2, -3, f"{top} →", ha="center", va="bottom", color=INK, fontsize=20)
    if left:
        axis.text(-3, (body + height) / 2, f"← {left}", ha="right", va="center", rotation=90, color=INK, fontsize=20)
    for r, label in enumerate(rows):
        axis.text(-4, r * (IMAGE_SIZE + GAP) + IMAGE_SIZE / 2, label, ha="right", va="center", color=INK, fontsize=11)
    _save(figure, path, dpi=dpi)


def _save(figure, path: Path, dpi: int = 110) -> None:
    figure.savefig(path, dpi=dpi)
