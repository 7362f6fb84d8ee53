"""The page that shows a trained IIN to a person: one HTML file in its run folder."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .files import write_file
from .iin import IIN, LinearIIN
from .iin.factors import RESIDUAL
from .latents import class_context
from .page import card, page, pixels, plot, require_matplotlib, row, table
from .train import held_out_rise

__all__ = ["write_report"]

COLUMNS = {"iin": "IIN", "mean_shift": "mean shift", "linear_iin": "linear IIN", "pca": "PCA", "raw": "raw z"}
COLUMNS_OF_SWAPS, ROWS_OF_SWAPS = 10, 6
STEPS = 7  # of an interpolation

# How entries of run.json read on the page; what is not here reads as it is written there.
WORDS = {
    "latents/path": "latents",
    "latents/kind": "what they come with",
    "latents/sha256": "their SHA-256",
    "n": "number of latents",
    "dim": "numbers in a latent",
    "names": "concepts",
    "settings/context": "concept that the network is told",
    "settings/dims_method": "sizes of factors estimated as",
    "settings/others": "concepts that a pair does not share",
    "settings/unlabelled": "share of pairs without labels",
    "settings/standardise": "features standardised",
    "settings/rho": "correlation of a shared factor (ρ)",
    "settings/coupling": "coupling",
    "settings/batch": "pairs in a step",
    "settings/learning_rate": "learning rate",
    "settings/decay_start": "step from which it falls to 0",
    "settings/noise": "noise on the latents, in standard deviations",
    "settings/held_out": "share held out",
    "settings/keep": "model that is left",
    "settings/precision": "precision",
    "settings/seed": "seed",
    "device/kind": "device",
    "device/name": "machine",
    "device/processes": "processes",
    "device/threads": "threads",
}
GROUPS = {"factors": "dimensions of {}", "versions": "version of {}"}
# What stands elsewhere on the page, or is for programs.
UNSAID = {
    *("format", "version", "settings/factors", "settings/steps", "settings/n_flows", "settings/hidden_dim"),
    *("settings/hidden_depth", "settings/log_every", "settings/held_out_every", "settings/save_every"),
}

Images = Tensor | NDArray[Any] | Sequence[str]


def write_report(
    run_folder: str | os.PathLike[str],
    *,
    latents: Any = None,
    decoder: Callable[[Tensor], Any] | None = None,
    images: Images | None = None,
) -> Path:
    """Writes ``report.html`` into a run folder: one page that needs nothing else, for phone and desk, light and dark.

    What is there is shown: the model (``config.json``, ``model.safetensors``), how it was made (``run.json``), its losses
    (``logs/metrics.csv``), its metrics (``evaluation.json``), and with ``latents`` what swapping and interpolating do, as
    images, as texts, or as the labels of the nearest sample. Sheets of images are also written to ``pictures``, as files.

    Args:
        run_folder: where a training, or ``IIN.save``, wrote.
        latents: what the pictures are made of: ``(z, labels, names)`` or an object with these attributes, ``z``
            ``[n, dim]``, ``labels`` ``[n, concepts]`` with -1 where unknown. Rows that ``split.npz`` holds out are
            taken, if it is there; all rows of :class:`iin_fast.latents.Latents` that the run was not trained on.
        decoder: latents ``[m, dim]`` (a tensor) to images ``[m, h, w]``, ``[m, h, w, 3]`` or ``[m, 3, h, w]``, in
            [0, 1] or bytes.
        images: the samples themselves, one for each row of ``latents``: images as above, or texts. Without a decoder, a
            changed latent is shown by its nearest sample in the data.

    Returns:
        the path of the page.

    Raises:
        FileNotFoundError: no model in the folder.
        ImportError: matplotlib or safetensors is missing.
        TypeError, ValueError: latents that don't fit the model, images that are none, a file that is damaged.

    References:
        Esser, Rombach, Ommer, A Disentangling Invertible Interpretation Network, CVPR 2020.
    """
    require_matplotlib("write_report")
    folder = Path(run_folder)
    model = IIN.load(folder)
    run, evaluation = _json(folder / "run.json"), _json(folder / "evaluation.json")
    log = _log(folder / "logs" / "metrics.csv")
    known = run.get("settings", {}).get("context")
    split: Path | None = folder / "split.npz"
    if hasattr(latents, "fingerprint") and latents.fingerprint() != run.get("latents", {}).get("sha256"):
        split = None  # other latents than those it was trained on: all of them are held out
    shown = None if latents is None else _Shown(model, latents, decoder, images, split, known)
    sections = [
        _opening(model, run, evaluation, log),
        _swaps(shown, folder),
        _interpolation(shown, folder),
        _metrics(evaluation),
        _heat(evaluation),
        _sizes(model, evaluation),
        _losses(folder, log),
        _making(model, run, evaluation, log),
    ]
    path = folder / "report.html"
    write_file(path, page(f"iin-fast: {_title(model)}", sections).encode())
    return path


class _Shown:
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
        self.names = tuple(str(name) for name in names) if names is not None and labels is not None else ()
        table = np.full((len(z), 0), -1) if labels is None else np.asarray(torch.as_tensor(labels).cpu())
        if table.shape != (len(z), len(self.names)):
            expected = f"[{len(z)}, {len(self.names)}]"
            raise ValueError(f"{where}: latents have labels of shape {list(table.shape)}, expected {expected}")
        if images is not None and len(images) != len(z):
            raise ValueError(f"{where}: images has {len(images)} samples, expected {len(z)} like the latents")
        rows = np.arange(len(z))
        if split is not None and split.is_file():
            with np.load(split) as arrays:
                held_out = arrays["held_out"]
            if len(held_out) >= 2 and held_out.max() < len(z):
                rows = held_out
        self.model, self.decoder = model, decoder
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

    def context_of(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor | None:
        """What the model is told of samples, ``[len(rows), context_dim]``."""
        return None if self.context is None else self.context[list(rows)]

    def originals(self, rows: Sequence[int]) -> NDArray[np.float64]:
        """Images ``[n, h, w, 3]`` of samples as they are."""
        if self.images is not None and not isinstance(self.images[0], str):
            return _as_images([self.images[i] for i in rows])
        return self.seen(self.z[list(rows)])[0]

    @torch.no_grad()
    def seen(self, z: Tensor, without: Sequence[Sequence[int]] | None = None) -> tuple[NDArray[np.float64], list[int]]:
        """Images ``[n, h, w, 3]`` of latents: decoded, or of the nearest samples (whose rows come too)."""
        if self.decoder is not None:
            return _as_images(self.decoder(z)), []
        nearest = self.nearest(z, without)
        return _as_images([self.images[i] for i in nearest]), nearest

    def nearest(self, z: Tensor, without: Sequence[Sequence[int]] | None = None) -> list[int]:
        """The held-out row nearest to each of ``z``; not those in ``without``, unless nothing else is there."""
        distance = torch.cdist(z.double(), self.z.double())
        for i, rows in enumerate(without or ()):
            if len(rows) < len(self.z):
                distance[i, list(rows)] = torch.inf
        found: list[int] = distance.argmin(1).tolist()
        return found

    def label(self, sample: int, changed: str | None = None) -> str:
        """A sample in words: its text, or the classes of its concepts; ``changed`` is set in bold."""
        if self.as_text:
            return escape(self.images[sample])
        parts = []
        for name, value in zip(self.names, self.labels[sample], strict=True):
            text = f"{escape(name)} {'?' if value < 0 else value}"
            parts.append(f"<b>{text}</b>" if name == changed else text)
        return " · ".join(parts) or f"sample {sample}"

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


def _title(model: IIN) -> str:
    return ", ".join(model.concepts) or "an unsupervised IIN"


def _opening(model: IIN, run: Mapping[str, Any], evaluation: Mapping[str, Any], log: Mapping[str, Any]) -> str:
    concepts = [escape(name) for name in model.concepts]
    if concepts:
        parts = concepts + ["the rest"] * (RESIDUAL in model.sizes)
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        title = f"A latent of {model.dim} numbers, taken apart into {listed}"
    else:
        title = f"A latent of {model.dim} numbers as independent normal ones"
    facts = []
    if run.get("n"):
        source = _path_of(run.get("latents"))
        facts.append(f"{run['n']:,} latents" + (f" of <code>{escape(Path(source).name)}</code>" if source else ""))
    if run.get("steps"):
        facts.append(f"{run['steps']:,} steps")
    trained = f" It learned from {', in '.join(facts)}." if facts else ""
    cards = []
    if evaluation.get("swap"):
        swap = evaluation["swap"]
        ours, shift = (np.mean([r["both"] for r in swap[who].values()]) for who in ("iin", "mean_shift"))
        cards.append(
            card(f"{ours:.0%}", f"of swaps give the donor's concept and keep all others ({shift:.0%} by mean shift)")
        )
        judge = np.mean(list(swap["judge"].values()))
        cards.append(card(f"{judge:.0%}", "of concepts the judge reads right where nothing was swapped: the ceiling"))
    if evaluation.get("mig"):
        mig = evaluation["mig"]
        text = (
            f"of a concept's information: the lead of its best factor over the second ({mig['pca']['mig']:.0%} for PCA)"
        )
        cards.append(card(f"{mig['iin']['mig']:.0%}", text))
    if evaluation.get("pairs"):
        ours, theirs = (
            [row[name] for name, row in evaluation["pairs"][who]["shared"].items() if name in row]
            for who in ("iin", "pca")
        )
        if ours and theirs:
            text = f"correlation of a concept's own factor over pairs that share it ({np.mean(theirs):.2f} for PCA)"
            cards.append(card(f"{np.mean(ours):.2f}", text))
    if evaluation.get("likelihood"):
        found = evaluation["likelihood"]
        text = f"nats per dimension on held-out latents; a Gaussian has {found['gaussian']:.2f} (lower is better)"
        cards.append(card(f"{found['iin']:.2f}", text))
    elif "held_out_nats_per_dim" in log:
        cards.append(card(f"{log['held_out_nats_per_dim'][1][-1]:.2f}", "nats per dimension on held-out latents"))
    return f"""
<h1>{title}</h1>
<p class="lead">An invertible network T (IIN) translates each latent z, without loss, into factors, so that one of them
can be exchanged while the others stay.{trained}</p>
<div class="cards">{"".join(cards)}</div>"""


def _swaps(shown: _Shown | None, folder: Path) -> str:
    if shown is None or not shown.model.concepts:
        return ""
    if shown.is_mute:
        return """
<h2>Swapping one factor</h2><p>There is nothing to show a swap with: the latents have no labels and no images, and there is no
decoder. With <code>images</code> (pictures or texts) in the file of latents, or with <code>report --decoder</code>, swaps and
interpolations appear here. What the factors are worth is in the metrics below.</p>"""
    body = ""
    for concept in shown.model.concepts:
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
            grid = _grid(images.reshape(len(rows), len(columns), *images.shape[1:]))
            content = _with_margins(grid, shown.originals(columns), shown.originals(rows))
            _write_sheet(folder, f"swap_{concept}", content)
            body += (
                f"<div><h3>{escape(concept)}</h3>"
                + pixels(
                    content, f"swaps of {concept}", f"Each column gives its {escape(concept)}.", _scale(content, 480)
                )
                + "</div>"
            )
        else:
            nearest = shown.nearest(swapped, without)
            few = [
                (i, without[i]) for i in range(len(nearest)) if i % len(columns) == (i // len(columns)) % len(columns)
            ]
            cells = [[shown.label(k), shown.label(g, concept), shown.label(nearest[i], concept)] for i, (k, g) in few]
            head = ["keeps the rest", f"gives {escape(concept)}", "nearest sample to the result"]
            body += f"<div><h3>{escape(concept)}</h3>{table(head, cells, 'text')}</div>"
    how = (
        "Each row keeps everything of its sample at the left except for one factor; each column gives that factor from "
        "its sample at the top."
        if shown.as_image
        else "Each row: a sample that keeps everything but one factor, one that gives that factor, and what comes out."
    )
    if shown.decoder is None:
        how += (
            " There is no decoder, so each result is shown by the held-out sample nearest to it (other than the two it "
            "was made of)."
        )
    return f'<h2>Swapping one factor</h2><p>{how}</p><div class="pair">{body}</div>'


def _interpolation(shown: _Shown | None, folder: Path) -> str:
    if shown is None or shown.is_mute:
        return ""
    a, *rest = shown.varied(shown.names[0] if shown.names else None, 2)
    b = rest[0] if rest else next(i for i in range(len(shown.z)) if i != a)
    # An end that differs in as much as there is shows most.
    if shown.names:
        b = int((shown.labels != shown.labels[a]).sum(1).argmax())
    start, end = shown.z[[a]], shown.z[[b]]
    ways: dict[str, str | None] = {name: name for name in shown.model.concepts} | {"all factors": None}
    with torch.no_grad():
        contexts = {"context": shown.context_of([a]), "context_b": shown.context_of([b])}
        lines = {
            label: shown.model.interpolate(start, end, STEPS, way, **contexts)[:, 0] for label, way in ways.items()
        }
    lines["z itself, without IIN"] = torch.lerp(start, end, torch.linspace(0, 1, STEPS).to(start)[:, None])
    if shown.as_image:
        rows = ""
        ends = _grid(shown.originals([a, b])[None])
        _write_sheet(folder, "interpolation", _grid(np.stack([shown.seen(line)[0] for line in lines.values()])))
        for label, line in lines.items():
            strip = _grid(shown.seen(line)[0][None])
            rows += f"<h3>{escape(label)}</h3>" + pixels(strip, f"interpolation: {label}", "", _scale(strip, 760))
        content = "<h3>from, to</h3>" + pixels(ends, "the two samples", "", _scale(strip, 760)) + rows
    else:
        cells = []
        for label, line in lines.items():
            passed = [shown.label(i) for i in shown.nearest(line)]
            once = [text for i, text in enumerate(passed) if i == 0 or text != passed[i - 1]]
            cells.append([escape(label), " → ".join(once)])
        content = table(["what moves", "nearest samples on the way"], cells, "text")
    return f"""
<h2>From one sample to another, one factor at a time</h2>
<p>The first sample walks towards the second in one concept alone, then in all factors together; the last line mixes z
directly, without the network.</p>{content}"""


def _metrics(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return "<h2>Metrics</h2><p>There are none yet: run the evaluation, and write this page again.</p>"
    rows: list[str] = []
    compared = evaluation.get("pairs") or evaluation.get("swap") or evaluation.get("mig", {})
    columns = {who: title for who, title in COLUMNS.items() if who in compared}

    def line(
        text: str, note: str, found: Mapping[str, float], better: str, bound: str = "", form: str = "{:.0%}"
    ) -> None:
        best = (max if better == "higher" else min)(found.values())
        cells = []
        for who in columns:
            value = found.get(who)
            shown = "–" if value is None else form.format(value)
            is_best = value is not None and len(found) > 1 and form.format(value) == form.format(best)
            cells.append(f"*{shown}" if is_best else shown)
        rows.append(row([f'{text}<span class="small">{note} {better.capitalize()} is better.</span>', *cells, bound]))

    swap = evaluation.get("swap")
    if swap:
        for concept in swap["iin"]:
            name = escape(concept)
            judged = swap["judge"]
            others = [judged[other] for other in judged if other != concept]
            found = {who: swap[who][concept] for who in columns}
            line(
                f"Swap {name}: it changes",
                f"The judge reads the donor's {name}.",
                {who: r["target"] for who, r in found.items()},
                "higher",
                f"≈ {judged[concept]:.0%}",
            )
            if others:
                line(
                    f"Swap {name}: all else stays",
                    "The judge reads every other concept as before.",
                    {who: r["keep_all"] for who, r in found.items()},
                    "higher",
                    f"≈ {min(others):.0%}",
                )
                line(
                    f"Swap {name}: both at once",
                    "Either of the two is easy alone; this is the one to look at.",
                    {who: r["both"] for who, r in found.items()},
                    "higher",
                    f"≈ {min(judged[concept], *others):.0%}",
                )
    for key, title, text in (
        ("mig", "Information gap (MIG)", "How much more the best factor knows of a concept than the second best."),
        ("sap", "Predictability gap (SAP)", "How much better the best factor reads a concept than the second best."),
    ):
        if key in evaluation:
            line(title, text, {who: found[key] for who, found in evaluation[key].items()}, "higher", "100%")
    for key, text in (
        ("disentanglement", "Each factor serves one concept."),
        ("completeness", "Each concept is served by one factor."),
        ("informativeness", "The concepts can be read from all factors together, above chance."),
    ):
        if "dci" in evaluation:
            found = {who: scores[key] for who, scores in evaluation["dci"].items()}
            line(f"DCI {key}", text, found, "higher", "100%")
    for concept in evaluation.get("concepts", ()):
        if "leak" in evaluation:
            for key, reader in (("linear", "a linear probe"), ("mlp", "a small network")):
                found = {who: scores[concept][key] for who, scores in evaluation["leak"].items()}
                text = f"What {reader} reads of it from the factors that should not hold it, above chance."
                line(f"Leak of {escape(concept)}, {reader}", text, found, "lower", "0%")
    pairs = evaluation.get("pairs", {})
    for name in pairs.get("names", ()):
        own = {
            kind: {who: pairs[who][kind][name][name] for who in columns if name in pairs[who][kind].get(name, {})}
            for kind in ("shared", "apart")
        }
        left = {who: pairs[who]["shared"].get(RESIDUAL, {}).get(name) for who in columns}
        asked = "1" if pairs["rho"] is None else f"{pairs['rho']:.3g}"
        if own["shared"]:
            title, note = f"Pairs that share {escape(name)}", "Correlation of the two samples in its own factor."
            line(title, note, own["shared"], "higher", asked, "{:.2f}")
        for title, note, found in (
            (f"Pairs that share {escape(name)}: the residual", "What they have in common there was left behind.", left),
            (
                f"Pairs that do not share {escape(name)}",
                "Correlation in its own factor, without its sign.",
                own["apart"],
            ),
        ):
            sizes = {who: abs(value) for who, value in found.items() if value is not None}
            if sizes:
                line(title, note, sizes, "lower", "0", "{:.2f}")
    head = row(["", *columns.values(), "asked for" if pairs else "ceiling"], "th")
    rest = ""
    if "likelihood" in evaluation:
        found = evaluation["likelihood"]
        rest += f"""<p>Held-out latents cost {found["iin"]:.3f} nats per dimension under the IIN (what it learned on:
{found["iin_learned_on"]:.3f}), {found["gaussian"]:.3f} under a Gaussian with the same covariance, {found["normal"]:.3f}
under a standard normal. Lower is better; a held-out value far above that of the training latents is learning by
heart.</p>"""
    if "correlation" in evaluation:
        same, different = (evaluation["correlation"]["iin"][kind] for kind in ("same", "different"))
        said = [
            f"{escape(name)} {same[name][name]:.2f} ({different[name][name]:.2f})"
            for name in same
            if name in same[name]
        ]
        if said:
            rest += f"""<p>Correlation of a concept's own factor over pairs of the same class (in brackets: of different
classes): {", ".join(said)}. The loss asks for its ρ over pairs that share the concept; what varies within a class lowers it.</p>"""
    if "invertibility" in evaluation:
        error = evaluation["invertibility"]
        rest += f"""<p>Translating z there and back changes it by at most {error["max"]:.1e} (median
{error["median"]:.1e}); 0 would be exact.</p>"""
    samples = evaluation["samples"]
    taken = f"<h2>Metrics</h2><p>Taken on {samples['scored']:,} held-out latents."
    if not rows:
        return f"{taken} They have no labels that could say more.</p>{rest}"
    said = [f"<li>{escape(found['text'])}.</li>" for found in evaluation.get("verdict", {}).values()]
    verdicts = f"<ul>{''.join(said)}</ul>" if said else ""
    if pairs:
        return f"""
<h2>Metrics</h2><p>Taken on {pairs["n"]:,} held-out pairs. Beside the IIN stand three ways to do without training: the linear
IIN, which is computed from the same pairs, as many principal components, and as many raw dimensions of z, those in which pairs
that share the concept are most alike. What varies in a
concept between two samples that share it lowers the correlation that can be reached.</p>
<div class="scroll still"><table class="metrics">{head}{"".join(rows)}</table></div>{rest}"""
    return f"""
{taken} Beside the IIN stand four ways to do without training: moving z by the difference of two class means (it is told the
true classes, which the IIN is not), the linear IIN, which is computed from the same pairs, exchanging as many principal
components, and exchanging as many raw dimensions of z, those that know most about the concept. The ceiling of a swap is about what the judge reads right where nothing was
swapped.</p>{verdicts}
<div class="scroll still"><table class="metrics">{head}{"".join(rows)}</table></div>{rest}"""


def _cell(share: float, text: str) -> str:
    """A cell of a heat map, as deep as ``share`` from 0 to 1."""
    style = f"background:rgba(var(--heat),{0.06 + 0.74 * share:.2f})" + (";color:#fff" * (share > 0.55))
    return f'<td style="{style}">{text}</td>'


def _pair_heat(evaluation: Mapping[str, Any]) -> str:
    pairs = evaluation["pairs"]
    names = pairs["names"]
    rows = ""
    for factor, values in pairs["iin"]["shared"].items():
        cells = [_cell(abs(values[name]), f"{values[name]:.2f}") if name in values else "<td>–</td>" for name in names]
        rows += f"<tr><td>{escape(factor)}</td>{''.join(cells)}</tr>"
    head = row(["factor", *(f"pairs that share<br>{escape(name)}" for name in names)], "th")
    return f"""
<h2>What pairs have in common</h2>
<p>The correlation of each factor (rows) over held-out pairs that share each concept (columns). A good IIN is full on its
diagonal and empty elsewhere, where no pair shares several concepts.</p>
<div class="scroll"><table class="heat">{head}{rows}</table></div>"""


def _heat(evaluation: Mapping[str, Any]) -> str:
    if "pairs" in evaluation:
        return _pair_heat(evaluation)
    if "information" not in evaluation:
        return ""
    found = evaluation["information"]["iin"]
    concepts = list(found["entropy"])
    rows = ""
    for factor, values in found["normalised"].items():
        cells = ""
        for concept in concepts:
            share, nats = values[concept], found["nats"][factor][concept]
            cells += _cell(share, f'{share:.0%}<br><span style="font-size:13px">{nats:.2f} nats</span>')
        rows += f"<tr><td>{escape(factor)}</td>{cells}</tr>"
    head = row(["factor", *(f"{escape(name)}<br>{found['entropy'][name]:.2f} nats" for name in concepts)], "th")
    return f"""
<h2>What each factor knows</h2>
<p>How much of each concept (columns, with its entropy) each factor (rows) tells, as mutual information. A good IIN is
full on its diagonal and empty elsewhere; what the residual knows of a concept was left behind.</p>
<div class="scroll"><table class="heat">{head}{rows}</table></div>
<p class="small">Estimated by nearest neighbours (Ross 2014) on {found["samples"]:,} held-out latents. In factors of
many dimensions the estimate is low; the leak test above does not suffer from that.</p>"""


def _sizes(model: IIN, evaluation: Mapping[str, Any]) -> str:
    classes = evaluation.get("classes", {})
    rows = []
    for name, size in model.sizes.items():
        kind = "" if name == RESIDUAL else " iin"
        bar = f'<div class="bar{kind}" style="width:{100 * size / model.dim:.1f}%"></div>'
        what = "the rest" if name == RESIDUAL else f"{classes[name]} classes" if name in classes else ""
        rows.append(row([escape(name), f"{size} of {model.dim}", bar, f'<span class="small">{what}</span>']))
    body = "".join(rows).replace("<td><div", '<td class="track"><div')
    return f'<h2>Who got how many dimensions</h2><div class="scroll"><table class="bars">{body}</table></div>'


def _losses(folder: Path, log: Mapping[str, tuple[list[float], list[float]]]) -> str:
    advice = held_out_rise(folder)
    note = f"<p>Note: {escape(advice)}.</p>" if advice else ""
    plots = ""
    for trained, held_out, title in (
        ("loss", "held_out_loss", "loss, nats per pair"),
        ("nats_per_dim", "held_out_nats_per_dim", "nats per dimension"),
    ):
        if trained in log or held_out in log:
            plots += plot(
                partial(_curves, log, trained, held_out, title), f"{title}, over training steps", size=(4.6, 3)
            )
    return f'<h2>Training</h2><p>Lower is better.</p>{note}<div class="pair">{plots}</div>' if plots else ""


def _curves(
    log: Mapping[str, tuple[list[float], list[float]]],
    trained: str,
    held_out: str,
    title: str,
    figure: Any,
    colors: dict[str, str],
) -> None:
    axis = figure.subplots()
    for name, color, label in ((trained, "iin", "training"), (held_out, "other", "held out")):
        if name not in log:
            continue
        steps, values = (np.asarray(column) for column in log[name])
        marker = "." if len(steps) < 30 else ""
        if name == trained and len(steps) >= 200:  # smoothed over 2 % of the steps
            axis.plot(steps, values, color=colors[color], alpha=0.2, linewidth=0.6)
            window = len(steps) // 50
            values = np.convolve(values, np.ones(window) / window, mode="valid")
            steps = steps[window // 2 : window // 2 + len(values)]
        axis.plot(steps, values, color=colors[color], linewidth=1.7, marker=marker, label=label)
    shown = np.concatenate([log[name][1] for name in (trained, held_out) if name in log])
    low, high = shown.min(), np.quantile(shown, 0.95)  # the first steps would flatten the rest
    if high > low:
        axis.set_ylim(low - 0.08 * (high - low), high + 0.3 * (high - low))
    axis.set_title(title, color=colors["ink"], fontsize=11)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("step", color=colors["muted"], fontsize=9)
    axis.legend(frameon=False, labelcolor=colors["ink"], fontsize=9)


def _making(
    model: IIN,
    run: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    log: Mapping[str, tuple[list[float], list[float]]],
) -> str:
    config = model.config
    network = "a linear map, computed from pairs"
    if not isinstance(model, LinearIIN):
        network = f"{config['n_flows']} blocks, hidden width {config['hidden_dim']}"
        network += f", {sum(p.numel() for p in model.parameters()):,} parameters"
    if run.get("settings", {}).get("factors"):  # not estimated
        run = {**run, "settings": {k: v for k, v in run["settings"].items() if k != "dims_method"}}
    rows = [
        [escape(key), escape(str(value))]
        for key, value in {
            "network": f"{network}, {config['dtype']}",
            **_flat(run),
        }.items()
    ]
    speed = ""
    if "samples_per_second" in log:
        values = np.asarray(log["samples_per_second"][1])
        speed = f"""<p>Training ran at {np.median(values):,.0f} samples per second (median; slowest
{values.min():,.0f}, fastest {values.max():,.0f}).</p>"""
    judged = ""
    if evaluation:
        samples = evaluation["samples"]
        judged = f"""<p class="small">Judge, probes and baselines learned on {samples["learned_on"]:,} latents
({escape(samples["source"])}), seed {evaluation["seed"]}. All numbers, with those of single dimensions, are in
<code>evaluation.json</code> beside this page.</p>"""
    return f"""
<h2>How it was made, how fast</h2>{speed}{table([], rows, "text facts")}{judged}
<p class="small">The method: Esser, Rombach, Ommer, “A Disentangling Invertible Interpretation Network for Explaining
Latent Representations”, CVPR 2020.</p>"""


def _flat(run: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested record as one table, in words; files by their names, hashes by their first digits."""
    flat: dict[str, str] = {}
    for key, value in run.items():
        place = f"{prefix}{key}"
        if place in UNSAID:
            continue
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{place}/"))
        elif value is not None and value != []:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if isinstance(value, float):
                text = f"{value:.6g}"
            if "sha256" in key:
                text = text[:12] + "…"
            elif isinstance(value, str) and Path(value).is_absolute():
                text = Path(value).name
            flat[_in_words(place)] = text
    return flat


def _in_words(place: str) -> str:
    """What an entry of ``run.json`` is called on the page."""
    if place in WORDS:
        return WORDS[place]
    group, slash, key = place.partition("/")
    if group in GROUPS and slash:
        return GROUPS[group].format(key)
    return place.replace("/", ": ").replace("_", " ")


def _path_of(latents: Any) -> str:
    if isinstance(latents, Mapping):
        latents = latents.get("path")
    return latents if isinstance(latents, str) else ""


def _json(path: Path) -> dict[str, Any]:
    """The file's dictionary; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged or no JSON file ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a JSON object")
    return found


def _log(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Column to steps and finite values; columns without any are left out."""
    if not path.is_file():
        return {}
    found: dict[str, tuple[list[float], list[float]]] = {}
    with open(path, newline="", encoding="utf-8") as stream:
        for number, record in enumerate(csv.DictReader(stream), start=2):
            try:
                step = float(record["step"])
                values = {key: float(text) for key, text in record.items() if key and key != "step" and text}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: line {number} is damaged ({error!r})") from error
            for key, value in values.items():
                if np.isfinite(value):
                    steps, column = found.setdefault(key, ([], []))
                    steps.append(step)
                    column.append(value)
    return found


def _as_images(images: Any) -> NDArray[np.float64]:
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


def _grid(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[rows, columns, h, w, 3]`` side by side, with gaps one sees through: ``[height, width, 4]``."""
    rows, columns, h, w, _ = images.shape
    gap = _gap(w)
    sheet = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, 4))
    for r in range(rows):
        for c in range(columns):
            cell = sheet[r * (h + gap) :, c * (w + gap) :][:h, :w]
            cell[..., :3], cell[..., 3] = images[r, c], 1
    return sheet


def _with_margins(
    body: NDArray[np.float64], top: NDArray[np.float64], left: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A grid with the images that its columns and rows come from at the top and at the left."""
    h, w = top.shape[1:3]
    rule = 4 * _gap(w)
    sheet = np.zeros((h + rule + body.shape[0], w + rule + body.shape[1], 4))
    sheet[:h, w + rule :] = _grid(top[None])
    sheet[h + rule :, :w] = _grid(left[:, None])
    sheet[h + rule :, w + rule :] = body
    return sheet


def _write_sheet(folder: Path, name: str, sheet: NDArray[np.float64]) -> None:
    """A sheet on white, three pixels to each, as a file in ``pictures``; ``name`` without what a file's may not hold."""
    from matplotlib import image as files

    white = 1 - sheet[..., 3:] * (1 - sheet[..., :3])
    stream = io.BytesIO()
    files.imsave(stream, np.clip(white, 0, 1).repeat(3, axis=0).repeat(3, axis=1))
    file = re.sub(r"[^-\w]+", "_", name)
    (folder / "pictures").mkdir(exist_ok=True)
    write_file(folder / "pictures" / f"{file}.png", stream.getvalue())


def _scale(image: NDArray[np.float64], width: int) -> int:
    return max(1, width // image.shape[1])
