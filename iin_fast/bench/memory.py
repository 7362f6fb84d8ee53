"""Peak memory of one training step, measured in a process of its own: python -m iin_fast.bench.memory SYSTEM DEPTH BATCH."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .systems import PUBLISHED, build, ours
from .workloads import Workload

__all__ = ["measure", "peak_above"]

MEBI = 2.0**20


def measure(system: str, n_flows: int, batch: int) -> dict[str, float]:
    """MiB of a forward and backward pass above what was there before it.

    ``peak``: the most that the pass held. ``above_gradients``: without the gradients of the parameters, which every
    system must hold, and which grow with depth for all.
    """
    command = [sys.executable, "-m", __name__, system, str(n_flows), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"bench: {' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def peak_above(step: Callable[[], object]) -> float:
    """MiB that this process holds at most during ``step()``, above what it held before. Linux; memory that the allocator has
    kept from earlier steps does not show."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    step()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"bench: /proc/self/status has no {field}")


def _main(name: str, n_flows: int, batch: int) -> None:
    size = replace(PUBLISHED, n_flows=n_flows)
    memory = name.removeprefix("iin-fast, ")
    system = build(name, size) if memory == name else ours(size, memory)
    # a first, tiny step loads libraries and starts threads
    Workload("warm", "gradient", 4, size).prepare(system)()
    for parameter in system.parameters:
        parameter.grad = None
    peak = peak_above(Workload("memory", "gradient", batch, size).prepare(system))
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in system.parameters if p.grad is not None) / MEBI
    print(json.dumps({"peak": peak, "above_gradients": peak - gradients, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
