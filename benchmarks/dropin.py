"""Models of other libraries before and after iin_fast.accelerate, in turn in one process:

    python benchmarks/dropin.py [--quick] [--out OUT.json] [--peers FOLDER]
    python benchmarks/readme.py                                             # writes the table of docs/dropin.md

A layer with its conditioner (two hidden layers of 64), float32. FOLDER holds clones of CompVis/iin, net2net, invariances and
FrEIA (benchmarks/peers.py): stacks of the published size, and FrEIA's repository instead of its release.
"""

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import commits, paths
from torch import Tensor, nn

import iin_fast
from iin_fast.bench.timing import in_turn
from iin_fast.info import collect, versions

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "dropin_cpu.json"
DIM, HIDDEN, BINS = 32, 64, 8
INVERSE = 256  # the batch at which the other direction is measured too

Call = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class Model:
    """What is measured: the density direction, and back."""

    build: Callable[[], nn.Module]
    call: Call
    inverse: Call
    dim: int

    def stack(self) -> bool:
        return self.dim != DIM


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


def models() -> dict[str, Model]:
    found: dict[str, Model] = {}
    mask = [i % 2 for i in range(DIM)]

    def add(name: str, build: Callable[[], nn.Module], call: Call, inverse: Call, dim: int = DIM) -> None:
        found[name] = Model(build, call, inverse, dim)

    if has("nflows"):
        from nflows import transforms as T

        two: tuple[Call, Call] = (lambda m, x: m(x), lambda m, x: m.inverse(x))
        tails: dict[str, Any] = {"tails": "linear", "tail_bound": 3.0, "num_bins": BINS}
        add("nflows AffineCouplingTransform", lambda: T.AffineCouplingTransform(mask, Net), *two)
        add("nflows AdditiveCouplingTransform", lambda: T.AdditiveCouplingTransform(mask, Net), *two)
        spline = T.PiecewiseRationalQuadraticCouplingTransform
        add("nflows PiecewiseRationalQuadraticCouplingTransform", lambda: spline(mask, Net, **tails), *two)
        add("nflows PiecewiseRationalQuadraticCDF", lambda: T.PiecewiseRationalQuadraticCDF((DIM,), **tails), *two)
        masked = T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        add("nflows masked autoregressive spline", lambda: masked(DIM, HIDDEN, **tails), *two)
    if has("normflows"):
        import normflows as nf

        # the density direction is `inverse` here
        two = (lambda m, x: m.inverse(x), lambda m, x: m(x))
        for scale_map in ("exp", "sigmoid", "sigmoid_inv"):
            add(
                f"normflows AffineCouplingBlock, {scale_map}",
                lambda scale_map=scale_map: nf.flows.AffineCouplingBlock(Net(DIM // 2, DIM), scale_map=scale_map),
                *two,
            )
        b = torch.tensor(mask, dtype=torch.float32)
        add("normflows MaskedAffineFlow", lambda: nf.flows.MaskedAffineFlow(b, Net(DIM, DIM), Net(DIM, DIM)), *two)
        for name in ("CoupledRationalQuadraticSpline", "AutoregressiveRationalQuadraticSpline"):
            add(f"normflows {name}", lambda name=name: getattr(nf.flows, name)(DIM, 1, HIDDEN), *two)
    if has("FrEIA"):
        import FrEIA.modules as Fm

        names = [
            "GLOWCouplingBlock",
            "RNVPCouplingBlock",
            "GINCouplingBlock",
            "NICECouplingBlock",
            "AffineCouplingOneSided",
            "AllInOneBlock",
        ]
        two = (lambda m, x: m([x]), lambda m, x: m([x], rev=True))
        for name in [*names, *(["RationalQuadraticSpline"] if hasattr(Fm, "RationalQuadraticSpline") else [])]:
            build = lambda name=name: getattr(Fm, name)([(DIM,)], subnet_constructor=Net)  # noqa: E731
            add(f"FrEIA {name}", build, *two)
        add(
            "FrEIA ConditionalAffineTransform",
            lambda: Fm.ConditionalAffineTransform([(DIM,)], dims_c=[(DIM,)], subnet_constructor=Net),
            lambda m, x: m([x], [x.detach()]),
            lambda m, x: m([x], [x.detach()], rev=True),
        )
    if has("zuko"):
        import zuko

        hidden = (HIDDEN, HIDDEN)
        two = (lambda m, x: m().call_and_ladj(x), lambda m, x: m().inv.call_and_ladj(x))
        for name, flow in {
            "MAF layer": lambda: zuko.flows.MAF(DIM, transforms=1, hidden_features=hidden),
            "NICE layer": lambda: zuko.flows.NICE(DIM, transforms=1, hidden_features=hidden),
            "NSF layer": lambda: zuko.flows.NSF(DIM, transforms=1, hidden_features=hidden, bins=BINS),
            "NSF coupling layer": lambda: zuko.flows.NSF(
                DIM, transforms=1, hidden_features=hidden, bins=BINS, passes=2
            ),
        }.items():
            add(f"zuko {name}", lambda flow=flow: flow().transform, *two)
    two = (lambda m, x: m(x), lambda m, x: m(x, reverse=True))
    if has("iin.models.iin"):
        from iin.models import iin

        parts = [iin.VectorActNorm, iin.DoubleVectorCouplingBlock, iin.Shuffle]
        add("CompVis/iin DoubleVectorCouplingBlock", lambda: parts[1](DIM, HIDDEN), *two)
        add("CompVis/iin VectorActNorm", lambda: parts[0](DIM), *two)
        add("CompVis/iin Shuffle", lambda: parts[2](DIM), *two)
        add("CompVis/iin, stack of 12", lambda: iin.EfficientVRNVP(parts, 64, 12, 512, 2), *two, dim=64)
    condition = torch.randn(4096, 16)
    given: tuple[Call, Call] = (
        lambda m, x: m(x[:, :, None, None], condition[: len(x)]),
        lambda m, x: m(x[:, :, None, None], condition[: len(x)], reverse=True),
    )
    if has("net2net.modules.flow.flatflow"):
        from net2net.modules.flow import flatflow

        add("net2net, stack of 12", lambda: flatflow.UnconditionalFlatCouplingFlow(64, 12, 512, 2), *two, dim=64)
        conditional = flatflow.ConditionalFlatCouplingFlow
        add("net2net conditional, stack of 12", lambda: conditional(64, 16, 16, 512, 2, 12), *given, dim=64)
    if has("invariances.model.blocks"):
        from invariances.model import blocks

        add("invariances, stack of 12", lambda: blocks.ConditionalFlow(64, 16, 512, 2, 12), *given, dim=64)
    return found


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, list | tuple) else []


class NothingReplaced(Exception):
    """Why accelerate leaves a model."""


def measure(model: Model, batch: int, repeats: int, warm_up: int, *, frozen: bool = False) -> dict[str, Any]:
    """Seconds per call of both sides, in turn."""
    torch.manual_seed(0)
    own, x = model.build(), torch.randn(batch, model.dim)
    with torch.no_grad():
        model.call(own, x)  # data-dependent starts
    fast = copy.deepcopy(own)
    report = iin_fast.accelerate(fast, frozen=frozen)
    if not report.replaced:
        raise NothingReplaced("; ".join(sorted({line.why for line in report.left})))

    def forward(module: nn.Module) -> None:
        with torch.no_grad():
            model.call(module, x)

    def inverse(module: nn.Module) -> None:
        with torch.no_grad():
            model.inverse(module, x)

    def training(module: nn.Module) -> None:
        outputs = [t for t in tensors(model.call(module, x)) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        for parameter in module.parameters():
            parameter.grad = None

    runs = {"forward": forward}
    if not frozen and any(parameter.requires_grad for parameter in own.parameters()):
        runs["forward + backward"] = training
    if not frozen and batch == INVERSE:
        runs["inverse"] = inverse
    found: dict[str, Any] = {}
    for name, run in runs.items():
        sides = {"own": partial(run, own), "accelerated": partial(run, fast)}
        found[name] = in_turn(sides, repeats, warm_up=warm_up)
        found[name]["speedup"] = found[name]["own"]["median"] / found[name]["accelerated"]["median"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="a few repeats: shows only that it runs")
    parser.add_argument("--peers", type=Path, help="a folder of clones: see benchmarks/peers.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.peers:
            sys.path[:0] = paths(arguments.peers, Path(scratch))
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    batches = (64, 256) if arguments.quick else (64, 256, 4096)
    results: dict[str, Any] = {
        "machine": collect(),
        "inverse at": INVERSE,
        "threads": torch.get_num_threads(),
        "libraries": versions("nflows", "normflows", "FrEIA", "zuko"),
        "peers": commits(arguments.peers),
        "batches": batches,
        "dim": DIM,
        "models": {},
        "left": {},
    }
    for name, model in models().items():
        by_batch = {}
        try:
            for batch in batches:
                repeats = 3 if arguments.quick else 60 if batch < 1000 else 15
                warm_up = 3
                if model.stack():  # seconds per call
                    repeats, warm_up = min(repeats, 15 if batch < 1000 else 3), 1
                found = measure(model, batch, repeats, warm_up)
                if model.stack():
                    frozen = measure(model, batch, repeats, warm_up, frozen=True)
                    found["forward, frozen"] = frozen["forward"]
                by_batch[str(batch)] = found
        except NothingReplaced as reason:
            results["left"][name] = str(reason)
            print(name, "| left:", reason, flush=True)
            continue
        results["models"][name] = by_batch
        text = [
            f"{batch}: " + ", ".join(f"{what} {row['speedup']:.2f}" for what, row in found.items())
            for batch, found in by_batch.items()
        ]
        print(name, "|", " | ".join(text), flush=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
