"""Writes docs/examples.md's tables from docs/examples/*.json: python examples/tables.py [--check]

The JSON files are the results.json of the examples' runs.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- {}: written by examples/tables.py -->", "<!-- end of {} -->"


def made_by(results: Mapping[str, Any]) -> str:
    run = results["run"]
    return f"One run of {run['seconds']:.0f} s, torch {run['torch']}."


def swaps(study: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{study['sentences']} sentences, {study['held out']} of them held out; {study['dimensions']} dimensions of z.",
        "",
        "| concept | swaps | IIN: exact | swapped | rest kept | mean shift: exact | swapped | rest kept |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for concept, row in study["swaps"].items():
        cells = [f"{row[who][what]:.3f}" for who in ("IIN", "mean shift") for what in ("exact", "swapped", "kept")]
        lines.append(f"| {concept} | {row['swaps']} | {' | '.join(cells)} |")
    return lines


def sentences(results: Mapping[str, Any]) -> str:
    lines = [made_by(results), "", "**Statements**: " + swaps(results["statements"])[0]]
    lines += swaps(results["statements"])[1:]
    lines += ["", "**Verdicts**: " + swaps(results["verdicts"])[0], *swaps(results["verdicts"])[1:], ""]
    for example in results["verdicts"]["examples"]:
        if example["concept"] in ("negation", "verdict"):
            lines.append(
                f"- *{example['sentence']}* with the {example['concept']} of *{example['donor']}*: IIN "
                f"*{example['IIN']}*, mean shift *{example['mean shift']}*"
            )
    return "\n".join(lines)


def outliers(results: Mapping[str, Any]) -> str:
    lines = [
        f"{made_by(results)} {results['repeats']} splits, mean ± standard deviation.",
        "",
        "| score | AUROC | average precision |",
        "|---|---:|---:|",
    ]
    for name, row in results["systems"].items():
        cells = [f"{row[m]['mean']:.3f} ± {row[m]['std']:.3f}" for m in ("AUROC", "average precision")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sbi(results: Mapping[str, Any]) -> str:
    lines = [
        f"{made_by(results)} {results['simulations']} simulations, {results['epochs']} epochs, {results['threads']} threads.",
        "",
        "| estimator | training, s: own | patched | × | held-out log-prob: own | patched | C2ST: own against patched | own against another seed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results["estimators"].items():
        own, fast = row["seconds"]["own"], row["seconds"]["patched"]
        lines.append(
            f"| {name} | {own:.1f} | {fast:.1f} | {own / fast:.2f} | {row['log-prob']['own']:.3f} | "
            f"{row['log-prob']['patched']:.3f} | {row['own against patched']['C2ST']:.3f} | "
            f"{row['own against another seed']['C2ST']:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    page = DOCS / "examples.md"
    text = before = page.read_text()
    for write in (sentences, outliers, sbi):
        name = write.__name__
        begin, end = BEGIN.format(name), END.format(name)
        head, rest = text.split(begin)
        if not (DOCS / "examples" / f"{name}.json").exists():  # not run yet
            continue
        results = json.loads((DOCS / "examples" / f"{name}.json").read_text())
        text = head + begin + "\n" + write(results) + "\n" + end + rest.split(end)[1]
    if "--check" in sys.argv[1:]:
        return int(text != before)
    page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
