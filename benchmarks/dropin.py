"""Models of other libraries before and after iin_fast.accelerate, both sides in turn in one process:

    python benchmarks/dropin.py [--quick] [--out OUT.json] [--only NAME ...] [--peers FOLDER]    # ten minutes
    python benchmarks/readme.py                                                        # writes the table of docs/dropin.md

Whole models of 6 features, most of them under a context of 7: a training step (loss, backward, torch's fused Adam on both
sides, and on ours once more after ``accelerate(optimizer)``, and with ``direct_gradients`` as well), the density, and 10,000 samples; at batches from 1 to 65536. Then models of 256 and 512 units, layers that are in no
program, sbi's own ``train``, and what else a step costs. FOLDER holds clones of CompVis/iin, net2net, invariances and FrEIA (benchmarks/peers.py).
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import same_isa  # noqa: F401
import torch
from peers import commits, paths
from torch import Tensor, nn

import iin_fast
from iin_fast.info import collect, versions

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "dropin_cpu.json"
DIM, CONTEXT, LAYERS, SAMPLES, TURNS = 6, 7, 5, 10_000, 5
BOTH = "accelerated, and its optimizer"
DIRECT = "accelerated, and its optimizer, direct gradients"
BATCHES = (1, 16, 100, 300, 1024, 4096, 16384, 65536)
WIDTHS, BATCHES_OF_WIDE = (256, 512), (16, 100, 1024, 4096)


@dataclass(frozen=True)
class Model:
    """How a model is made and used; ``loss(model, x, context)`` is the mean over rows."""

    build: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    sample: Callable[[Any, int, Tensor], Any] | None = None
    dim: int = DIM
    batches: tuple[int, ...] = BATCHES
    frozen: bool = False


class Net(nn.Module):
    """A user's conditioner, which no program takes."""

    hidden_features = 64

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def gaussian(z: Tensor, logdet: Tensor) -> Tensor:
    """The negative log-likelihood up to a constant, of whatever shapes the parts of a library give."""
    return (0.5 * z.flatten(1).square().sum(1) - logdet).mean()


def density(m: Any, x: Tensor, context: Tensor) -> Tensor:
    return -m(context).log_prob(x).mean()  # type: ignore[no-any-return]


def sbi_models() -> Iterator[tuple[str, Model]]:
    from sbi.neural_nets import posterior_nn

    for name in ("nsf", "maf", "zuko_nsf", "zuko_maf"):

        def build(name: str = name) -> nn.Module:
            made: nn.Module = posterior_nn(name)(torch.randn(200, DIM), torch.randn(200, CONTEXT))
            return made

        yield (
            f"sbi {name}",
            Model(
                build,
                lambda m, x, c: m.loss(x, condition=c).mean(),
                (lambda m, n, c: m.sample((n,), condition=c[:1])) if "maf" in name else None,
            ),
        )


def zuko_models(width: int = 64) -> Iterator[tuple[str, Model]]:
    from zuko.flows import MAF, NSF

    def draw(m: Any, n: int, c: Tensor) -> Tensor:
        return m(c[:1].squeeze(0)).sample((n,))  # type: ignore[no-any-return]

    for cls in (NSF, MAF):
        build = lambda cls=cls: cls(DIM, CONTEXT, transforms=LAYERS, hidden_features=(width, width))  # noqa: E731
        yield f"zuko {cls.__name__}", Model(build, density, draw)


def normflows_models(width: int = 64) -> Iterator[tuple[str, Model]]:
    import normflows as nf

    def spline() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            spline = nf.flows.CoupledRationalQuadraticSpline(DIM, 2, width, num_context_channels=CONTEXT)
            layers += [spline, nf.flows.LULinearPermute(DIM)]
        return nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(DIM, trainable=False), layers)

    def real_nvp() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(8):
            net = nf.nets.MLP([DIM // 2, width, width, DIM], init_zeros=True)
            layers += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(DIM, mode="swap")]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(DIM), layers)

    yield "normflows NSF", Model(spline, lambda m, x, c: m.forward_kld(x, c))
    yield "normflows RealNVP", Model(real_nvp, lambda m, x, c: m.forward_kld(x), lambda m, n, c: m.sample(n))


def freia_models(width: int = 72) -> Iterator[tuple[str, Model]]:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    def net(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
        )

    def sequence() -> nn.Module:
        made = Ff.SequenceINN(DIM)
        for _ in range(8):
            made.append(Fm.AllInOneBlock, cond=0, cond_shape=(CONTEXT,), subnet_constructor=net)
        return made

    def graph() -> nn.Module:
        condition = Ff.ConditionNode(CONTEXT)
        nodes = [Ff.InputNode(DIM)]
        for _ in range(4):
            nodes.append(Ff.Node(nodes[-1], Fm.GLOWCouplingBlock, {"subnet_constructor": net}, conditions=condition))
            nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {}))
        return Ff.GraphINN([*nodes, Ff.OutputNode(nodes[-1]), condition], verbose=False)

    for name, build in (("AllInOne", sequence), ("GLOW graph", graph)):
        yield f"FrEIA {name}", Model(build, lambda m, x, c: gaussian(*m(x, [c])))


def nflows_models(width: int) -> Iterator[tuple[str, Model]]:
    from nflows import distributions, flows
    from nflows import transforms as T

    def build() -> nn.Module:
        made: list[nn.Module] = []
        for _ in range(LAYERS):
            made.append(T.MaskedAffineAutoregressiveTransform(DIM, width, context_features=CONTEXT))
            made.append(T.RandomPermutation(DIM))
        return flows.Flow(T.CompositeTransform(made), distributions.StandardNormal([DIM]))  # type: ignore[no-any-return]

    yield "nflows MAF", Model(build, lambda m, x, c: -m.log_prob(x, c).mean())


def wide_models() -> Iterator[tuple[str, Model]]:
    """Models whose nets threads share."""
    for package, make in (
        ("nflows", nflows_models),
        ("zuko", zuko_models),
        ("normflows", normflows_models),
        ("FrEIA", freia_models),
    ):
        for width in WIDTHS if has(package) else ():
            for name, model in make(width):
                yield f"{name}, {width} units", replace(model, batches=BATCHES_OF_WIDE, sample=None)


def layers() -> Iterator[tuple[str, Model]]:
    """Layers that no program takes, as their conditioner is the user's own."""
    mask, tails = [i % 2 for i in range(DIM)], {"tails": "linear", "tail_bound": 3.0, "num_bins": 8}
    some = BATCHES[::2] + BATCHES[-1:]
    if has("nflows"):
        from nflows import transforms as T

        for name, build in {
            "affine coupling": lambda: T.AffineCouplingTransform(mask, Net),
            "spline coupling": lambda: T.PiecewiseRationalQuadraticCouplingTransform(mask, Net, **tails),
            "spline CDF": lambda: T.PiecewiseRationalQuadraticCDF((DIM,), **tails),
            "spline coupling, LU, permutation; user's net": lambda: T.CompositeTransform(
                [
                    T.PiecewiseRationalQuadraticCouplingTransform(mask, Net, **tails),
                    T.LULinear(DIM),
                    T.ReversePermutation(DIM),
                    T.AffineCouplingTransform(mask, Net),
                ]
            ),
        }.items():
            yield f"nflows {name}", Model(build, lambda m, x, c: gaussian(*m(x)), batches=some)
    if has("zuko"):
        from zuko.flows import NSF

        for name, options in (("layer", {"transforms": 1}), ("coupling layer", {"transforms": 1, "passes": 2})):
            build = lambda options=options: NSF(DIM, hidden_features=(64, 64), **options).transform.transforms[0]  # noqa: E731
            yield f"zuko NSF {name}", Model(build, lambda m, x, c: gaussian(*m().call_and_ladj(x)), batches=some)
    if has("FrEIA.modules.splines"):
        import FrEIA.modules as Fm

        build = lambda: Fm.RationalQuadraticSpline([(DIM,)], subnet_constructor=Net)  # noqa: E731
        yield "FrEIA RationalQuadraticSpline", Model(build, lambda m, x, c: gaussian(*_first(m([x]))), batches=some)


def _first(found: Any) -> tuple[Tensor, Tensor]:
    return found[0][0], found[1]


def stacks() -> Iterator[tuple[str, Model]]:
    """Published stacks of 12 blocks, trained and, with ``frozen=True``, evaluated."""
    few, given = (64, 256, 4096), torch.randn(4096, 16)

    def both(name: str, build: Callable[[], nn.Module], loss: Any) -> Iterator[tuple[str, Model]]:
        for frozen in (False, True):
            yield name + ", frozen" * frozen, Model(build, loss, dim=64, batches=few, frozen=frozen)

    def under(m: Any, x: Tensor, c: Tensor) -> Tensor:
        return gaussian(*m(x[:, :, None, None], given[: len(x)]))

    if has("iin.models.iin"):
        from iin.models import iin

        parts = [iin.VectorActNorm, iin.DoubleVectorCouplingBlock, iin.Shuffle]
        yield from both(
            "CompVis/iin", lambda: iin.EfficientVRNVP(parts, 64, 12, 512, 2), lambda m, x, c: gaussian(*m(x))
        )
    if has("net2net.modules.flow.flatflow"):
        from net2net.modules.flow import flatflow

        flat = lambda: flatflow.UnconditionalFlatCouplingFlow(64, 12, 512, 2)  # noqa: E731
        yield from both("net2net", flat, lambda m, x, c: gaussian(*m(x)))
        conditional = lambda: flatflow.ConditionalFlatCouplingFlow(64, 16, 16, 512, 2, 12)  # noqa: E731
        yield from both("net2net conditional", conditional, under)
    if has("invariances.model.blocks"):
        from invariances.model import blocks

        yield from both("invariances", lambda: blocks.ConditionalFlow(64, 16, 512, 2, 12), under)


def models() -> Iterator[tuple[str, Model]]:
    for package, make in (
        ("sbi", sbi_models),
        ("zuko", zuko_models),
        ("normflows", normflows_models),
        ("FrEIA", freia_models),
    ):
        if has(package):
            yield from make()


def in_turn(sides: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Seconds per call of all sides in five turns, in three where a call is long; in a turn a side runs alone, as in training."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    for run in sides.values():  # warm up
        run()
    begin = time.perf_counter()
    for turn in range(TURNS):
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
        for side, run in sides.items():
            until = time.perf_counter() + seconds / TURNS / len(sides)
            while True:
                start = time.perf_counter()
                run()
                now = time.perf_counter()
                times[side].append(now - start)
                if now >= until:
                    break
    found: dict[str, Any] = {
        side: {"min": min(s), "median": statistics.median(s), "max": max(s), "calls": len(s)}
        for side, s in times.items()
    }
    found["speedup"] = found["own"]["median"] / found["accelerated"]["median"]
    return found


def measure(model: Model, batch: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    own = model.build()
    x, context = torch.randn(batch, model.dim), torch.randn(batch, CONTEXT)
    with torch.no_grad():
        model.loss(own, torch.randn(64, model.dim), torch.randn(64, CONTEXT))  # data-dependent starts
    pair = {"own": own, "accelerated": copy.deepcopy(own), BOTH: copy.deepcopy(own)}
    pair[DIRECT] = copy.deepcopy(own)
    for side in list(pair)[1:]:
        iin_fast.accelerate(pair[side], frozen=model.frozen)
    optimizers = {side: torch.optim.Adam(m.parameters(), 1e-4, fused=True) for side, m in pair.items()}
    for side in (BOTH, DIRECT):
        iin_fast.accelerate(optimizers[side])

    def step(side: str) -> None:
        optimizers[side].zero_grad()
        with iin_fast.direct_gradients(side == DIRECT):
            model.loss(pair[side], x, context).backward()
        optimizers[side].step()

    @torch.no_grad()
    def log_prob(side: str) -> None:
        model.loss(pair[side], x, context)

    @torch.no_grad()
    def sample(side: str) -> None:
        model.sample(pair[side], SAMPLES, context)  # type: ignore[misc]

    runs: dict[str, Callable[[str], None]] = {"density": log_prob}
    if not model.frozen:
        runs["step"] = step
        if batch == BATCHES[2]:  # what both sides pay
            runs["optimizer"] = lambda side: optimizers[side].step()
    if model.sample is not None and batch == BATCHES[2]:
        runs["samples"] = sample
    return {
        what: in_turn(
            {
                side: lambda run=run, side=side: run(side)
                for side in pair
                if side in ("own", "accelerated") or what == "step" or (what, side) == ("optimizer", BOTH)
            },
            seconds,
        )
        for what, run in runs.items()
    }


def sbi_trainings(rounds: int, epochs: int) -> dict[str, Any]:
    """Wall clock of sbi's own ``train``: its loader, validation and optimizer included."""
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    theta = torch.rand(2000, DIM) * 2 - 1
    x = torch.cat([theta, theta.sum(1, keepdim=True)], 1) + 0.1 * torch.randn(2000, CONTEXT)

    def fused() -> Any:
        return iin_fast.patch("sbi", fused_optimizer=True)

    @contextmanager
    def direct() -> Iterator[None]:
        with fused(), iin_fast.direct_gradients():
            yield

    sides: dict[str, Callable[[], Any]] = {
        "own": nullcontext,
        "accelerated": lambda: iin_fast.patch("sbi"),
        "with fused_optimizer": fused,
        "with fused_optimizer and direct_gradients": direct,
    }

    def train(name: str, side: str) -> float:
        torch.manual_seed(0)
        npe = NPE(BoxUniform(-torch.ones(DIM), torch.ones(DIM)), density_estimator=name, show_progress_bars=False)
        npe.append_simulations(theta, x)
        start = time.perf_counter()
        with sides[side]():
            npe.train(max_num_epochs=epochs, stop_after_epochs=epochs)
        return time.perf_counter() - start

    found: dict[str, Any] = {}
    for name in ("nsf", "maf"):
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(rounds + 1):  # the first warms up
            for side in sides:
                seconds = train(name, side)
                if turn:
                    times[side].append(seconds)
        found[name] = {side: statistics.median(s) for side, s in times.items()}
        print("sbi train", name, found[name], flush=True)
    return found


def else_in_a_step(seconds: float) -> dict[str, float]:
    """Milliseconds of what no flow can speed up, for the parameters of sbi's nsf."""
    from sbi.neural_nets import posterior_nn

    parameters = list(posterior_nn("nsf")(torch.randn(200, DIM), torch.randn(200, CONTEXT)).parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    sides = {
        "own": torch.optim.Adam(parameters).step,
        "accelerated": torch.optim.Adam(parameters, fused=True).step,
        "clipping": lambda: nn.utils.clip_grad_norm_(parameters, 5.0),
    }
    names = {"own": "Adam", "accelerated": "Adam, fused", "clipping": "clipping"}
    found = in_turn(sides, seconds)
    return {shown: 1e3 * found[side]["median"] for side, shown in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="a few batches and rounds: shows only that it runs")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, all its sides together")
    parser.add_argument("--only", nargs="*", help="models whose name holds one of these")
    parser.add_argument("--peers", type=Path, help="a folder of clones: see benchmarks/peers.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.peers:
            sys.path[:0] = paths(arguments.peers, Path(scratch))
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    seconds = 0.2 if arguments.quick else arguments.seconds
    results: dict[str, Any] = {
        "machine": collect(),
        "threads": torch.get_num_threads(),
        "libraries": versions("sbi", "nflows", "normflows", "FrEIA", "zuko"),
        "peers": commits(arguments.peers),
    }
    groups = {"models": models, "wide models": wide_models, "layers": layers, "stacks": stacks}
    for group, make in groups.items():
        results[group] = {}
        for name, model in make():
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            found = results[group][name] = {}
            for batch in model.batches:
                if arguments.quick and batch not in (1, 100, 4096):
                    continue
                found[str(batch)] = measure(model, batch, seconds)
                row = ", ".join(f"{what} {cell['speedup']:.2f}" for what, cell in found[str(batch)].items())
                print(f"{name}, batch {batch}: {row}", flush=True)
    if has("sbi") and not arguments.only:
        results["sbi train"] = sbi_trainings(*((1, 2) if arguments.quick else (3, 10)))
        results["else"] = else_in_a_step(seconds)
        print(results["else"])
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
