"""Models of other libraries before and after iin_fast.accelerate, in turn in one process, and the table in docs/dropin.md:

    python benchmarks/dropin.py [--quick] [--out OUT.json]      # measures what is installed
    python benchmarks/dropin.py --table                         # writes docs/dropin.md's table from the result file

A layer with its conditioner (two hidden layers of 64), float32. CompVis/iin, net2net and invariances are measured where they
are on the Python path, as a stack of the published size.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import iin_fast
from iin_fast.info import collect

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "dropin_cpu.json"
PAGE = ROOT / "docs" / "dropin.md"
BEGIN, END = "<!-- speed: written by benchmarks/dropin.py -->", "<!-- end of speed -->"
DIM, HIDDEN, BINS = 32, 64, 8

Call = Callable[[nn.Module, Tensor], Any]


class Net(nn.Module):
    """The conditioner of couplings that take any."""

    hidden_features = HIDDEN

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def models() -> dict[str, tuple[Callable[[], nn.Module], Call, int]]:
    """Name to (builder, call, features)."""
    found: dict[str, tuple[Callable[[], nn.Module], Call, int]] = {}

    def add(name: str, build: Callable[[], nn.Module], call: Call = lambda m, x: m(x), dim: int = DIM) -> None:
        found[name] = (build, call, dim)

    mask = [i % 2 for i in range(DIM)]
    if has("nflows"):
        from nflows import transforms as T

        tails: dict[str, Any] = {"tails": "linear", "tail_bound": 3.0, "num_bins": BINS}
        add("nflows AffineCouplingTransform", lambda: T.AffineCouplingTransform(mask, Net))
        add("nflows AdditiveCouplingTransform", lambda: T.AdditiveCouplingTransform(mask, Net))
        spline = T.PiecewiseRationalQuadraticCouplingTransform
        add("nflows PiecewiseRationalQuadraticCouplingTransform", lambda: spline(mask, Net, **tails))
        masked = T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        add("nflows masked autoregressive spline", lambda: masked(DIM, HIDDEN, **tails))
    if has("normflows"):
        import normflows as nf

        for scale_map in ("exp", "sigmoid"):
            add(
                f"normflows AffineCouplingBlock, {scale_map}",
                lambda scale_map=scale_map: nf.flows.AffineCouplingBlock(Net(DIM // 2, DIM), scale_map=scale_map),
            )
        b = torch.tensor(mask, dtype=torch.float32)
        add("normflows MaskedAffineFlow", lambda: nf.flows.MaskedAffineFlow(b, Net(DIM, DIM), Net(DIM, DIM)))
        coupled, autoregressive = (
            nf.flows.CoupledRationalQuadraticSpline,
            nf.flows.AutoregressiveRationalQuadraticSpline,
        )
        # the density direction is `inverse` here
        add("normflows CoupledRationalQuadraticSpline", lambda: coupled(DIM, 1, HIDDEN), lambda m, x: m.inverse(x))
        add(
            "normflows AutoregressiveRationalQuadraticSpline",
            lambda: autoregressive(DIM, 1, HIDDEN),
            lambda m, x: m.inverse(x),
        )
    if has("FrEIA"):
        import FrEIA.modules as Fm

        names = [
            "GLOWCouplingBlock",
            "RNVPCouplingBlock",
            "GINCouplingBlock",
            "AffineCouplingOneSided",
            "AllInOneBlock",
        ]
        for name in [*names, *(["RationalQuadraticSpline"] if hasattr(Fm, "RationalQuadraticSpline") else [])]:
            build = lambda name=name: getattr(Fm, name)([(DIM,)], subnet_constructor=Net)  # noqa: E731
            add(f"FrEIA {name}", build, lambda m, x: m([x]))
        add(
            "FrEIA ConditionalAffineTransform",
            lambda: Fm.ConditionalAffineTransform([(DIM,)], dims_c=[(DIM,)], subnet_constructor=Net),
            lambda m, x: m([x], [x.detach()]),
        )
    if has("zuko"):
        import zuko

        hidden = (HIDDEN, HIDDEN)
        for name, flow in {
            "MAF layer": lambda: zuko.flows.MAF(DIM, transforms=1, hidden_features=hidden),
            "NICE layer": lambda: zuko.flows.NICE(DIM, transforms=1, hidden_features=hidden),
            "NSF layer": lambda: zuko.flows.NSF(DIM, transforms=1, hidden_features=hidden, bins=BINS),
            "NSF coupling layer": lambda: zuko.flows.NSF(
                DIM, transforms=1, hidden_features=hidden, bins=BINS, passes=2
            ),
        }.items():
            add(f"zuko {name}", lambda flow=flow: flow().transform, lambda m, x: m().call_and_ladj(x))
    if has("iin.models.iin") and has("edflow"):
        from iin.models import iin

        parts = [iin.VectorActNorm, iin.DoubleVectorCouplingBlock, iin.Shuffle]
        add("CompVis/iin, stack of 12", lambda: iin.EfficientVRNVP(parts, 64, 12, 512, 2), dim=64)
        add("CompVis/iin DoubleVectorCouplingBlock", lambda: parts[1](64, HIDDEN), dim=64)
    if has("net2net.modules.flow.flatflow"):
        from net2net.modules.flow import flatflow

        add("net2net, stack of 12", lambda: flatflow.UnconditionalFlatCouplingFlow(64, 12, 512, 2), dim=64)
        condition = torch.randn(4096, 16)
        add(
            "net2net conditional, stack of 12",
            lambda: flatflow.ConditionalFlatCouplingFlow(64, 16, 16, 512, 2, 12),
            lambda m, x: m(x[:, :, None, None], condition[: len(x)]),
            dim=64,
        )
    return found


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, list | tuple) else []


def measure(build: Callable[[], nn.Module], call: Call, dim: int, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds per call of both sides, in turn."""
    torch.manual_seed(0)
    own, x = build(), torch.randn(batch, dim)
    with torch.no_grad():
        call(own, x)  # data-dependent starts
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast)
    if not report.replaced:
        raise RuntimeError(f"nothing was replaced:\n{report}")

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            call(model, x)

    def training(model: nn.Module) -> None:
        outputs = [t for t in tensors(call(model, x)) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        for parameter in model.parameters():
            parameter.grad = None

    found: dict[str, Any] = {}
    for name, run in (("forward", forward), ("forward + backward", training)):
        seconds: dict[str, list[float]] = {"own": [], "accelerated": []}
        for turn in range(repeats + 3):
            for side, model in (("own", own), ("accelerated", fast)):
                start = time.perf_counter()
                run(model)
                if turn >= 3:
                    seconds[side].append(time.perf_counter() - start)
        found[name] = {
            side: {"min": min(s), "median": statistics.median(s), "max": max(s)} for side, s in seconds.items()
        }
        found[name]["speedup"] = found[name]["own"]["median"] / found[name]["accelerated"]["median"]
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in ("nflows", "normflows", "FrEIA", "zuko"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def table(result: dict[str, Any]) -> str:
    machine, batches = result["machine"], result["batches"]
    libraries = ", ".join(f"{name} {number}" for name, number in result["libraries"].items())
    lines = [
        f"{machine['CPU']} ({machine['CPU instruction set']}), torch {machine['torch']}; {libraries}. Speed-up: median time of "
        "the library's own code over that after `accelerate`, both in one run, in turn; above 1 is faster.",
        "",
        "| | " + " | ".join(f"forward, batch {n} | forward + backward, batch {n}" for n in batches) + " |",
        "|---|" + "---:|" * (2 * len(batches)),
    ]
    for name, by_batch in result["models"].items():
        cells = [
            f"{by_batch[str(n)][what]['speedup']:.2g}" for n in batches for what in ("forward", "forward + backward")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table() -> None:
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + table(json.loads(RESULT.read_text())) + "\n" + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="a few repeats: shows only that it runs")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table")
    arguments = parser.parse_args()
    if arguments.table:
        write_table()
        return
    batches = (64, 1024) if arguments.quick else (64, 256, 4096)
    results: dict[str, Any] = {
        "machine": collect(),
        "libraries": versions(),
        "batches": batches,
        "dim": DIM,
        "models": {},
    }
    for name, (build, call, dim) in models().items():
        results["models"][name] = {}
        for batch in batches:
            repeats = 3 if arguments.quick else 15 if batch > 1000 else 60
            found = measure(build, call, dim, batch, repeats)
            results["models"][name][str(batch)] = found
        text = [
            f"{n}: {r['forward']['speedup']:.2f}, {r['forward + backward']['speedup']:.2f}"
            for n, r in results["models"][name].items()
        ]
        print(name, "|", " | ".join(text), flush=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
