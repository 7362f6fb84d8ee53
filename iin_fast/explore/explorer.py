"""What the explorer knows and computes: a sample, what was changed of it, and what that looks like."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Latents
from ..evaluate.likelihood import in_parts
from ..iin import IIN, Factors
from ..iin.model import outlier_share
from ..report.samples import Shown
from ..report.sheets import grid, inside
from ..train.run_folder import BATCH, latents_of_run, load_function
from .axes import Axis, axes_of

__all__ = ["Explorer", "Neighbour", "View"]

NEIGHBOURS = 3


@dataclass(frozen=True)
class Neighbour:
    """A sample near a latent.

    Attributes:
        row: its row in the file.
        distance: Euclidean, between the latents.
        text: the sample itself where it is a text, else the classes of its concepts.
        picture: a PNG as a data URI; None where the file holds no pictures.
    """

    row: int
    distance: float
    text: str
    picture: str | None


@dataclass(frozen=True)
class View:
    """What a latent looks like, and how usual it is.

    Attributes:
        picture: what the decoder makes of it, a PNG as a data URI; None without a decoder.
        neighbours: without a decoder, the nearest samples.
        log_prob: log p(z) in nats.
        outlier_score: the share of the samples that is likelier.
    """

    picture: str | None
    neighbours: tuple[Neighbour, ...]
    log_prob: float
    outlier_score: float


class Explorer:
    r"""Creates an explorer of a run: one sample, whose factors are given by others and moved along axes.

    .. math:: \tilde z_k = (1 - s_k)\, T(z)_k + s_k\, T(z_\text{donor})_k + \sum_j p_{kj} v_{kj}, \quad z' = T^{-1}(\tilde z)

    Samples are named by their rows in the file of latents. Rows that the training held out can be chosen; of other
    latents all can.

    Args:
        run: the run folder.
        latents: a file, or ``Latents``; by default those the run was trained on. ``images`` in them are shown.
        decoder: latents ``[m, dim]`` to images; or where it is, ``"package.module:name"`` or ``"file.py:name"``.
        device: where model and decoder run.

    Raises:
        ImportError: matplotlib or safetensors is missing.
        TypeError, ValueError, FileNotFoundError: no model in ``run``, latents that don't fit it or are not there.

    Example:
        >>> import tempfile, iin_fast
        >>> from iin_fast.data import Latents
        >>> from iin_fast.explore import Explorer
        >>> model = iin_fast.IIN(4, {"size": 2}, n_flows=2, hidden_dim=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(folder)
        ...     explorer = Explorer(folder, Latents.of(torch.randn(20, 4)))
        >>> explorer.choose(3)
        >>> explorer.give("size", 7)
        >>> explorer.move("size", "direction 1", 0.5)
        >>> explorer.z.shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        latents: Latents | str | os.PathLike[str] | None = None,
        *,
        decoder: Callable[[Tensor], Any] | str | None = None,
        device: str = "cpu",
    ) -> None:
        self.run = Path(run)
        model = IIN.load(self.run, device=device).requires_grad_(False)
        data = latents_of_run(self.run, latents)
        if data is None:
            raise FileNotFoundError(
                f"{self.run}: the latents that it was trained on are not there; name a file of them"
            )
        self.path, self._where_decoder = data.path, decoder if isinstance(decoder, str) else None
        function = load_function(decoder) if isinstance(decoder, str) else decoder
        self.shown = Shown.of_run(self.run, model, data, function)
        self.model, self.rows = model, self.shown.rows.tolist()
        self._index = {row: i for i, row in enumerate(self.rows)}
        parts = [
            (model.encode(*rows).tensor, model.log_prob(*rows))
            for rows in in_parts(model, BATCH, self.shown.z, self.shown.context)
        ]
        self._factors = Factors.split(torch.cat([part[0] for part in parts]), model.sizes)
        self._usual = torch.cat([part[1] for part in parts])
        labels, names = torch.from_numpy(self.shown.labels).to(model.device), self.shown.names
        codes = {name: labels[:, k] for k, name in enumerate(names)}
        self.axes: dict[str, dict[str, Axis]] = {
            name: axes_of(self._factors, name, codes.get(name), self.shown.classes.get(name, ()))
            for name in model.sizes
        }
        self.choose(min(self.rows))

    def fresh(self) -> Explorer:
        """Another explorer of the same samples, unchanged by what is done to this one."""
        other = copy.copy(self)
        other.choose(min(self.rows))
        return other

    def choose(self, row: int) -> None:
        """Take another sample; nothing of it is changed yet."""
        self._place("row", row)
        self.sample = row
        self.reset()

    def reset(self) -> None:
        """Take back all changes."""
        self.given: dict[str, tuple[int, float]] = {}
        self.moved: dict[tuple[str, str], float] = {}

    def give(self, factor: str, donor: int, share: float = 1.0) -> None:
        """Take a factor from the sample in row ``donor``: all of it is a swap, a ``share`` of it a step of the way there."""
        self._check_factor(factor)
        self._place("donor", donor)
        if not 0 <= share <= 1:
            raise ValueError(f"Explorer: share is {share}, expected 0 to 1")
        self.given[factor] = (donor, float(share))
        if not share:
            del self.given[factor]

    def move(self, factor: str, axis: str, position: float) -> None:
        """Move along one of ``axes[factor]``; 0 is where the sample is."""
        self._check_factor(factor)
        if axis not in self.axes[factor]:
            raise ValueError(f"Explorer: axis is {axis!r}, expected one of {list(self.axes[factor])}")
        if not np.isfinite(position):
            raise ValueError(f"Explorer: position is {position}, expected a finite number")
        self.moved[factor, axis] = float(position)
        if not position:
            del self.moved[factor, axis]

    @property
    def z(self) -> Tensor:
        """The changed latent, ``[1, dim]``; the sample's own where nothing was changed."""
        i = self._index[self.sample]
        if not self.given and not self.moved:
            return self.shown.z[[i]]
        factors = self._factors[i]
        for name, (donor, share) in self.given.items():
            other = self._factors[self._index[donor]]
            factors = factors.replace({name: torch.lerp(factors[name], other[name], share)})
        moved = factors.tensor
        for (name, axis), position in self.moved.items():
            moved = moved + position * self.axes[name][axis].direction
        return self.model.decode(moved, self.shown.context_of([i]))

    def view(self) -> View:
        """What the changed latent looks like."""
        return self._view(self.z, self.shown.context_of([self._index[self.sample]]))

    def view_of(self, row: int) -> View:
        """What a sample looks like as it is."""
        i = self._place("row", row)
        return self._view(self.shown.z[[i]], self.shown.context_of([i]))

    def text_of(self, row: int) -> str:
        """A sample in words: the text that it is, or the classes of its concepts."""
        return self.shown.label(self._place("row", row)).striptags()

    def picture_of(self, row: int) -> str | None:
        """A sample's own picture, else its decoded one, as a data URI; None where there is neither."""
        return _uri(self.shown.originals([self._place("row", row)])) if self.shown.as_image else None

    def unlike(self, row: int) -> int:
        """Another sample, whose labels differ in as much as there is."""
        return self.rows[self.shown.unlike(self._place("row", row))]

    def draw(self, n: int, seed: int = 0) -> list[int]:
        """``n`` samples at random, or all where there are fewer."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        return [self.rows[i] for i in order[:n]]

    def code(self) -> str:
        """Python that makes the latent that is shown, ``edited``, from the files."""
        imports = {"from iin_fast import IIN"}
        source = "...  # your iin_fast.data.Latents"
        if self.path is not None:  # the same sample of a large file, with the codes that the training had
            imports |= {"from pathlib import Path", "from iin_fast.train.run_folder import latents_of_run"}
            source = f"latents_of_run(Path({str(self.run)!r}), {str(self.path)!r})"
        lines = [
            f"iin = IIN.load({str(self.run)!r}).requires_grad_(False)",
            f"data = {source}",
            "z = data.z.to(iin.dtype)",
        ]
        concept, own = self.shown.concept, ""
        if concept is not None:
            imports.add("from iin_fast.data import class_context")
            made = f"class_context('latents', data.labels, data.names, {concept!r}, iin.context_dim)"
            lines.append(f"context = {made}.to(iin.dtype)")
            own = f", context[[{self.sample}]]"

        def encoded(rows: str) -> str:
            return f"iin.encode(z{rows}{'' if concept is None else f', context{rows}'})"

        lines.append(f"factors = {encoded(f'[[{self.sample}]]')}")
        for name, (donor, share) in self.given.items():
            lines.append(f"donor = {encoded(f'[[{donor}]]')}[{name!r}]")
            part = "donor" if share == 1 else f"factors[{name!r}].lerp(donor, {share})"
            lines.append(f"factors = factors.replace({{{name!r}: {part}}})")
        lines.append("changed = factors.tensor")
        if self.moved:
            imports.add("from iin_fast.explore import axes_of")
            rows = ""
            if self.shown.split is not None:
                imports.add("import numpy as np")
                lines.append(
                    f"rows = np.load({str(self.shown.split)!r})['held_out']  # held out; the axes come from them"
                )
                rows = "[rows]"
            lines.append(f"others = {encoded(rows)}")
            for name in dict.fromkeys(name for name, _ in self.moved):
                labels = ""
                if name in self.shown.names:
                    labels = f", data.labels{rows or '[:]'}[:, {self.shown.names.index(name)}]"
                    labels += f", data.classes[{name!r}]" if name in self.shown.classes else ""
                lines.append(f"axes = axes_of(others, {name!r}{labels})")
                lines += [
                    f"changed = changed + {position} * axes[{axis!r}].direction"
                    for (other, axis), position in self.moved.items()
                    if other == name
                ]
        lines.append(f"edited = iin.decode(changed{own})")
        if self._where_decoder:
            imports.add("from iin_fast.train.run_folder import load_function")
            lines.append(f"picture = load_function({self._where_decoder!r})(edited)")
        return "\n".join([*sorted(imports, key=lambda line: (line.startswith("from"), line)), "", *lines]) + "\n"

    def _view(self, z: Tensor, context: Tensor | None) -> View:
        log_prob = self.model.log_prob(z, context)
        outlier = outlier_share("Explorer", log_prob, self._usual)
        picture: str | None = None
        near: tuple[Neighbour, ...] = ()
        if self.shown.decoder is not None:
            picture = _uri(self.shown.seen(z)[0])
        else:
            distance, index = self.shown.distances(z)[0].topk(min(NEIGHBOURS, len(self.rows)), largest=False)
            near = tuple(
                Neighbour(self.rows[i], d, self.text_of(self.rows[i]), self.picture_of(self.rows[i]))
                for d, i in zip(distance.tolist(), index.tolist(), strict=True)
            )
        return View(picture, near, log_prob.item(), outlier.item())

    def _place(self, name: str, row: int) -> int:
        """Where a row of the file stands among the samples."""
        if row not in self._index:
            some = ", ".join(map(str, sorted(self.rows)[:5]))
            raise ValueError(
                f"Explorer: {name} is {row}, expected one of the {len(self.rows)} rows that are shown: {some}, …"
            )
        return self._index[row]

    def _check_factor(self, factor: str) -> None:
        if factor not in self.axes:
            raise ValueError(f"Explorer: factor is {factor!r}, expected one of {list(self.axes)}")


def _uri(images: Any) -> str:
    """One image as a data URI, pixel for pixel."""
    uri: str = inside(grid(images[None]), 0)["uri"]
    return uri
