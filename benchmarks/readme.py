"""Writes the tables of README.md and docs/ from benchmarks/results: python benchmarks/readme.py [--check]"""

import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from iin_fast.bench.timing import NOISE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- {}: written by benchmarks/readme.py -->", "<!-- end of {} -->"
NOISY = "†"  # beside a time
SHOWN = {
    "eager": "eager",
    "compile": "torch.compile",
    "compile frozen": "compile frozen",
    "FrEIA": "FrEIA",
    "nflows": "nflows",
    "normflows": "normflows",
    "iin-fast": "**iin-fast**",
}


def milliseconds(row: dict | None) -> str:
    if row is None:
        return ""
    value = 1e3 * row["median"]
    return (f"{value:.0f}" if value >= 100 else f"{value:.3g}") + NOISY * (row["max"] > NOISE * row["min"])


def speed_table() -> str:
    """Medians of the committed CPU run, and how many times faster than eager ours is."""
    result = json.loads((RESULTS / "flow_cpu.json").read_text())
    machine, peaks = result["machine"], result["peaks"]
    lines = [
        f"Medians in milliseconds; {machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}, iin-fast "
        f"{machine['iin-fast']} at {machine['commit'][:7]}. All systems in one run, in turn; minimum and maximum are in the result file. The floor is what the machine's peaks allow: "
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
    """The evaluation.json that `make demo` left in runs/demo."""
    swap = json.loads((RESULTS / "demo_evaluation.json").read_text())["swap"]
    systems = {"iin": "IIN", "mean_shift": "mean shift", "linear_iin": "linear IIN", "pca": "PCA"}
    lines = [f"| swaps of held-out images | {' | '.join(systems.values())} |", f"|---|{'---:|' * len(systems)}"]
    for name, other in (("digit", "color"), ("color", "digit")):
        for what, key in (("changes", "target"), (f"changes, and the {other} stays", "both")):
            cells = " | ".join(f"{swap[who][name][key]:.1%}" for who in systems)
            lines.append(f"| the {name} {what} | {cells} |")
    read = " and ".join(f"{share:.1%} of {name}s" for name, share in swap["judge"].items())
    return "\n".join([*lines, "", f"The judge reads {read} right where nothing was swapped."])


def spline_table(name: str = "spline_cpu.json") -> str:
    """Medians of a run of benchmarks/spline.py, and how many times faster than each peer ours is; nothing before there is a run."""
    if not (RESULTS / name).exists():
        return ""
    result = json.loads((RESULTS / name).read_text())
    machine, peers = result["machine"], result["peers"]
    systems = list(next(iter(result["cases"].values())))
    floors, memory = result.get("floors"), result.get("memory")  # runs before these were measured have none
    names = ["**iin-fast**" if s == "iin-fast" else s for s in systems] + (["× floor"] if floors else [])
    lines = [
        f"Medians in milliseconds, and how many times as long as ours; in brackets least and most. {result['bins']} bins, linear "
        f"tails, float32; {machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}, "
        f"{', '.join(f'{name} {version}' for name, version in peers.items())}. All systems in one run, in turn.",
        "",
        f"| case | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    if floors:
        peaks = result["peaks"]
        lines[0] += (
            f" The floor: the bytes at {peaks['read_gbytes']:.0f} GB/s read and {peaks['copy_gbytes']:.0f} GB/s copied, as the "
            f"same run measured them."
        )
    for case, found in result["cases"].items():
        ours, cells = found["iin-fast"], []
        for system, row in found.items():
            times = f", {row['ours']:.1f} × ({row['min'] / ours['max']:.1f}–{row['max'] / ours['min']:.1f})"
            cells.append(milliseconds(row) + ("" if system == "iin-fast" else times))
        if floors:
            cells.append(f"{ours['times_floor']:.1f} ({1e3 * floors[case]:.2g} ms)")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    if memory:
        sizes = "; ".join(f"{name}: {mib:.0f}" for name, mib in memory["mib"].items())
        lines += [
            "",
            f"Peak memory of forward + backward at {memory['rows']} x {memory['features']}, MiB above the inputs, gradients "
            f"included. {sizes}.",
        ]
    return "\n".join(lines)


OURS_IN_STEPS = {  # sides of benchmarks/engine.py
    "iin-fast, accelerate(optimizer)": "after `accelerate(optimizer)`",
    "iin-fast, nll_backward": "and with `nll_backward`",
}
ENGINE_RIVALS = ("flowjax", "nflows", "zuko", "normflows")


def rivals_table(result: dict[str, Any], rivals: dict[str, str], libraries: str, floor: str) -> list[str]:
    """A row for each case of one run; ``rivals`` are sides and their names, some of which a case may lack."""
    machine = result["machine"]
    lines = [
        f"Medians in milliseconds, and how many times as long as ours; in brackets least and most. {machine['CPU']} "
        f"({machine['CPU instruction set']}), {libraries}. All sides in one run, in turn, with 2 threads. The floor: {floor}.",
        "",
        f"| case | **iin-fast** | {' | '.join(rivals.values())} | × floor |",
        f"|---|{'---:|' * (len(rivals) + 2)}",
    ]
    for case, found in result["cases"].items():
        sides, ours = found["sides"], found["sides"]["iin-fast"]
        cells = []
        for rival in rivals:
            row = sides.get(rival)
            ratio = "" if row is None else f", {row['median'] / ours['median']:.1f} ×"
            span = "" if row is None else f" ({row['min'] / ours['max']:.1f}–{row['max'] / ours['min']:.1f})"
            cells.append(milliseconds(row) + ratio + span)
        lines.append(f"| {case} | {milliseconds(ours)} | {' | '.join(cells)} | {ours['median'] / found['floor']:.1f} |")
    return lines


def engine_table(name: str = "engine_cpu.json") -> str:
    """Whole flows beside their rivals; nothing before there is a run."""
    if not (RESULTS / name).exists():
        return ""
    result = json.loads((RESULTS / name).read_text())
    libraries = ", ".join(f"{library} {result['versions'][library]}" for library in ("torch", "jax", *ENGINE_RIVALS))
    floor = f"the arithmetic of the nets at the {result['peaks']['gflops']:.0f} GFLOP/s that the same run measured"
    present = {side for found in result["cases"].values() for side in found["sides"]}
    rivals = {rival: rival for rival in ENGINE_RIVALS}
    rivals = {side: shown for side, shown in OURS_IN_STEPS.items() if side in present} | rivals
    if "torch.compile" in present:
        rivals["torch.compile"] = "nflows or normflows, torch.compile"
    lines = rivals_table(result, rivals, libraries, floor)
    first = [row["first_call"] for row in (found["sides"]["iin-fast"] for found in result["cases"].values())]
    compiled = [found["sides"]["flowjax"]["first_call"] for found in result["cases"].values()]
    lines += [
        "",
        f"The first call took {1e3 * min(first):.0f} to {1e3 * max(first):.0f} ms here and {min(compiled):.1f} to "
        f"{max(compiled):.1f} s in flowjax, which compiles.",
    ]
    if "memory" in result:
        depths = list(next(iter(result["memory"].values())))
        lines += [
            "",
            "MiB that loss and backward of the NSF hold at most at 4096 rows, above parameters and gradients:",
            "",
            f"| | {' | '.join(f'{depth} couplings' for depth in depths)} |",
            f"|---|{'---:|' * len(depths)}",
            *(f"| {side} | {' | '.join(f'{v:.0f}' for v in row.values())} |" for side, row in result["memory"].items()),
        ]
    return "\n".join(lines)


def iin_table(name: str) -> str:
    """The IIN's flow beside its rivals; nothing before there is a run."""
    if not (RESULTS / name).exists():
        return ""
    result = json.loads((RESULTS / name).read_text())
    versions, peaks = result["versions"], result["peaks"]
    shown = {"eager": "published code", "compile": "torch.compile", "JAX": "JAX"}
    sides = next(iter(result["cases"].values()))["sides"]
    libraries = f"torch {versions['torch']}, jax {versions['jax']}"
    floor = f"{peaks['gflops']:.0f} GFLOP/s and {peaks['read_gbytes']:.0f} GB/s, as the same run measured them"
    return "\n".join(rivals_table(result, {r: name for r, name in shown.items() if r in sides}, libraries, floor))


def before_table(name: str = "before_cpu.json") -> str:
    """The IIN's flow beside that of an older version."""
    result = json.loads((RESULTS / name).read_text())
    machine, cases = result["machine"], result["cases"]
    lines = [
        f"{machine['CPU']} ({machine['CPU instruction set']}), commit {machine['commit'][:12]} beside {result['before'][:12]}, "
        f"{len(next(iter(cases.values()))['ratios'])} processes of each in turn, each version first in half of them. Medians in milliseconds, and the older time over ours.",
        "",
        "| case | before | now | before over now: median | least | most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case, found in cases.items():
        ratios = found["ratios"]
        cells = [f"{statistics.median(found[side]) * 1e3:.2f}" for side in ("before", "now")]
        cells += [f"{value:.2f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracy_table() -> str:
    """Distances from the truth in float32, and round trips, of the committed run of benchmarks/spline_accuracy.py."""
    result = json.loads((RESULTS / "spline_accuracy.json").read_text())
    cases, limit = result["cases"], result["limit"]
    quantities = ("y", "log-det", "gradients")

    def held(peers: bool) -> str:
        rows = [
            [c["off knots"][q][c["peer"] if peers else "iin-fast"]["max"] <= limit for q in quantities] for c in cases
        ]
        return ", ".join(f"{q} in {sum(row[i] for row in rows)}" for i, q in enumerate(quantities))

    def failures(peer: str) -> tuple[int, int]:
        rows = [c for c in cases if c["peer"] == peer]
        trips = [trip for row in rows for trip in row["round trip"].values()]
        refused = sum(t["seeds refused by the peer"] for t in trips) + sum(c["calls refused by the peer"] for c in rows)
        places = [c[place][q] for c in rows for place in ("off knots", "on knots") for q in quantities]
        return refused, sum(row[peer]["nan"] for row in places) + sum(t["NaN of the peer"] for t in trips)

    columns = [*quantities, f"log-dets beyond {limit:.0e}", "on knots: y", "on knots: log-det"]
    columns += ["round trip, float32", "round trip, float64"]
    lines = [
        f"ours / the peer's; {result['machine']['CPU']} ({result['machine']['CPU instruction set']}), "
        f"{', '.join(f'{name} {version}' for name, version in result['peers'].items())}. Off the knots {limit:.0e} holds at every "
        f"element for {held(False)} of {len(cases)} rows (the peers': {held(True)}). nflows refused {failures('nflows')[0]} calls "
        f"(a discriminant below 0), zuko gave NaN for {failures('zuko')[1]} values; ours were all finite.",
        "",
        f"| peer | bins | spread | {' | '.join(columns)} |",
        f"|---|---:|---:|{'---:|' * len(columns)}",
    ]
    for case in cases:
        names = "iin-fast", case["peer"]
        off, on, trip = case["off knots"], case["on knots"], case["round trip"]
        cells = [" / ".join(f"{off[q][n]['max']:.0e}" for n in names) for q in quantities]
        cells.append(" / ".join(f"{100 * off['log-det'][n]['beyond']:.1f} %" for n in names))
        cells += [" / ".join(f"{on[q][n]['max']:.0e}" for n in names) for q in quantities[:2]]
        cells += [" / ".join(f"{trip[d][n]['mean']:.0e}" for n in names) for d in ("float32", "float64")]
        lines.append(f"| {case['peer']} | {case['bins']} | {case['spread']:g} | {' | '.join(cells)} |")
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


GPU_RESULT = "gpu_h100.json"  # a gpu.json of `make gpu`
COMPILED = ["compile", "compile, reduce-overhead", "compile, max-autotune"]
GPU_SYSTEMS = {
    "eager": ["eager"],
    "eager, CUDA graph": ["eager, CUDA graph"],
    "torch.compile, best mode": COMPILED,
    "FrEIA": ["FrEIA"],
    "nflows": ["nflows"],
    "normflows": ["normflows"],
    "**iin-fast**": ["iin-fast"],
    "**iin-fast, CUDA graph**": ["iin-fast, CUDA graph"],
    "iin-fast, Triton": ["iin-fast, triton"],
}
# What the README shows: stage, case, label, the library that is replaced there.
GPU_SUMMARY = (
    ("engine", "NSF, step, batch 256", "neural spline flow, training step, 256 rows", "nflows"),
    ("engine", "NSF, step, batch 4096", "the same, 4096 rows", "nflows"),
    ("engine", "NSF, log_prob, batch 65536", "the same, density, 65,536 rows", "nflows"),
    ("engine", "MAF, step, batch 256", "masked autoregressive flow, training step, 256 rows", "nflows"),
    ("engine", "MAF, sample, batch 4096", "the same, 4096 samples", "nflows"),
    ("engine", "RealNVP, step, batch 256", "RealNVP, training step, 256 rows", "normflows"),
    ("flow", "forward, batch 25, float32", "IIN of the published size, forward, 25 rows", "eager"),
    ("flow", "step, 25 pairs, float32", "the same, training step, 25 pairs", "eager"),
    ("flow", "forward, batch 16384, tf32", "the same, forward, 16,384 rows in TF32", "eager"),
    ("flow", "forward, batch 16384, bfloat16", "the same in bfloat16", "eager"),
)


def gpu_result() -> dict[str, Any] | None:
    """The committed run on a GPU, if there is one."""
    path = RESULTS / GPU_RESULT
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if result["dry_run"]:
        raise SystemExit(f"{path} is from a dry run on a CPU: it says nothing of a GPU")
    return result


def gpu_machine(result: dict[str, Any]) -> str:
    machine, peaks = result["environment"], result.get("peaks", {})
    driver = machine.get("smi", {}).get("driver_version", "unknown")
    libraries = ", ".join(
        f"{name} {machine['versions'][name]}"
        for name in ("jax", "flowjax", "nflows", "zuko", "normflows", "FrEIA")
        if name in machine.get("versions", {})
    )
    text = f"{machine['gpu']}, driver {driver}, torch {machine['torch']} (CUDA {machine['cuda']})"
    text += f"{', ' if libraries else ''}{libraries}, commit {machine.get('commit', 'unknown')}."
    products = [f"{peaks[f'{k}_tflops']:.0f} in {k}" for k in ("bfloat16", "tf32", "float32") if f"{k}_tflops" in peaks]
    if products and "copy_gbytes" in peaks:
        text += f" A copy moves {peaks['copy_gbytes']:.0f} GB/s there, and products of matrices reach {', '.join(products)} TFLOP/s."
    if "summary" in result.get("tests", {}):
        text += f" Tests of the CUDA kernels: {gpu_tests(result)}."
    return text


def gpu_tests(result: dict[str, Any]) -> str:
    """How many passed, from pytest's last line."""
    return re.sub(r", \d+ warnings?\b| in [\d.]+s\b.*", "", result["tests"]["summary"].strip("= "))


def gpu_state() -> str:
    """What ran on a GPU, in the README's words on the state of things."""
    result = gpu_result()
    if result is None:
        return (
            "Every speed here was measured on CPUs. The GPU kernels are compiled, and tested in an emulator; they\n"
            "have never run on a GPU."
        )
    return (
        f"Speeds were measured on CPUs and on one {result['environment']['gpu']}, where tests of the CUDA kernels ran too: "
        f"{gpu_tests(result)}."
    )


def gpu_cases(result: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    """The cases of a stage that have times: the systems' rows with "warm"."""
    cases = result.get(stage, {}).get("cases", {})
    return {name: case for name, case in cases.items() if case.get("systems")}


def gpu_host(result: dict[str, Any]) -> str:
    """How long the host takes to start a kernel, which bounds plain calls of many kernels."""
    rows = [
        case["systems"]["nflows"]
        for case in gpu_cases(result, "engine").values()
        if "kernels" in case["systems"].get("nflows", {})
    ]
    if not rows:
        return ""
    least = min(1e6 * row["warm"]["median"] / row["kernels"] for row in rows)
    return (
        f"The host of this machine is slow (nflows takes {least:.0f} µs for each kernel that it starts), which makes plain calls of many "
        "kernels look worse than they are elsewhere, and CUDA graphs not. "
    )


def gpu_summary() -> str:
    """A few cases, each beside the library it replaces and the fastest other side. "" without a run."""
    result = gpu_result()
    if result is None:
        return ""
    lines = [
        "### On a GPU",
        "",
        f"{gpu_machine(result)} Medians in milliseconds of calls in a row, launches included. The library's own code is compared "
        "with a plain call of ours, the fastest other side, which may be a CUDA graph or compiled, with the faster of our two columns. "
        f"{gpu_host(result)}"
        "All cases are in [docs/speed.md](docs/speed.md#on-a-gpu).",
        "",
        "| case | iin-fast | iin-fast, CUDA graph | the library's own code | fastest other side |",
        "|---|---:|---:|---:|---:|",
    ]
    for stage, case, label, replaced in GPU_SUMMARY:
        systems = {name: row["warm"] for name, row in gpu_cases(result, stage).get(case, {}).get("systems", {}).items()}
        if "iin-fast" not in systems:
            continue
        plain, graph = systems["iin-fast"], systems.get("iin-fast, CUDA graph")
        fastest = min(row["median"] for row in (plain, graph) if row)
        others = {name: row for name, row in systems.items() if not name.startswith("iin-fast")}
        best = min(others, key=lambda name: others[name]["median"])
        cells = [
            f"{'published code' if name == 'eager' else name}: {others[name]['median'] / ours:.1f} ×"
            if name in others
            else ""
            for name, ours in ((replaced, plain["median"]), (best, fastest))
        ]
        lines.append(f"| {label} | {milliseconds(plain)} | {milliseconds(graph)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_tables() -> str:
    """All of the run: the published flow, flows of others' sizes, the small ops beside a copy."""
    result = gpu_result()
    if result is None:
        return "No GPU was at hand: there are no figures yet. `make gpu` takes them."
    flow = gpu_cases(result, "flow")
    timed = {name for case in flow.values() for name in case["systems"]}
    shown = {name: members for name, members in GPU_SYSTEMS.items() if timed & set(members)}
    compiles = bool(timed & set(COMPILED))
    ratio_names = ["× eager (range)", *(["× compile"] if compiles else []), "× floor"]
    lines = [
        f"{gpu_machine(result)} {gpu_host(result)}Medians in milliseconds of calls in a row, launches included; all systems of a case in "
        "turn, but flowjax after the others. Minimum, maximum and calls after the L2 cache was emptied are in the result file.",
        "",
        "The IIN's flow of the published size"
        + (
            "; torch.compile and Triton in a turn of their own:"
            if compiles
            else ". torch.compile had not compiled it in 90 s:"
        ),
        "",
        f"| case | {' | '.join([*shown, *ratio_names])} |",
        f"|---|{'---:|' * (len(shown) + len(ratio_names))}",
    ]
    for case, found in flow.items():
        systems = found["systems"]
        best = {
            name: min(
                (systems[member] for member in members if member in systems),
                key=lambda row: row["warm"]["median"],
                default=None,
            )
            for name, members in shown.items()
        }
        ours, eager, compiled = (best.get(name) for name in ("**iin-fast**", "eager", "torch.compile, best mode"))
        ratios = [""] * len(ratio_names)
        if ours and eager:
            least, most = eager["warm"]["min"] / ours["warm"]["max"], eager["warm"]["max"] / ours["warm"]["min"]
            ratios[0] = f"{eager['warm']['median'] / ours['warm']['median']:.1f} ({least:.1f}–{most:.1f})"
        if ours and compiled:
            beside = compiled.get("beside", {}).get("iin-fast", ours)
            ratios[1] = f"{compiled['warm']['median'] / beside['warm']['median']:.1f}"
        if ours and "floor" in found:
            ratios[-1] = f"{ours['warm']['median'] / found['floor']:.2f}"
        cells = [milliseconds(row and row["warm"]) for row in best.values()]
        lines.append(f"| {case} | {' | '.join([*cells, *ratios])} |")
    flows = gpu_cases(result, "engine")
    names = list(dict.fromkeys(name for case in flows.values() for name in case["systems"]))
    names.sort(key=lambda name: not name.startswith("iin-fast"))
    lines += [
        "",
        "Flows as others train them, in float32; steps are loss, backward and fused Adam. In brackets how many times as long as iin-fast:",
        "",
        f"| case | {' | '.join(f'**{name}**' if name == 'iin-fast' else name for name in names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for case, found in flows.items():
        cells = []
        for name in names:
            row = found["systems"].get(name)
            cells.append(milliseconds(row and row["warm"]))
            ours = (row or {}).get("beside", found["systems"]).get("iin-fast")
            if row and ours and name != "iin-fast":
                cells[-1] += f" ({row['warm']['median'] / ours['warm']['median']:.1f} ×)"
        lines.append(f"| {case} | {' | '.join(cells)} |")
    small = result.get("ops", {}).get("cases", {})
    names = sorted({name for rows in small.values() for name in rows}, key=["cpp", "triton", "reference"].index)
    lines += [
        "",
        "The other ops, in GB/s of the bytes that must move, and in percent of a copy measured in turn with them:",
        "",
        f"| case | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for case, rows in small.items():
        cells = [
            f"{rows[name]['gbytes']:.0f} ({100 * rows[name]['of_copy']:.0f} %)" if name in rows else ""
            for name in names
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_micro_table() -> str:
    """What benchmarks/gpu_micro.cu found."""
    result = gpu_result()
    micro = (result or {}).get("micro", {})
    if "barrier_us" not in micro:
        return "Not measured yet: no GPU was at hand."

    def range_of(row: dict[str, float]) -> str:
        return f"{row['median']:.4g} ({row['min']:.4g} to {row['max']:.4g})"

    errors = micro["product_error"]
    kinds = list(next(iter(errors["signed"].values())))
    lines = [
        f"{gpu_machine(result)}",
        "",
        "| | median (min to max) |",
        "|---|---:|",
        *(f"| barrier of {blocks} blocks, µs | {range_of(row)} |" for blocks, row in micro["barrier_us"].items()),
        *(f"| fence with {what} in flight, cycles | {range_of(row)} |" for what, row in micro["fence_cycles"].items()),
        *(
            f"| tiles of 64 × 64 of {rows} rows, GB/s | {range_of(row)} |"
            for rows, row in micro["tile_l2_gbytes"].items()
        ),
        f"| float32 FMA, TFLOP/s | {range_of(micro['fma_tflops'])} |",
        f"| a copy, GB/s | {range_of(micro['copy_gbytes'])} |",
        "",
        "Error of products, relative to float64 in the norm:",
        "",
        f"| factors, depth | {' | '.join(kinds)} |",
        f"|---|{'---:|' * len(kinds)}",
        *(
            f"| {sign}, {depth} | {' | '.join('' if row[kind] is None else f'{row[kind]:.1e}' for kind in kinds)} |"
            for sign, rows in errors.items()
            for depth, row in rows.items()
        ),
    ]
    return "\n".join(lines)


def without_optimizer(cells: dict[str, Any]) -> float | None:
    """The speed-up of a step where the optimizer, which both sides pay alike, costs nothing."""
    if "step" not in cells or "optimizer" not in cells:
        return None
    own, fast = (cells["step"][side]["median"] - cells["optimizer"][side]["median"] for side in ("own", "accelerated"))
    return float(own / fast)


MORE = {  # sides of benchmarks/dropin.py
    "accelerated, and its optimizer": "optimizer",
    "accelerated, and its optimizer, direct gradients": "direct",
}


TRAININGS = {
    "accelerated": 'with `patch("sbi")`',
    "with fused_optimizer": "with `fused_optimizer=True`",
    "with fused_optimizer and direct_gradients": "and with `direct_gradients`",
}


def dropin_table() -> str:
    """Speed-ups of the committed run of benchmarks/dropin.py."""
    result = json.loads((RESULTS / "dropin_cpu.json").read_text())
    machine = result["machine"]
    sources = [f"{name} {number}" for name, number in result["libraries"].items() if name not in result["peers"]]
    sources += [f"{name} at {commit[:7]}" for name, commit in result["peers"].items()]
    lines = [
        f"{machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}; "
        f"{', '.join(sources)}. How many times as fast a model is after `accelerate`: medians, both sides in turn in one run. "
        "A step is loss, backward and torch's fused Adam, on both sides; under *optimizer* our side's "
        "went through `accelerate` as well, and under *direct* our side ran in `direct_gradients`, too.",
    ]
    for group, title in (
        ("models", "model: step at batch"),
        ("wide models", "larger nets: step at batch"),
        ("layers", "layer outside of a program: step at batch"),
        ("stacks", "published stack: step at batch"),
    ):
        found = {name: by_batch for name, by_batch in result.get(group, {}).items() if by_batch}
        if not found:
            continue
        batches = sorted({int(batch) for by_batch in found.values() for batch in by_batch})
        middle = str(100 if 100 in batches else batches[len(batches) // 2])
        more = [what for what in ("density", "samples") if any(what in b.get(middle, {}) for b in found.values())]
        titles = [title, "own, ms, at " + middle, *map(str, batches)]
        titles += [{"density": f"density at {middle}", "samples": "10,000 samples"}[what] for what in more]
        bounds = {name: without_optimizer(by_batch.get(middle, {})) for name, by_batch in found.items()}
        bounded = any(bounds.values())
        titles += [f"step without Adam at {middle}"] * bounded
        extra = [
            (batch, side)
            for batch in ("100", "300")
            for side in MORE
            if any(side in b.get(batch, {}).get("step", {}) for b in found.values())
        ]
        titles += [f"{MORE[side]}, {batch}" for batch, side in extra]
        lines += ["", f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
        for name, by_batch in found.items():
            cells = [by_batch.get(str(batch), {}).get("step") for batch in batches]
            cells += [by_batch.get(middle, {}).get(what) for what in more]
            shown = ["" if cell is None else f"{cell['speedup']:.2g}" for cell in cells]
            shown += [f"{bounds[name]:.2g}" if bounds[name] else ""] * bounded
            for batch, side in extra:
                step = by_batch.get(batch, {}).get("step", {})
                shown.append(f"{step['own']['median'] / step[side]['median']:.2g}" if side in step else "")
            own = by_batch.get(middle, {}).get("step")
            lines.append(f"| {name} | {milliseconds(own and own['own'])} | {' | '.join(shown)} |")
    if "sbi train" in result:
        lines += ["", "Through sbi's own `train`, wall clock:", ""]
        for name, times in result["sbi train"].items():
            shown = [f"{times['own'] / times[side]:.1f} × {how}" for side, how in TRAININGS.items() if side in times]
            lines.append(f"- {name}: {', '.join(shown)}.")
        costs = ", ".join(f"{name} {ms:.2g} ms" for name, ms in result["else"].items())
        lines += ["", f"What else a step costs, for the parameters of sbi's nsf: {costs}."]
    return "\n".join(lines)


def pairs_table() -> str:
    """Each class before and after accelerate, by the committed run of benchmarks/dropin_pairs.py."""
    path = RESULTS / "dropin_pairs_cpu.json"
    if not path.exists():  # not run yet
        return ""
    result = json.loads(path.read_text())
    machine = result["machine"]
    batches = list(next(iter(result["classes"].values())))
    versions = ", ".join(f"{name} {number}" for name, number in result["libraries"].items())
    behind = "; ".join(result["slower"]) or "none"
    lines = [
        f"{machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}; {versions}. How many "
        "times as fast one class is after `accelerate`: step / density, medians of runs in turn. Slower by over 5 % of both median and "
        f"minimum: {behind}.",
        "",
        f"| class, batch | {' | '.join(batches)} |",
        f"|---|{'---:|' * len(batches)}",
    ]
    for name, by_batch in result["classes"].items():
        cells = [
            " / ".join(f"{cell[what]['speedup']:.2g}" for what in ("step", "density")) for cell in by_batch.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peers_list() -> str:
    """How the libraries' own tests, and ours on code that is no package, ended."""
    suites = json.loads((RESULTS / "peer_suites.json").read_text())
    sources = json.loads((RESULTS / "peer_sources.json").read_text())
    machine = suites["machine"]
    lines = [
        f"The libraries' own test suites, with and without `patch` (torch {machine['torch']}, iin-fast {machine['iin-fast']} at "
        f"{machine['commit'][:7]}):",
        "",
    ]
    for name, found in suites["suites"].items():
        at = f"at {found['commit'][:7]}" if "commit" in found else found["version"]
        ended = [f"{found[kind]} {word}" for kind, word in WORDS.items() if found[kind]]
        differ = len(found["different_under_patch"])
        how = "the same with `patch`" if differ == 0 else f"{differ} end otherwise with `patch`"
        calls = sum(found["op_calls_under_patch"].values())
        lines.append(f"- {name} {at}: {', '.join(ended)}; {how}, in {calls} calls of fused ops.")
    lines += ["", f"`tests/dropin` on repositories (torch {sources['machine']['torch']}):", ""]
    for name, found in sources["sources"].items():
        failed = f"{len(found['failed'])} failed" if found["failed"] else "none failed"
        lines.append(f"- {name} at {found['commit'][:7]}: {sum(found['passed'].values())} passed, {failed}.")
    return "\n".join(lines)


WORDS = {"passed": "passed", "failure": "failed", "error": "with errors", "skipped": "skipped"}


def overhead_line() -> str:
    """The worst case of the committed run of benchmarks/overhead.py."""
    result = json.loads((RESULTS / "overhead_cpu.json").read_text())
    machine, cases = result["machine"], result["cases"]
    name = max(cases, key=lambda case: cases[case]["above_us"])
    return (
        f"The most that any of {len(cases)} cases took is {result['worst_above_us']:.1f} microseconds ({name}; "
        f"{machine['CPU']}, torch {machine['torch']}, commit {machine['commit']}). Loss and gradients of a small flow take this much above the op. "
        + ". ".join(
            f"{name}: {found['above_us']['nll_backward']:.0f} microseconds by `nll_backward`, {found['above_us']['backward']:.0f} by "
            "`log_prob` and `backward`"
            for name, found in result["steps"].items()
        )
        + "."
    )


# What the README shows: result file, case, our label, the library that is replaced there.
SUMMARY = (
    ("engine_cpu.json", "NSF, step, batch 50", "neural spline flow, training step, 50 rows", "nflows"),
    ("engine_cpu.json", "NSF, step, batch 256", "the same, 256 rows", "nflows"),
    ("engine_cpu.json", "NSF, step, batch 4096", "the same, 4096 rows", "nflows"),
    ("engine_cpu.json", "MAF, step, batch 50", "masked autoregressive flow, training step, 50 rows", "nflows"),
    ("engine_cpu.json", "MAF, dim 10, sample, batch 10000", "the same, 10,000 samples", "nflows"),
    ("engine_cpu.json", "RealNVP, step, batch 128", "RealNVP, training step, 128 rows", "normflows"),
    ("iin_cpu.json", "forward, batch 25", "IIN of the published size, forward, 25 rows", "eager"),
    ("iin_cpu.json", "forward, batch 4096", "the same, 4096 rows", "eager"),
    ("iin_cpu.json", "training step, 25 pairs", "the same, training step, 25 pairs", "eager"),
    ("spline_cpu.json", "forward + backward, 65536 x 32", "spline layer, forward + backward, 65536 x 32", "nflows"),
)


def summary_table() -> str:
    """A few cases of all result files, each beside the library it replaces and the fastest other side of its run."""
    lines = [
        "| case | iin-fast, ms | the library's own code | fastest other side | × floor |",
        "|---|---:|---:|---:|---:|",
    ]
    machines = set()
    for file, case, label, replaced in SUMMARY:
        result = json.loads((RESULTS / file).read_text())
        machines.add(f"{result['machine']['CPU']}, {result['machine']['CPU instruction set']}")
        found = result["cases"][case]
        sides = {
            name: side for name, side in found.get("sides", found.get("systems", found)).items() if "median" in side
        }
        ours = sides.pop("iin-fast")
        others = {name: side for name, side in sides.items() if not name.startswith("iin-fast")}
        best = min(others, key=lambda name: others[name]["median"])
        least = found["floor"] if "floor" in found else ours["median"] / ours["times_floor"]
        cells = []
        for name in (replaced, best):
            shown = {"eager": "published code"}.get(name, name.replace("compile frozen", "torch.compile"))
            cells.append(f"{shown}: {others[name]['median'] / ours['median']:.1f} ×")
        lines.append(f"| {label} | {milliseconds(ours)} | {cells[0]} | {cells[1]} | {ours['median'] / least:.1f} |")
    return "\n".join(
        [
            f"How many times as long the other side takes; medians of runs in turn, each on one machine ({'; '.join(sorted(machines))}). "
            "The floor is what the machine's arithmetic or memory allows at least. Steps are loss, backward and Adam.",
            "",
            *lines,
        ]
    )


PAGES = {
    "docs/composition.md": {"overhead": overhead_line},
    "docs/dropin.md": {"speed": dropin_table, "pairs": pairs_table, "peers": peers_list},
    "docs/backends.md": {"backends": backend_table},
    "README.md": {"summary": summary_table, "demo": demo_table, "gpu": gpu_summary, "gpu state": gpu_state},
    "docs/speed.md": {
        "engine": engine_table,
        "engine avx2": partial(engine_table, "engine_cpu_avx2.json"),
        "iin": partial(iin_table, "iin_cpu.json"),
        "iin avx2": partial(iin_table, "iin_cpu_avx2.json"),
        "speed": speed_table,
        "splines": spline_table,
        "splines avx2": partial(spline_table, "spline_cpu_avx2.json"),
        "gpu": gpu_tables,
    },
    "docs/performance.md": {
        "before": before_table,
        "before avx2": partial(before_table, "before_cpu_avx2.json"),
        "spline accuracy": accuracy_table,
        "gpu micro": gpu_micro_table,
    },
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
            body = table()
            if NOISY in body:
                body += f"\n\n{NOISY}: the slowest run took over {NOISE:g} times as long as the fastest, so this median may be off."
            text = head + begin + "\n" + (f"{body}\n" if body else "") + end + rest.split(end)[1]
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif text != before:
            print(f"{page} differs from benchmarks/results: run python benchmarks/readme.py")
            differs = True
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
