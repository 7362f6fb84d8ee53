"""Every backend that this machine has, for every op: python benchmarks/backends.py [OUT.json]

The table in docs/backends.md, which decides the order of iin_fast.backends.chosen. Backends in turn in one run; on a GPU if there is
one, else on the CPU.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iin_fast import functional as F
from iin_fast import nn
from iin_fast.backends import available, backend
from iin_fast.bench.timing import in_turn
from iin_fast.info import collect

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cases() -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name to (op, a call that makes what ``backward`` may be called on)."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(DEVICE).requires_grad_()

    found: dict[str, tuple[str, Callable[[], Any]]] = {}
    for rows, width in ((256, 32), (16384, 128)):
        x, raw, shift = normal(rows, width), normal(rows, width), normal(rows, width)
        parameters = normal(rows, width, 23)
        za, zb, logdets = normal(rows, width), normal(rows, width), normal(2, rows).unbind()
        shared = (torch.rand(rows, 4, generator=random) < 0.5).to(DEVICE)
        sizes = [width // 4] * 4
        size = f"{rows} × {width}"
        found |= {
            f"affine_coupling, {size}": ("affine_coupling", lambda a=(x, raw, shift): F.affine_coupling(*a)),
            f"spline_coupling, 8 bins, {size}": (
                "spline_coupling",
                lambda a=(x, parameters): F.spline_coupling(*a, bins=8, tail_bound=3.0),
            ),
            f"pair_nll, {size}": (
                "pair_nll",
                lambda a=(za, zb, *logdets, shared), s=sizes: F.pair_nll(*a, sizes=s, rho=0.975),
            ),
        }
    flow = nn.Flow(64, device=DEVICE)
    flow.initialize(torch.randn(256, 64, device=DEVICE))
    for batch in (25, 1024):
        x = normal(batch, 64)
        found[f"flow of the published size, batch {batch}"] = ("flow", lambda x=x: flow(x))
    return found


def run(which: str, call: Callable[[], Any], training: bool) -> None:
    with backend(which), torch.set_grad_enabled(training):
        outputs = call()
        if training:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(list(outputs), [torch.ones_like(t) for t in outputs])
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main(out: Path, repeats: int = 15) -> None:
    results: dict[str, Any] = {"machine": collect(), "device": DEVICE, "cases": {}}
    for name, (op, call) in cases().items():
        for training in (False, True):
            taken = in_turn({which: partial(run, which, call, training) for which in available(op, DEVICE)}, repeats)
            label = f"{name}, {'forward + backward' if training else 'forward'}"
            results["cases"][label] = taken
            print(label, {which: f"{1e3 * t['median']:.2f} ms" for which, t in taken.items()}, flush=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    default = Path(__file__).parent / "results" / f"backends_{DEVICE}.json"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
