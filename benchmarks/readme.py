"""Writes the README's tables from benchmarks/results: python benchmarks/readme.py [--check]"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- {}: written by benchmarks/readme.py -->", "<!-- end of {} -->"
SHOWN = {
    "eager": "eager",
    "compile": "torch.compile",
    "compile, frozen": "compile, frozen",
    "FrEIA": "FrEIA",
    "nflows": "nflows",
    "normflows": "normflows",
    "iin-fast": "**iin-fast**",
}


def milliseconds(row: dict | None) -> str:
    if row is None:
        return ""
    value = 1e3 * row["median"]
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speed_table() -> str:
    """Medians of the committed CPU run, and how many times faster than eager ours is."""
    result = json.loads((RESULTS / "flow_cpu.json").read_text())
    machine, peaks = result["machine"], result["peaks"]
    lines = [
        f"Medians in milliseconds; {machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}. All systems "
        "in one run, in turn; minimum and maximum are in the result file. The floor is what the machine's peaks allow: "
        f"{peaks['gflops']:.0f} GFLOP/s in registers, {peaks['read_gbytes']:.0f} GB/s read, {peaks['copy_gbytes']:.0f} GB/s "
        f"copied (torch.mm reaches {peaks['torch_mm_gflops']:.0f} GFLOP/s).",
        "",
        f"| case | {' | '.join(SHOWN.values())} | × eager (range) | × floor |",
        f"|---|{'---:|' * (len(SHOWN) + 2)}",
    ]
    for case, found in result["cases"].items():
        systems = found["systems"]
        ours, eager = systems["iin-fast"], systems["eager"]
        ratio = f"{ours['times_eager']:.1f} ({eager['min'] / ours['max']:.1f}–{eager['max'] / ours['min']:.1f})"
        cells = [milliseconds(systems.get(name)) for name in SHOWN]
        lines.append(f"| {case} | {' | '.join(cells)} | {ratio} | {ours['times_floor']:.2f} |")
    memory = result["memory"]
    lines += [
        "",
        f"Peak memory of forward + backward at batch {memory['batch']}, MiB above parameters and gradients:",
        "",
    ]
    depths = sorted(next(iter(memory["systems"].values())), key=int)
    lines += [f"| | {' | '.join(f'{depth} blocks' for depth in depths)} |", f"|---|{'---:|' * len(depths)}"]
    for name, by_depth in memory["systems"].items():
        cells = [f"{by_depth[depth]['above_gradients']:.0f}" for depth in depths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Largest inversion error, max |T⁻¹(T(x)) − x|, ours (eager):", ""]
    lines += [f"- {n}: {r['max_error']:.0e} ({r['max_error_eager']:.0e})" for n, r in result["inversion"].items()]
    return "\n".join(lines)


def demo_table() -> str:
    """What the demo's committed run measured on held-out images."""
    metrics = json.loads((RESULTS / "demo_metrics.json").read_text())
    rows = [
        ("digit swap: the judge reads the donor's digit", "swap_digit_accuracy", "baseline_swap_digit_accuracy"),
        ("digit swap: change of color, mean abs RGB", "swap_digit_color_error", "baseline_swap_digit_color_error"),
        ("color swap: the judge still reads the digit", "swap_color_accuracy", "baseline_swap_color_accuracy"),
        ("color swap: distance to the donor's color", "swap_color_error", "baseline_swap_color_error"),
    ]
    lines = ["| held-out images | IIN | without IIN (class-mean shift) |", "|---|---:|---:|"]
    lines += [f"| {label} | {metrics[ours]:.3f} | {metrics[base]:.3f} |" for label, ours, base in rows]
    lines += [f"| the judge's own accuracy | {metrics['judge_accuracy']:.3f} | |"]
    return "\n".join(lines)


def main() -> int:
    readme = ROOT / "README.md"
    text = before = readme.read_text()
    for name, table in (("speed", speed_table), ("demo", demo_table)):
        begin, end = BEGIN.format(name), END.format(name)
        head, rest = text.split(begin)
        text = head + begin + "\n" + table() + "\n" + end + rest.split(end)[1]
    if "--check" in sys.argv[1:]:
        if text != before:
            print("README.md differs from benchmarks/results: run python benchmarks/readme.py")
        return int(text != before)
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
