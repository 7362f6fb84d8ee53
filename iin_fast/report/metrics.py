"""What ``evaluation.json`` holds, as rows of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..iin.factors import RESIDUAL

__all__ = ["COLUMNS", "cards", "columns_of", "information", "lines", "own_correlations", "shared_correlations"]

COLUMNS = {"iin": "IIN", "mean_shift": "mean shift", "linear_iin": "linear IIN", "pca": "PCA", "raw": "raw z"}
Evaluation = Mapping[str, Any]
# Swaps: title, what it is, the key of its number; the bound follows from what the judge reads right without a swap.
SWAPS = (
    ("it changes", "The judge reads the donor's {}.", "target"),
    ("all else stays", "The judge reads every other concept as before.", "keep_all"),
    ("both at once", "Either of the two is easy alone; this is the one to look at.", "both"),
)
# Metrics of all concepts: where they stand, title, what they are.
WHOLE = (
    ("mig", "mig", "Information gap (MIG)", "How much more the best factor knows of a concept than the second best."),
    ("sap", "sap", "Predictability gap (SAP)", "How much better the best factor reads a concept than the second best."),
    ("dci", "disentanglement", "DCI disentanglement", "Each factor serves one concept."),
    ("dci", "completeness", "DCI completeness", "Each concept is served by one factor."),
    (
        *("dci", "informativeness", "DCI informativeness"),
        "The concepts can be read from all factors together, above chance.",
    ),
)
READERS = {"linear": "a linear probe", "mlp": "a small network"}


def columns_of(evaluation: Evaluation) -> dict[str, str]:
    """The systems that were compared, and how they are called."""
    compared = evaluation.get("pairs") or evaluation.get("swap") or evaluation.get("mig", {})
    return {who: title for who, title in COLUMNS.items() if who in compared}


def lines(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The rows of the table of metrics: text, note, which way is better, cells (text, whether the best), bound."""
    columns = columns_of(evaluation)
    rows: list[dict[str, Any]] = []

    def line(
        text: str, note: str, found: Mapping[str, float], better: str, bound: str = "", form: str = "{:.0%}"
    ) -> None:
        best = form.format((max if better == "higher" else min)(found.values()))
        shown = ["–" if found.get(who) is None else form.format(found[who]) for who in columns]
        cells = [(text, len(found) > 1 and text == best) for text in shown]
        rows.append({"text": text, "note": note, "better": better, "cells": cells, "bound": bound})

    swap = evaluation.get("swap", {})
    for concept in swap.get("iin", ()):
        own, others = (swap["judge"][concept], [swap["judge"][name] for name in swap["judge"] if name != concept])
        bounds = {"target": own, "keep_all": min(others, default=own), "both": min([own, *others])}
        for title, note, key in SWAPS if others else SWAPS[:1]:
            found = {who: swap[who][concept][key] for who in columns}
            line(f"Swap {concept}: {title}", note.format(concept), found, "higher", f"≈ {bounds[key]:.0%}")
    for metric, key, title, note in WHOLE:
        if metric in evaluation:
            line(title, note, {who: found[key] for who, found in evaluation[metric].items()}, "higher", "100%")
    for concept in evaluation.get("concepts", ()) if "leak" in evaluation else ():
        for key, reader in READERS.items():
            found = {who: scores[concept][key] for who, scores in evaluation["leak"].items()}
            note = f"What {reader} reads of it from the factors that should not hold it, above chance."
            line(f"Leak of {concept}, {reader}", note, found, "lower", "0%")
    pairs = evaluation.get("pairs", {})
    for name in pairs.get("names", ()):
        asked = "1" if pairs["rho"] is None else f"{pairs['rho']:.3g}"
        for title, note, kind, factor, better in (
            (f"Pairs that share {name}", "Correlation of the two samples in its own factor.", "shared", name, "higher"),
            (
                *(f"Pairs that share {name}: the residual", "What they have in common there was left behind."),
                *("shared", RESIDUAL, "lower"),
            ),
            (
                *(f"Pairs that do not share {name}", "Correlation in its own factor, without its sign."),
                *("apart", name, "lower"),
            ),
        ):
            found = {who: pairs[who][kind].get(factor, {}).get(name) for who in columns}
            found = {who: value for who, value in found.items() if value is not None}
            if better == "lower":
                found = {who: abs(value) for who, value in found.items()}
            if found:
                line(title, note, found, better, asked if better == "higher" else "0", "{:.2f}")
    return rows


def cards(evaluation: Evaluation, log: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers at the top of a page, and what they are."""
    made = []
    if evaluation.get("swap"):
        swap = evaluation["swap"]
        ours, shift = (np.mean([found["both"] for found in swap[who].values()]) for who in ("iin", "mean_shift"))
        text = f"of swaps give the donor's concept and keep all others ({shift:.0%} by mean shift)"
        made.append((f"{ours:.0%}", text))
        judge = np.mean(list(swap["judge"].values()))
        made.append((f"{judge:.0%}", "of concepts the judge reads right where nothing was swapped: the ceiling"))
    if evaluation.get("mig"):
        ours, theirs = (evaluation["mig"][who]["mig"] for who in ("iin", "pca"))
        text = f"of a concept's information: the lead of its best factor over the second ({theirs:.0%} for PCA)"
        made.append((f"{ours:.0%}", text))
    if evaluation.get("pairs"):
        own, other = (
            [row[name] for name, row in evaluation["pairs"][who]["shared"].items() if name in row]
            for who in ("iin", "pca")
        )
        if own and other:
            text = f"correlation of a concept's own factor over pairs that share it ({np.mean(other):.2f} for PCA)"
            made.append((f"{np.mean(own):.2f}", text))
    if evaluation.get("likelihood"):
        found = evaluation["likelihood"]
        text = f"nats per dimension on held-out latents; a Gaussian has {found['gaussian']:.2f} (lower is better)"
        made.append((f"{found['iin']:.2f}", text))
    elif "held_out_nats_per_dim" in log:
        made.append((f"{log['held_out_nats_per_dim'][1][-1]:.2f}", "nats per dimension on held-out latents"))
    return made


def own_correlations(evaluation: Evaluation) -> list[tuple[str, float, float]]:
    """Concept, and the correlation in its own factor over pairs of the same class, and of different ones."""
    found = evaluation.get("correlation", {}).get("iin")
    if not found:
        return []
    same, different = found["same"], found["different"]
    return [(name, same[name][name], different[name][name]) for name in same if name in same[name]]


def shared_correlations(evaluation: Evaluation) -> dict[str, Any] | None:
    """The heat map of pairs: head, and rows of cells."""
    pairs = evaluation.get("pairs")
    if not pairs:
        return None
    rows = [
        (
            factor,
            [
                {"share": abs(values[name]), "text": f"{values[name]:.2f}"} if name in values else None
                for name in pairs["names"]
            ],
        )
        for factor, values in pairs["iin"]["shared"].items()
    ]
    return {"head": [("factor", ""), *(("pairs that share", name) for name in pairs["names"])], "rows": rows}


def information(evaluation: Evaluation) -> dict[str, Any] | None:
    """The heat map of what factors know: head, and rows of cells."""
    if "information" not in evaluation:
        return None
    found = evaluation["information"]["iin"]
    rows = [
        (
            factor,
            [
                {
                    "share": values[name],
                    "text": f"{values[name]:.0%}",
                    "small": f"{found['nats'][factor][name]:.2f} nats",
                }
                for name in found["entropy"]
            ],
        )
        for factor, values in found["normalised"].items()
    ]
    head = [("factor", ""), *((name, f"{entropy:.2f} nats") for name, entropy in found["entropy"].items())]
    return {"head": head, "rows": rows, "samples": found["samples"]}
