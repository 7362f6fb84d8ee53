"""The op ``flow`` on the CPU, step by step, against its floor and against the published eager composition.

``iin-fast bench`` compares whole systems; this one is for work on the kernels: each direction on its own, in milliseconds
and GFLOP/s, both sides alternating in one run.

    python benchmarks/flow_cpu.py --out flow_cpu.json
    python benchmarks/flow_cpu.py --dim 8 --n-flows 6 --hidden 64 --batch 128
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from iin_fast._library import cpu_isa
from iin_fast.nn import Flow
from iin_fast.testing import eager_flow


def alternate(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each step, all taking turns until the time is up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {
        name: {"min": min(t), "median": sorted(t)[len(t) // 2], "max": max(t), "runs": len(t)}
        for name, t in times.items()
    }


def gradient_step(parameters: list[Tensor], *calls: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], None]:
    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        losses = [0.5 * (z * z).sum() - logdet.sum() for z, logdet in (call() for call in calls)]
        torch.stack(losses).sum().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--n-flows", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 25, 256, 4096])
    parser.add_argument("--seconds", type=float, default=5, help="time for each comparison")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    flow = Flow(options.dim, options.n_flows, options.hidden, options.depth)
    with torch.no_grad():
        flow(torch.randn(256, options.dim))
    eager = eager_flow(flow)
    own, published = list(flow.parameters()), list(eager.parameters())
    weights = sum(p.numel() for p in own)
    rows = []

    def cases_of(batch: int) -> dict[str, tuple[int, int, dict[str, dict[str, float]]]]:
        """For each case: passes over the weights in multiples of a forward pass, rows, and the times of both sides."""
        x, pair = torch.randn(batch, options.dim), torch.randn(2 * batch, options.dim)
        with torch.no_grad():
            forward = alternate({"ours": lambda: flow(x), "eager": lambda: eager(x)}, options.seconds)
            inverse = alternate({"ours": lambda: flow.inverse(x), "eager": lambda: eager.reverse(x)}, options.seconds)
        steps = {
            "ours": gradient_step(own, lambda: flow(pair)),
            "eager": gradient_step(published, lambda: eager(pair[:batch]), lambda: eager(pair[batch:])),
        }
        gradient = alternate(steps, options.seconds)
        return {
            "forward": (1, batch, forward),
            "inverse": (1, batch, inverse),
            "gradient of pairs": (3, 2 * batch, gradient),
        }

    for batch in options.batch:
        cases = cases_of(batch)
        for name, (passes, count, times) in cases.items():
            gigaflops = 2e-6 * passes * count * weights
            ratio = times["eager"]["median"] / times["ours"]["median"]
            rows.append({"case": name, "batch": batch, "gigaflops": gigaflops / 1e3, "ratio": ratio, **times})
            print(
                f"{name:18} batch {batch:5}: ours {times['ours']['median']:9.3f} ms "
                f"({gigaflops / times['ours']['median']:4.0f} GFLOP/s), eager {times['eager']['median']:9.3f} ms, "
                f"x{ratio:.2f} (minima {times['ours']['min']:.3f}, {times['eager']['min']:.3f})",
                flush=True,
            )
    if options.out:
        about = {
            "torch": torch.__version__,
            "isa": cpu_isa(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "size": {k: getattr(options, k) for k in ("dim", "n_flows", "hidden", "depth")},
        }
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
