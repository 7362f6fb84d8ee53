"""Writes the tables of README.md and docs/ from benchmarks/results: python benchmarks/readme.py [--check]"""

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


def spline_table() -> str:
    """Medians of the committed run of benchmarks/spline.py, and how many times faster than each peer ours is."""
    result = json.loads((RESULTS / "spline_cpu.json").read_text())
    machine, peers = result["machine"], result["peers"]
    systems = list(next(iter(result["cases"].values())))
    lines = [
        f"Medians in milliseconds, and how many times as long as ours; in brackets least and most. {result['bins']} bins, linear "
        f"tails, float32; {machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}, "
        f"{', '.join(f'{name} {version}' for name, version in peers.items())}. All systems in one run, in turn.",
        "",
        f"| case | {' | '.join('**iin-fast**' if s == 'iin-fast' else s for s in systems)} |",
        f"|---|{'---:|' * len(systems)}",
    ]
    for case, found in result["cases"].items():
        ours, cells = found["iin-fast"], []
        for system, row in found.items():
            times = f", {row['ours']:.1f} × ({row['min'] / ours['max']:.1f}–{row['max'] / ours['min']:.1f})"
            cells.append(milliseconds(row) + ("" if system == "iin-fast" else times))
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def backend_table() -> str:
    """Medians of the committed run of benchmarks/backends.py."""
    result = json.loads((RESULTS / "backends_cpu.json").read_text())
    machine = result["machine"]
    names = list(next(iter(result["cases"].values())))
    lines = [
        f"Medians in milliseconds (least to most); {machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}.",
        "",
        f"| case | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for case, found in result["cases"].items():
        cells = [f"{milliseconds(row)} ({1e3 * row['min']:.3g} to {1e3 * row['max']:.3g})" for row in found.values()]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def dropin_table() -> str:
    """Speed-ups of the committed run of benchmarks/dropin.py."""
    result = json.loads((RESULTS / "dropin_cpu.json").read_text())
    machine = result["machine"]
    sources = [f"{name} {number}" for name, number in result["libraries"].items() if name not in result["peers"]]
    sources += [f"{name} at {commit[:7]}" for name, commit in result["peers"].items()]
    columns = [(what, n) for n in result["batches"] for what in ("forward", "forward + backward")]
    columns.append(("inverse", result["inverse at"]))
    lines = [
        f"{machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}; {', '.join(sources)}. Speed-up: "
        "median time of the library's own code over that after `accelerate`, both in one run, in turn; above 1 is faster. "
        "Forward is the direction of the density, inverse that of samples.",
        "",
        "| | " + " | ".join(f"{what}, batch {n}" for what, n in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, by_batch in result["models"].items():
        for way in ("", ", frozen"):
            cells = [by_batch[str(n)].get(what + way) for what, n in columns]
            if any(cells):
                shown = ["" if cell is None else f"{cell['speedup']:.2g}" for cell in cells]
                lines.append(f"| {name}{way} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{name} is left alone: {why}." for name, why in result["left"].items())])


def peers_list() -> str:
    """How the libraries' own tests, and ours on code that is no package, ended."""
    suites = json.loads((RESULTS / "peer_suites.json").read_text())
    sources = json.loads((RESULTS / "peer_sources.json").read_text())
    lines = [f"The libraries' own test suites, with and without `patch` (torch {suites['machine']['torch']}):", ""]
    for name, found in suites["suites"].items():
        at = f"at {found['commit'][:7]}" if "commit" in found else found["version"]
        ended = [f"{found[kind]} {word}" for kind, word in WORDS.items() if found[kind]]
        differ = len(found["different_under_patch"])
        how = "the same with `patch`" if differ == 0 else f"{differ} end otherwise with `patch`"
        calls = sum(found["op_calls_under_patch"].values())
        lines.append(f"- {name} {at}: {', '.join(ended)}; {how}, in {calls} calls of fused ops")
    lines += ["", f"`tests/dropin` on repositories (torch {sources['machine']['torch']}):", ""]
    for name, found in sources["sources"].items():
        failed = f"{len(found['failed'])} failed" if found["failed"] else "none failed"
        lines.append(f"- {name} at {found['commit'][:7]}: {sum(found['passed'].values())} passed, {failed}")
    return "\n".join(lines)


WORDS = {"passed": "passed", "failure": "failed", "error": "with errors", "skipped": "skipped"}


def overhead_line() -> str:
    """The worst case of the committed run of benchmarks/overhead.py."""
    result = json.loads((RESULTS / "overhead_cpu.json").read_text())
    machine, cases = result["machine"], result["cases"]
    name = max(cases, key=lambda case: cases[case]["above_us"])
    return (
        f"The most that any of {len(cases)} cases took is {result['worst_above_us']:.1f} microseconds ({name}; "
        f"{machine['CPU']}, torch {machine['torch']}, commit {machine['commit']})."
    )


PAGES = {
    "docs/composition.md": {"overhead": overhead_line},
    "docs/dropin.md": {"speed": dropin_table, "peers": peers_list},
    "docs/backends.md": {"backends": backend_table},
    "README.md": {"speed": speed_table, "demo": demo_table, "splines": spline_table},
    "docs/performance.md": {"splines": spline_table},
}


def main() -> int:
    differs = False
    for page, tables in PAGES.items():
        path = ROOT / page
        text = before = path.read_text()
        for name, table in tables.items():
            if table is dropin_table and not (RESULTS / "dropin_cpu.json").exists():  # not run yet
                continue
            begin, end = BEGIN.format(name), END.format(name)
            head, rest = text.split(begin)
            text = head + begin + "\n" + table() + "\n" + end + rest.split(end)[1]
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif text != before:
            print(f"{page} differs from benchmarks/results: run python benchmarks/readme.py")
            differs = True
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
