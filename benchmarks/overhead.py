"""What Python adds to one call of an op, on the smallest tensors: python benchmarks/overhead.py [OUT.json]

For every op, without gradients and with them, in turn in one process:

    call     the public function: checks of the arguments, choice of the backend, autograd
    torch    the same op and arguments through the least that torch offers: without gradients the dispatcher alone,
             with them a torch.autograd.Function that saves its arguments
    library  the same op with the autograd that torch.library registers
    above    call - torch: the overhead that counts, at most 15 microseconds

Then loss and gradients of small flows, 50 rows: ``op``, the one op that computes both, alone; ``nll_backward``; and
``backward``, which is log_prob, mean and ``loss.backward()``; above: nll_backward - op, at most 60 microseconds.

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
from iin_fast.nn import MaskedAutoregressiveFlow, NeuralSplineFlow, RealNVP

LIMIT = 15.0  # microseconds above torch's own dispatch
LIMIT_OF_STEPS = 60.0  # above the op
ROWS, DIM = 4, 4

Call = tuple[Callable[[], Any], Any, tuple[Any, ...]]


def ops() -> dict[str, Call]:
    """The public call, the op behind it, and the op's arguments."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x, raw, shift, spline = normal(ROWS, DIM), normal(ROWS, DIM), normal(ROWS, DIM), normal(ROWS, DIM, 11)
    logdet, shared = normal(ROWS), torch.ones(ROWS, 2, dtype=torch.bool)
    module = RealNVP(DIM, n_flows=1, hidden_dim=4, generator=random)
    module.initialize(x)
    program, parameters = module.program(), [p.detach() for p in module._tensors()]
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
            (x, spline, None, None, 4, 0, 0, *box, False),
        ),
        "pair_nll": (
            lambda: F.pair_nll(x, raw, logdet, logdet, shared, [2, 2], 0.9),
            library.pair_nll.default,
            (x, raw, logdet, logdet, shared, [2, 2], 0.9, False),
        ),
        "flow_program": (
            lambda: F.flow_program(x, None, parameters, program, memory="recompute"),
            library.flow_program.default,
            (x, None, parameters, program.text, False, False, 0, 0),
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


def steps() -> dict[str, dict[str, Callable[[], Any]]]:
    """Ways to loss and gradients of flows, which are cleared before."""
    found = {}
    for make in (MaskedAutoregressiveFlow, RealNVP, NeuralSplineFlow):
        torch.manual_seed(0)
        flow = make(6, 7, hidden_dim=50)
        x, context = torch.randn(50, 6), torch.randn(50, 7)
        flow.initialize(x, context)
        parameters, program = list(flow.parameters()), flow.program()
        wanted = "".join("1" if p.requires_grad else "0" for p in flow._tensors())
        tensors = [t.detach() for t in flow._tensors()]

        def clear(parameters: list[Tensor] = parameters) -> None:
            for p in parameters:
                p.grad = None

        def op(given: Any = (x, context, tensors, program.text, wanted)) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.iin_fast.flow_program_nll.default(*given)

        def nll_backward(flow: Any = flow, x: Tensor = x, context: Tensor = context, clear: Any = clear) -> None:
            clear()
            flow.nll_backward(x, context)

        def backward(flow: Any = flow, x: Tensor = x, context: Tensor = context, clear: Any = clear) -> None:
            clear()
            (-flow.log_prob(x, context).mean()).backward()

        found[make.__name__] = {"op": op, "nll_backward": nll_backward, "backward": backward}
    return found


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
    results["steps"] = {}
    for name, calls in steps().items():
        times = measure(calls)
        above = {way: times[way]["min"] - times["op"]["min"] for way in ("nll_backward", "backward")}
        results["steps"][name] = times | {"above_us": above}
        print(
            f"{name:34s}",
            *(f"{n} {t['min']:6.1f}" for n, t in times.items()),
            *(f"{n} {t:5.1f} above" for n, t in above.items()),
            sep="  ",
        )
    print(f"at most {LIMIT_OF_STEPS:.0f} microseconds above the op wanted of nll_backward")
    results["worst_above_us"] = max(case["above_us"] for case in results["cases"].values())
    print(f"worst: {results['worst_above_us']:.1f} microseconds above torch, at most {LIMIT:.0f} wanted")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results" / "overhead_cpu.json"))
