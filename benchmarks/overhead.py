"""What Python adds to one call of an op, on the smallest tensors: python benchmarks/overhead.py [OUT.json]

For every op, without gradients and with them, in turn in one process:

    call     the public function: checks of the arguments, choice of the backend, autograd
    torch    the same op and arguments through the least that torch offers: without gradients the dispatcher alone,
             with them a torch.autograd.Function that saves its arguments
    library  the same op with the autograd that torch.library registers
    above    call - torch: the overhead that counts, at most 15 microseconds

``torch.add`` stands beside them for scale. Times are microseconds: minimum, median and maximum over windows.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iin_fast import functional as F
from iin_fast.bench.timing import in_turn
from iin_fast.info import collect
from iin_fast.nn import Flow
from iin_fast.ops.flow import flow as flow_op

LIMIT = 15.0  # microseconds above torch's own dispatch
ROWS, DIM = 4, 4

Call = tuple[Callable[[], Any], Any, tuple[Any, ...]]


def ops() -> dict[str, Call]:
    """The public call, the op behind it, and the op's arguments."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x, raw, shift, spline = normal(ROWS, DIM), normal(ROWS, DIM), normal(ROWS, DIM), normal(ROWS, DIM, 11)
    logdet, shared = normal(ROWS), torch.ones(ROWS, 2, dtype=torch.bool)
    module = Flow(DIM, n_flows=1, hidden_dim=4, hidden_depth=0, generator=random)
    module.initialize(x)
    names = "loc scale weight_in bias_in weight_hidden bias_hidden weight_out bias_out permutation".split()
    parameters = [getattr(module, name).detach() for name in names]
    library = torch.ops.iin_fast
    box = (-1.0, 1.0, -1.0, 1.0, 1e-3, 1e-3, 1e-3)
    return {
        "affine_coupling": (
            lambda: F.affine_coupling(x, raw, shift),
            library.affine_coupling.default,
            (x, raw, shift, 1, 1.0, False),
        ),
        "spline_coupling": (
            lambda: F.spline_coupling(x, spline, bins=4),
            library.spline_coupling.default,
            (x, spline, 4, 0, 0, *box, False),
        ),
        "pair_nll": (
            lambda: F.pair_nll(x, raw, logdet, logdet, shared, [2, 2], 0.9),
            library.pair_nll.default,
            (x, raw, logdet, logdet, shared, [2, 2], 0.9, False),
        ),
        "flow": (
            lambda: flow_op(x, None, *parameters, memory="invert"),
            library.flow.default,
            (x, None, *parameters, 0.01, 1.0, False, False, False),
        ),
    }


def least(op: Any, arguments: tuple[Any, ...], gradients: bool) -> Callable[[], Any]:
    """The op with nothing around it but what torch needs."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*given)
            ctx.save_for_backward(*(t for t in given if isinstance(t, Tensor)))
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError("only the call is measured")

    def below() -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return (lambda: Function.apply(*arguments)) if gradients else below


def measure(calls: dict[str, Callable[[], Any]], windows: int = 300, repeats: int = 50) -> dict[str, dict[str, float]]:
    found = in_turn(calls, windows, warm_up=5, burst=repeats)
    return {name: {key: 1e6 * value for key, value in row.items()} for name, row in found.items()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": collect(), "limit_us": LIMIT, "cases": {}}
    for gradients in (False, True):
        for name, (call, op, arguments) in ops().items():
            tensors = [t for t in arguments if isinstance(t, Tensor) and t.is_floating_point()]
            for tensor in tensors:
                tensor.requires_grad_(gradients)

            def library(op: Any = op, arguments: tuple[Any, ...] = arguments) -> Any:
                return op(*arguments)

            def add(x: Tensor = tensors[0]) -> Tensor:
                return torch.add(x, x)

            calls = {"call": call, "torch": least(op, arguments, gradients), "library": library, "torch.add": add}
            times = measure(calls)
            above = times["call"]["min"] - times["torch"]["min"]
            case = f"{name}, {'with' if gradients else 'without'} gradients"
            results["cases"][case] = times | {"above_us": above}
            print(f"{case:34s}", *(f"{n} {t['min']:6.1f}" for n, t in times.items()), f"above {above:5.1f}", sep="  ")
    results["worst_above_us"] = max(case["above_us"] for case in results["cases"].values())
    print(f"worst: {results['worst_above_us']:.1f} microseconds above torch, at most {LIMIT:.0f} wanted")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results" / "overhead_cpu.json"))
