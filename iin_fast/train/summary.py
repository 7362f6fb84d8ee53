"""What a training says before its first step: what it learns from, what it trains, and where all goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..data import MISSING, Latents
from ..iin import IIN

__all__ = ["summary"]

SHOWN = 6  # classes of a concept


def summary(
    data: Latents,
    model: IIN,
    given: Mapping[str, int],
    method: str,
    train: int,
    held_out: int,
    device: str,
    run: Path,
    context: str | None = None,
) -> list[str]:
    """A line for each thing, of at most 80 columns unless a name is long.

    Args:
        data: the latents.
        model: the IIN as it starts.
        given: concept to size, of those that were not estimated.
        method: by which the other sizes were.
        train, held_out: rows.
        device: where the training runs, in words.
        run: the run folder.
        context: the concept that is no factor but known.
    """
    lines = [("latents", f"{data.n:,} rows × {data.dim} features: {train:,} to train on, {held_out:,} held out")]
    if data.sampled_from:
        lines.append(("sampled", f"at random from {data.sampled_from:,} rows of the file (--rows)"))
    if data.shared is not None:
        pairs = [f"{name} {int(count):,}" for name, count in zip(data.names, data.shared.sum(0), strict=True)]
        lines.append(("pairs", f"{len(data.shared):,}, which share {', '.join(pairs)}"))
    for name in data.names if data.labels is not None else ():
        lines.append((name, _classes(data, name)))
    sizes = [
        f"{name} {size} ({'given' if name in given else method})"
        for name, size in model.sizes.items()
        if name in data.names
    ]
    rest = [f"{name} {size}" for name, size in model.sizes.items() if name not in data.names]
    lines.append(("factors", ", ".join([*sizes, *(rest or ["no residual"])])))
    left = [name for name in data.names if name not in model.sizes and name != context]
    if left:
        lines.append(("left out", f"{', '.join(left)}: no factor"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines.append(
        (
            "network",
            f"{model.config['n_flows']} blocks of width {model.config['hidden_dim']}, {parameters:,} parameters",
        )
    )
    lines.append(("device", device))
    lines.append(("run folder", str(run)))
    width = min(16, max(len(name) for name, _ in lines))
    return [f"{name:<{width}}  {text}" for name, text in lines]


def _classes(data: Latents, name: str) -> str:
    """The classes of a concept with their rows, the largest first."""
    assert data.labels is not None
    column = data.labels[:, data.names.index(name)]
    codes, counts = column[column != MISSING].unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True).tolist()
    texts = data.classes.get(name, ())
    shown = [f"{texts[codes[i]] if texts else int(codes[i])} ({int(counts[i]):,})" for i in order[:SHOWN]]
    more = ", …" if len(order) > SHOWN else ""
    kind = "bins of a continuous concept" if name in data.values else "classes"
    unknown = int((column == MISSING).sum())
    return f"{len(order)} {kind}: {', '.join(shown)}{more}" + (f"; {unknown:,} unknown" if unknown else "")
