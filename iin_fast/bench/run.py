"""One run that compares systems on workloads: table, JSON and pictures."""

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .._library import libraries
from ..info import collect, versions
from ..nn import Flow
from ..testing import eager_flow
from .memory import measure
from .systems import PUBLISHED, SYSTEMS, FlowSize, System, build
from .timing import in_turn, time_of
from .workloads import WORKLOADS, Workload

__all__ = ["machine_peaks", "run_bench"]

SWEEP = (1, 8, 25, 64, 256, 1024, 4096)
DEPTHS = (12, 24, 48)
MEMORY_BATCH = 4096


def run_bench(
    out: Path, *, peers: list[str] | None = None, quick: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Time our flow against others in one run.

    Args:
        out: folder that receives flow_cpu.json, flow_cpu_batch.png and flow_cpu_memory.png.
        peers: names out of ``SYSTEMS``; None takes all whose library is installed. "eager" and "iin-fast" always run.
        quick: few repeats, without compile, the sweep over batch sizes and the memory measurement.
        say: called with a line of text on progress.

    Returns:
        What the JSON file holds. Times are in seconds.

    Raises:
        ValueError: an unknown peer.
        OSError: the folder cannot be written.
        RuntimeError: this is a pure package.
    """
    if not libraries:
        raise RuntimeError("bench: times the compiled library, which a pure package lacks; install with a C++ compiler")
    names = ["eager", *(peers if peers is not None else _default_peers(quick)), "iin-fast"]
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"bench: peer {name!r} is unknown, expected some of {', '.join(SYSTEMS)}")
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "flow_cpu.json").touch()
    except OSError as error:
        raise OSError(f"bench: out is {str(out)!r}, a folder that can't be written ({error.strerror})") from error
    peaks = machine_peaks(quick)
    say(
        "peaks of this machine: {gflops:.0f} GFLOP/s, {read_gbytes:.0f} GB/s read, {copy_gbytes:.0f} GB/s copy".format(
            **peaks
        )
    )
    result: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": collect(),
        "versions": versions("torch", "numpy", "FrEIA", "nflows", "normflows"),
        "peaks": peaks,
        "cases": {},
    }
    bench = _Bench(peaks, quick)
    for workload in WORKLOADS.values():
        say(workload.name)
        result["cases"][workload.name] = bench.time_case(workload, names)
    result["inversion"] = _inversion_errors()
    if not quick:
        sweep = {}
        for batch in SWEEP:
            say(f"sweep: forward and forward+backward at batch {batch}")
            some = [name for name in names if name in ("eager", "iin-fast", "FrEIA", "nflows", "normflows")]
            sweep[batch] = {
                kind: bench.time_case(Workload(f"{kind} {batch}", kind, batch), some)["systems"]
                for kind in ("forward", "gradient")
            }
        result["sweep"] = sweep
        memory: dict[str, dict[int, Any]] = {}
        for name in ("eager", "iin-fast, save", "iin-fast, invert"):
            for depth in DEPTHS:
                say(f"memory: {name}, {depth} blocks, batch {MEMORY_BATCH}")
                memory.setdefault(name, {})[depth] = measure(name, depth, MEMORY_BATCH)
        result["memory"] = {"batch": MEMORY_BATCH, "unit": "MiB", "systems": memory}
    (out / "flow_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(json.dumps(result))  # with keys as a reader of the file sees them
    if not quick:
        _draw(result, out)
    return result


def _default_peers(quick: bool) -> list[str]:
    names = {"FrEIA", "nflows", "normflows"}
    missing = names - versions(*names).keys()
    return [name for name in SYSTEMS if name not in missing and not (quick and name.startswith("compile"))]


def machine_peaks(quick: bool) -> dict[str, float]:
    """What the floors are computed with: multiply-adds on registers, reading, and copying; each the best of several."""
    source, target = torch.ones(2, (16 if quick else 64) * 2**20)
    target.copy_(source)
    gflops, read = torch.ops.iin_fast.machine_peaks(source)
    copy = min(time_of(lambda: target.copy_(source)) for _ in range(10))
    a, b = torch.randn(2, 2048, 2048)
    product = min(time_of(lambda: torch.mm(a, b)) for _ in range(8))
    return {
        "gflops": gflops,
        "read_gbytes": read,
        "copy_gbytes": 2 * source.nbytes / copy / 1e9,
        "torch_mm_gflops": 2 * 2048**3 / product / 1e9,
    }


class _Bench:
    """Times workloads on systems, each of which is built once for a size."""

    def __init__(self, peaks: dict[str, float], quick: bool) -> None:
        self.peaks = [peaks[key] * 1e9 for key in ("gflops", "read_gbytes", "copy_gbytes")]
        self.quick = quick
        self.built: dict[tuple[str, FlowSize], System] = {}
        # every batch size is compiled for itself; by default dynamo gives up after a few
        torch._dynamo.config.recompile_limit = 64

    def system(self, name: str, size: FlowSize) -> System:
        if (name, size) not in self.built:
            self.built[name, size] = build(name, size)
        return self.built[name, size]

    def time_case(self, workload: Workload, names: list[str]) -> dict[str, Any]:
        calls: dict[str, Callable[[], object]] = {}
        for name in names:
            if name == "compile frozen" and not workload.inference:
                continue
            if name == "eager joint" and not workload.pairs:
                continue
            calls[name] = workload.prepare(self.system(name, workload.size))
        for call in calls.values():
            call()
            call()
        once = [time_of(call) for call in calls.values()]
        # long enough that the first call after another system's turn does not decide
        inner = max(1, int((0.01 if self.quick else 0.05) / max(min(once), 1e-6)))
        repeats = 5 if self.quick else max(5, min(25, int(15 / (sum(once) * inner))))
        times = in_turn(calls, repeats, warm_up=0, burst=inner)
        base = times["eager"]["median"]
        floor = workload.floor(*self.peaks)
        systems = {
            name: {**t, "times_eager": base / t["median"], "times_floor": t["median"] / floor}
            for name, t in times.items()
        }
        case = {"repeats": repeats, "calls_per_repeat": inner, "floor": floor, "target": workload.target}
        return {**case, "systems": systems}


def _inversion_errors() -> dict[str, Any]:
    """max |T^-1(T(x)) - x|, ours and eager, at two sizes of the nets' outputs.

    Last layers of 5 times their start give a mean |s| of 0.2, as in the trained IIN of the demo (0.18, eight blocks). That
    much in every block of a deep stack is a map that no arithmetic inverts; twice the start is what a deep one bears.
    """
    found = {}
    for n_flows in (12, 48):
        for gain in (2, 5):
            for dtype in (torch.float32, torch.float64):
                generator = torch.Generator().manual_seed(0)
                flow = Flow(PUBLISHED.dim, n_flows, PUBLISHED.hidden_dim, generator=generator, dtype=dtype)
                with torch.no_grad():
                    flow.weight_out.mul_(gain)
                    x = torch.randn(1024, PUBLISHED.dim, generator=generator, dtype=dtype)
                    ours = (flow.inverse(flow(x)[0])[0] - x).abs().max().item()
                    eager = eager_flow(flow)
                    theirs = (eager.reverse(eager(x)[0]) - x).abs().max().item()
                name = f"depth {n_flows}, last layers x{gain}, {str(dtype).removeprefix('torch.')}"
                found[name] = {"max_error": ours, "max_error_eager": theirs}
    return found


def _draw(result: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    machine = f"{result['machine']['CPU']}, {result['machine']['CPU instruction set']}"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, kind, title in zip(axes, ("forward", "gradient"), ("forward", "forward + backward"), strict=True):
        sweep = result["sweep"]
        batches = sorted(map(int, sweep))
        for name in sweep[str(batches[0])][kind]:
            rows = [sweep[str(batch)][kind][name] for batch in batches]
            medians = [1e3 * row["median"] for row in rows]
            (line,) = axis.plot(batches, medians, "o-", label=name, lw=2.5 if name == "iin-fast" else 1.2)
            axis.fill_between(
                batches,
                [1e3 * r["min"] for r in rows],
                [1e3 * r["max"] for r in rows],
                alpha=0.15,
                color=line.get_color(),
            )
        axis.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms (median; band: min to max)", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Flow of the published size (64 features, 12 blocks, hidden 512, depth 2)\n{machine}", fontsize=10)
    figure.tight_layout()
    figure.savefig(out / "flow_cpu_batch.png", dpi=110)

    figure, axis = plt.subplots(figsize=(6, 4.2))
    for name, by_depth in result["memory"]["systems"].items():
        depths = sorted(map(int, by_depth))
        axis.plot(depths, [by_depth[str(d)]["above_gradients"] for d in depths], "o-", label=name)
    axis.set(
        xlabel="blocks",
        ylabel="MiB above parameters and gradients",
        yscale="log",
        title=f"Peak memory of forward + backward, batch {result['memory']['batch']}",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(out / "flow_cpu_memory.png", dpi=110)
