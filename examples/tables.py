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
    if "cpu_seconds" in run:
        return f"One run of {run['cpu_seconds']:.0f} s of processor time, torch {run['torch']}."
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


def spline_density(results: Mapping[str, Any]) -> str:
    lines = [
        f"{made_by(results)} {results['seeds']} seeds, mean ± standard deviation of test nats; {results['steps']} steps of "
        f"{results['batch']} rows, seconds of training on one thread: median (min to max).",
        "",
        "| table | iin-fast: nats | seconds | nflows: nats | seconds | difference in nats, seed by seed | times faster |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for table, row in results["tables"].items():
        cells = [table]
        for system in ("iin-fast", "nflows"):
            nats, seconds = row[system]["test nats"], row[system]["seconds"]
            cells.append(f"{nats['mean']:.2f} ± {nats['std']:.2f}")
            cells.append(f"{seconds['median']:.1f} ({seconds['min']:.1f} to {seconds['max']:.1f})")
        gap, ratio = row["difference in nats"], row["times faster"]
        cells.append(f"{gap['mean']:+.2f} ± {gap['std']:.2f}")
        cells.append(f"{ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SYSTEMS = {"raw": "z", "pca": "principal components", "iin": "IIN"}
SWAPS = {"iin": "IIN", "mean_shift": "mean shift", "pca": "principal components"}


def judged_swaps(studies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What ``iin_fast.evaluate`` found of swaps: a row for each concept of each study."""
    columns = [f"{who}: changed | all else kept" for who in SWAPS.values()]
    lines = [f"| swapped | read right unswapped | {' | '.join(columns)} |", "|---|---:|" + "---:|" * 2 * len(SWAPS)]
    for study, swap in studies.items():
        for concept in swap["iin"]:
            cells = [f"{swap['judge'][concept]:.3f}"]
            for who in SWAPS:
                cells += [f"{swap[who][concept][key]:.3f}" for key in ("target", "keep_all")]
            lines.append(f"| {study}{concept} | {' | '.join(cells)} |")
    return lines


def shapes(results: Mapping[str, Any]) -> str:
    columns = ["disentanglement", "completeness", "informativeness", "MIG", "SAP"]
    lines = [
        f"{made_by(results)} {results['pictures']['held out']} held-out pictures, "
        f"{results['autoencoder']['dimensions']} dimensions of z.",
        "",
        f"| | DCI: {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for kind, text in (("dimensions", "single dimensions of"), ("factors", "factors of")):
        for system, name in SYSTEMS.items():
            scores = results["scores"][kind][system]
            lines.append(f"| {text} {name} | {' | '.join(f'{scores[column]:.3f}' for column in columns)} |")
    return "\n".join([*lines, "", *judged_swaps({"": results["swap"]})])


def two_models(results: Mapping[str, Any]) -> str:
    models = results["models"]
    lines = [
        f"{made_by(results)} {results['dimensions']} dimensions of either latent; the classifier names "
        f"{results['classifier accuracy']:.1%} of held-out digits.",
        "",
        "| dimensions | digit | color | residual | agreement: digit | color |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in models.items():
        cells = [str(size) for size in found["sizes"]["published"].values()]
        cells += [f"{found['agreement'][concept]:.3f}" for concept in ("digit", "color")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *judged_swaps({f"{name}, ": found["swap"] for name, found in models.items()})]
    columns = ["all of z", "its own factor", "all other factors", "by chance"]
    lines += ["", f"| read right from | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, found in models.items():
        for concept, read in found["leak"].items():
            cells = [f"{read[key]:.3f}" for key in ("all", "own", "mlp_accuracy", "chance")]
            lines.append(f"| {name}, {concept} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sbi(results: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"{made_by(results)} {results['machine']['CPU']}; {versions}. {results['simulations']} simulations, "
        f"{results['epochs']} epochs; seconds of {results['timed epochs']} epochs, {results['repeats']} times in turn: "
        "median (min to max).",
        "",
        "| estimator | training, s: own | patched | × | held-out log-prob: own | patched | C2ST: own against patched | own against another seed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in results["estimators"].items():
        own, fast = row["seconds"]["own"], row["seconds"]["patched"]
        times = [f"{side['median']:.2f} ({side['min']:.2f} to {side['max']:.2f})" for side in (own, fast)]
        lines.append(
            f"| {name} | {' | '.join(times)} | {own['median'] / fast['median']:.2f} | {row['log-prob']['own']:.3f} | "
            f"{row['log-prob']['patched']:.3f} | {row['own against patched']['C2ST']:.3f} | "
            f"{row['own against another seed']['C2ST']:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    page = DOCS / "examples.md"
    text = before = page.read_text()
    for write in (two_models, shapes, sentences, outliers, spline_density, sbi):
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
