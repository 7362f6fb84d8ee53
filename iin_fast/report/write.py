"""The page that shows a trained IIN to a person: one HTML file in its run folder, made of ``templates/page.html``."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..files import read_json, write_file
from ..iin import IIN, LinearIIN
from ..iin.factors import RESIDUAL
from ..train import held_out_rise
from ..train.run_folder import recorded
from . import metrics, sheets
from .samples import Images, Shown, interpolations, swaps

__all__ = ["write_report"]

# How entries of run.json read on the page; what is not here reads as it is written there.
WORDS = {
    "latents/path": "latents",
    "latents/kind": "what they come with",
    "latents/sha256": "their SHA-256",
    "n": "number of latents",
    "dim": "numbers in a latent",
    "names": "concepts",
    "settings/context": "concept that the network is conditioned on",
    "settings/preset": "what was not given is chosen from the latents (auto), or as in the paper",
    "settings/minutes": "minutes of two CPU cores that steps were chosen for",
    "settings/start": "start",
    "settings/dims_method": "sizes of factors estimated as",
    "settings/others": "concepts that a pair does not share",
    "settings/unlabelled": "share of pairs without labels",
    "settings/standardise": "features standardised",
    "settings/variance": "share of the variance whose directions the flow learns on",
    "settings/rho": "correlation of a shared factor (ρ)",
    "settings/coupling": "coupling",
    "settings/batch": "pairs in a step",
    "settings/learning_rate": "learning rate",
    "settings/warmup": "steps in which it rises",
    "settings/decay_start": "step from which it falls to 0",
    "settings/weight_decay": "weight decay",
    "settings/clip": "longest gradient",
    "settings/contrast": "weight of the contrast",
    "settings/noise": "noise on the latents, in standard deviations",
    "settings/noise_end": "noise after three tenths of the steps",
    "settings/held_out": "share held out",
    "settings/keep": "model that is left",
    "settings/patience": "evaluations without a gain that end it",
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
    *(
        "format",
        "version",
        "classes",
        "edges",
        "settings/factors",
        "settings/steps",
        "settings/n_flows",
        "settings/hidden_dim",
    ),
    *("settings/hidden_depth", "settings/log_every", "settings/held_out_every", "settings/save_every"),
}

# What comes of a number that is a text, or of an entry that is not there, wherever the page reads it.
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

Log = Mapping[str, tuple[list[float], list[float]]]  # column to steps and values


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
            taken, if it is there; all rows of :class:`iin_fast.data.Latents` that the run was not trained on.
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
    sheets.require_matplotlib("write_report")
    folder = Path(run_folder)
    model = IIN.load(folder)
    run = recorded(folder)
    settings, damage = run.get("settings", {}), (*DAMAGE, _jinja2().TemplateError)
    shown = None if latents is None else Shown.of_run(folder, model, latents, decoder, images)
    pictures = {"swaps": swaps(shown, folder), "ways": interpolations(shown, folder)}
    file = folder / "evaluation.json"
    evaluation = read_json(file) if file.is_file() else {}
    log = _log(folder / "logs" / "metrics.csv")
    if settings.get("patience") and "loss" in log:  # it may have stopped early
        run = {**run, "steps": int(log["loss"][0][-1])}
    try:
        page = _template().render(
            model=model,
            parts=[*model.concepts, *(["the rest"] if RESIDUAL in model.sizes else [])],
            residual=RESIDUAL,
            run=run,
            source=Path(_path_of(run.get("latents"))).name,
            evaluation=evaluation,
            cards=metrics.cards(evaluation, log),
            columns=list(metrics.columns_of(evaluation).values()),
            lines=metrics.lines(evaluation),
            own=metrics.own_correlations(evaluation),
            shared=metrics.shared_correlations(evaluation),
            information=metrics.information(evaluation),
            advice=held_out_rise(folder),
            plots=_plots(log),
            speed=np.quantile(log["samples_per_second"][1], [0, 0.5, 1]).tolist()
            if "samples_per_second" in log
            else None,
            facts=_facts(model, run),
            **pictures,
        )
    except damage as error:
        raise ValueError(
            f"{folder}: evaluation.json, run.json or logs/metrics.csv is damaged or of another version ({error!r}); "
            "iin-fast evaluate writes the first anew"
        ) from error
    path = folder / "report.html"
    write_file(path, page.encode())
    return path


def _jinja2() -> Any:
    import jinja2

    return jinja2


@cache
def _template() -> Any:
    """The page, into which all that is inserted is escaped."""
    jinja2 = _jinja2()
    loader = jinja2.PackageLoader("iin_fast.report")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "page.html"
    )


def _plots(log: Log) -> list[dict[str, str]]:
    found = []
    for trained, held_out, title in (
        ("loss", "held_out_loss", "loss, nats per pair"),
        ("nats_per_dim", "held_out_nats_per_dim", "nats per dimension"),
    ):
        if trained in log or held_out in log:
            draw = partial(_curves, log, trained, held_out, title)
            found.append(sheets.plot(draw, f"{title}, over training steps", (4.6, 3)))
    return found


def _curves(
    log: Log,
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


def _facts(model: IIN, run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the model was made, in words."""
    config = model.config
    network = "a linear map, computed from pairs"
    if not isinstance(model, LinearIIN):
        network = f"{config['n_flows']} blocks, hidden width {config['hidden_dim']}"
        network += f", {sum(p.numel() for p in model.parameters()):,} parameters"
    if run.get("settings", {}).get("factors"):  # not estimated
        run = {**run, "settings": {k: v for k, v in run["settings"].items() if k != "dims_method"}}
    return [("network", f"{network}, {config['dtype']}"), *_flat(run).items()]


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
