"""The samples that a report shows: which, as what, and what becomes of them when a factor is swapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup, escape
from numpy.typing import NDArray
from torch import Tensor

from ..data import class_context
from ..data.latents import read_split
from ..iin import IIN
from ..train.run_folder import recorded
from .sheets import as_images, grid, inside, with_margins, write_sheet

__all__ = ["Images", "Shown", "interpolations", "swaps"]

COLUMNS_OF_SWAPS, ROWS_OF_SWAPS = 10, 6
STEPS = 7  # of an interpolation
BLOCK = 2**22  # elements of samples whose distances are taken together

Images = Tensor | NDArray[Any] | Sequence[str]


class Shown:
    """Held-out samples to be swapped and interpolated, and how a latent is shown."""

    def __init__(
        self,
        model: IIN,
        latents: Any,
        decoder: Callable[[Tensor], Any] | None,
        images: Images | None,
        split: Path | None,
        context: str | None = None,
    ) -> None:
        where = "write_report"
        if isinstance(latents, tuple | list) and len(latents) == 3:
            z, labels, names = latents
        elif hasattr(latents, "z"):
            z, labels, names = latents.z, getattr(latents, "labels", None), getattr(latents, "names", None)
        else:
            raise TypeError(f"{where}: latents is a {type(latents).__name__}, expected (z, labels, names)")
        z = torch.as_tensor(z).detach()
        if z.dim() != 2 or z.shape[1] != model.dim or len(z) < 2:
            raise ValueError(
                f"{where}: latents have z of shape {list(z.shape)}, expected [n, {model.dim}], two at least"
            )
        self.concept, self.split = context, None  # the concept whose class is the context; where the rows come from
        self.names = tuple(str(name) for name in names) if names is not None and labels is not None else ()
        table = np.full((len(z), 0), -1) if labels is None else np.asarray(torch.as_tensor(labels).cpu())
        if table.shape != (len(z), len(self.names)):
            expected = f"[{len(z)}, {len(self.names)}]"
            raise ValueError(f"{where}: latents have labels of shape {list(table.shape)}, expected {expected}")
        if images is not None and len(images) != len(z):
            raise ValueError(f"{where}: images has {len(images)} samples, expected {len(z)} like the latents")
        rows = np.arange(len(z))
        if split is not None and split.is_file():
            held_out = read_split(split)[1]
            if len(held_out) >= 2 and held_out.max() < len(z):
                rows, self.split = held_out, split
        rows = np.random.default_rng(0).permutation(rows)  # a sorted file would show one class, or one day
        self.model, self.decoder = model, decoder
        self.rows = rows  # of the latents, that are shown
        self.classes = getattr(latents, "classes", {})
        self.z = z[torch.from_numpy(rows)].to(model.device, model.dtype)
        self.labels = table[rows]
        self.context: Tensor | None = None  # [n, context_dim]
        if model.context_dim:
            codes = None if labels is None else torch.from_numpy(self.labels)
            made = class_context(f"{where}: latents", codes, self.names, str(context), model.context_dim)
            self.context = made.to(model.device, model.dtype)
        self.images: Any = None
        if images is not None:
            self.images = [images[int(i)] for i in rows]
        self.as_text = images is not None and isinstance(self.images[0], str) and decoder is None
        self.as_image = decoder is not None or (images is not None and not self.as_text)
        self.is_mute = not (self.as_text or self.as_image or self.names)  # nothing says what a sample is

    @classmethod
    def of_run(
        cls,
        folder: Path,
        model: IIN,
        latents: Any,
        decoder: Callable[[Tensor], Any] | None = None,
        images: Images | None = None,
    ) -> Shown:
        """Samples of a run: those that the training held out, or all where the latents are others than it was trained on."""
        run = recorded(folder)
        split: Path | None = folder / "split.npz"
        if hasattr(latents, "fingerprint") and latents.fingerprint() != run.get("latents", {}).get("sha256"):
            split = None
        if images is None and getattr(latents, "images", None) is not None:
            images = latents.images.tolist() if latents.images.dtype.kind in "US" else latents.images
        return cls(model, latents, decoder, images, split, run.get("settings", {}).get("context"))

    def context_of(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor | None:
        """The context of samples, ``[len(rows), context_dim]``."""
        return None if self.context is None else self.context[list(rows)]

    def originals(self, rows: Sequence[int]) -> NDArray[np.float64]:
        """Images ``[n, h, w, 3]`` of samples as they are."""
        if self.images is not None and not isinstance(self.images[0], str):
            return as_images([self.images[i] for i in rows])
        return self.seen(self.z[list(rows)])[0]

    @torch.no_grad()
    def seen(self, z: Tensor, without: Sequence[Sequence[int]] | None = None) -> tuple[NDArray[np.float64], list[int]]:
        """Images ``[n, h, w, 3]`` of latents: decoded, or of the nearest samples (whose rows come too)."""
        if self.decoder is not None:
            return as_images(self.decoder(z)), []
        nearest = self.nearest(z, without)
        return as_images([self.images[i] for i in nearest]), nearest

    def distances(self, z: Tensor) -> Tensor:
        """From each of ``z`` to each sample, ``[m, n]``."""
        parts = self.z.split(max(1, BLOCK // self.z.shape[1]))  # not all of many samples in double precision at once
        return torch.cat([torch.cdist(z.double(), part.double()) for part in parts], 1)

    def nearest(self, z: Tensor, without: Sequence[Sequence[int]] | None = None) -> list[int]:
        """The held-out row nearest to each of ``z``; not those in ``without``, unless nothing else is there."""
        distance = self.distances(z)
        for i, rows in enumerate(without or ()):
            if len(rows) < len(self.z):
                distance[i, list(rows)] = torch.inf
        found: list[int] = distance.argmin(1).tolist()
        return found

    def label(self, sample: int, changed: str | None = None) -> Markup:
        """A sample in words: its text, or the classes of its concepts; ``changed`` is set in bold."""
        if self.as_text:
            return escape(self.images[sample])
        parts = []
        for name, value in zip(self.names, self.labels[sample], strict=True):
            form = Markup("<b>{} {}</b>") if name == changed else Markup("{} {}")
            texts = self.classes.get(name, ())
            parts.append(form.format(name, "?" if value < 0 else texts[value] if value < len(texts) else value))
        return Markup(" · ").join(parts) or escape(f"sample {sample}")

    def unlike(self, sample: int) -> int:
        """Another sample, whose labels differ in as much as there is: the end of a way that shows most."""
        differ = (self.labels != self.labels[sample]).sum(1)
        differ[sample] = -1
        return int(differ.argmax())

    def varied(self, concept: str | None, n: int, skip: Sequence[int] = ()) -> list[int]:
        """``n`` samples, of as many classes of ``concept`` as there are, without those in ``skip``."""
        free = [i for i in range(len(self.z)) if i not in set(skip)]
        if concept not in self.names:
            return free[:n]
        column = self.labels[:, self.names.index(str(concept))]
        by_class: dict[int, list[int]] = {}
        for i in free:
            if column[i] >= 0:
                by_class.setdefault(int(column[i]), []).append(i)
        chosen: list[int] = []
        while len(chosen) < n and any(by_class.values()):
            for label in sorted(by_class):
                if by_class[label] and len(chosen) < n:
                    chosen.append(by_class[label].pop(0))
        return chosen


def swaps(shown: Shown | None, folder: Path) -> dict[str, Any] | None:
    """Swaps of each concept, as images or as rows of words; sheets of images go to ``folder`` too."""
    if shown is None or not shown.model.concepts:
        return None
    made: list[tuple[str, Any, Any]] = []
    for concept in () if shown.is_mute else shown.model.concepts:
        columns = shown.varied(concept, COLUMNS_OF_SWAPS)
        others = [name for name in shown.names if name != concept]
        rows = shown.varied(others[0] if others else concept, ROWS_OF_SWAPS, columns)
        if not rows or not columns:
            continue
        keep, give = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
        with torch.no_grad():
            contexts = {"context": shown.context_of(keep), "donor_context": shown.context_of(give)}
            swapped = shown.model.swap(shown.z[list(keep)], shown.z[list(give)], concept, **contexts)
        without = [[int(k), int(g)] for k, g in zip(keep, give, strict=True)]
        if shown.as_image:
            images = shown.seen(swapped, without)[0]
            body = grid(images.reshape(len(rows), len(columns), *images.shape[1:]))
            sheet = with_margins(body, shown.originals(columns), shown.originals(rows))
            write_sheet(folder, f"swap_{concept}", sheet)
            made.append((concept, inside(sheet, 480), None))
        else:
            nearest = shown.nearest(swapped, without)
            diagonal = [i for i in range(len(nearest)) if i % len(columns) == (i // len(columns)) % len(columns)]
            words = [
                [shown.label(int(keep[i])), shown.label(int(give[i]), concept), shown.label(nearest[i], concept)]
                for i in diagonal
            ]
            made.append((concept, None, words))
    return {
        "mute": shown.is_mute,
        "as_image": shown.as_image,
        "decoded": shown.decoder is not None,
        "shown": made,
    }


def interpolations(shown: Shown | None, folder: Path) -> dict[str, Any] | None:
    """One sample on its way to another, factor by factor, as images or as rows of words."""
    if shown is None or shown.is_mute:
        return None
    a = shown.varied(shown.names[0] if shown.names else None, 1)[0]
    b = shown.unlike(a)
    start, end = shown.z[[a]], shown.z[[b]]
    ways: dict[str, str | None] = {name: name for name in shown.model.concepts} | {"all factors": None}
    with torch.no_grad():
        contexts = {"context": shown.context_of([a]), "context_b": shown.context_of([b])}
        lines = {
            label: shown.model.interpolate(start, end, STEPS, way, **contexts)[:, 0] for label, way in ways.items()
        }
    lines["z itself, without IIN"] = torch.lerp(start, end, torch.linspace(0, 1, STEPS).to(start)[:, None])
    if shown.as_image:
        images = {label: shown.seen(line)[0] for label, line in lines.items()}
        write_sheet(folder, "interpolation", grid(np.stack(list(images.values()))))
        ends = inside(grid(shown.originals([a, b])[None]), 760 * 2 // STEPS)
        return {"ends": ends, "images": [(label, inside(grid(line[None]), 760)) for label, line in images.items()]}
    rows = []
    for label, line in lines.items():
        passed = [shown.label(i) for i in shown.nearest(line)]
        once = [text for i, text in enumerate(passed) if i == 0 or text != passed[i - 1]]
        rows.append([label, Markup(" → ").join(once)])
    return {"ends": None, "rows": rows}
