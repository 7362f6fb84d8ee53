"""No class of any library may be slower after iin_fast.accelerate: each one before and after, in turn in one process:

    python benchmarks/dropin_pairs.py [--quick] [--out OUT.json] [--only NAME ...]    # under ten minutes
    python benchmarks/readme.py                                          # writes the table of docs/dropin.md

One class of 6 features in its library's container, with a net that programs take; and alone, with a user's net, where it is
no part of a program. Training steps with torch's fused Adam, and the density, at batches from 1 to 65536.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from dropin import DIM, Model, Net, density, gaussian, has, measure
from torch import nn

from iin_fast.info import collect, versions

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "dropin_pairs_cpu.json"
BATCHES = (1, 16, 100, 1000, 10000, 65536)
SLOWER = 0.95  # by median and by minimum: what two runs of the same code differ by on a machine of two cores
MASK = [i % 2 for i in range(DIM)]
TAILS = {"tails": "linear", "tail_bound": 3.0, "num_bins": 8}


def plain(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def nflows_classes() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from nflows import transforms as T
    from nflows.nn.nets import ResidualNet

    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=64)  # type: ignore[no-any-return]

    couplings: dict[str, Callable[[Any], nn.Module]] = {
        "AffineCouplingTransform": lambda net: T.AffineCouplingTransform(MASK, net),
        "AdditiveCouplingTransform": lambda net: T.AdditiveCouplingTransform(MASK, net),
        "PiecewiseRationalQuadraticCouplingTransform": lambda net: T.PiecewiseRationalQuadraticCouplingTransform(
            MASK, net, **TAILS
        ),
    }
    for name, make in couplings.items():
        yield name, lambda make=make: T.CompositeTransform([make(net)])
        yield f"{name}, user's net", lambda make=make: make(Net)
    others: dict[str, Callable[[], nn.Module]] = {
        "MaskedAffineAutoregressiveTransform": lambda: T.MaskedAffineAutoregressiveTransform(DIM, 64),
        "MaskedPiecewiseRationalQuadraticAutoregressiveTransform": lambda: (
            T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(DIM, 64, **TAILS)
        ),
        "PiecewiseRationalQuadraticCDF": lambda: T.PiecewiseRationalQuadraticCDF((DIM,), **TAILS),
        "LULinear": lambda: T.CompositeTransform([T.LULinear(DIM, identity_init=False)]),
        "ActNorm, permutation": lambda: T.CompositeTransform([T.ActNorm(DIM), T.ReversePermutation(DIM)]),
    }
    yield from others.items()


def zuko_classes() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from zuko import flows as F

    options = {"transforms": 1, "hidden_features": (64, 64)}
    for name in ("MAF", "NSF", "NCSF", "NICE", "RealNVP"):
        cls = getattr(F, name)
        yield name, lambda cls=cls: cls(DIM, **options)
    yield "NSF, passes=2", lambda: F.NSF(DIM, passes=2, **options)


def normflows_classes() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import normflows as nf

    f, mask = nf.flows, torch.tensor([float(i) for i in MASK])

    def mlp(inputs: int, outputs: int) -> nn.Module:
        return nf.nets.MLP([inputs, 64, 64, outputs])  # type: ignore[no-any-return]

    layers: dict[str, Callable[[], list[nn.Module]]] = {
        "AffineCouplingBlock": lambda: [f.AffineCouplingBlock(mlp(DIM // 2, DIM))],
        "MaskedAffineFlow": lambda: [f.MaskedAffineFlow(mask, mlp(DIM, DIM), mlp(DIM, DIM))],
        "MaskedAffineFlow, user's nets": lambda: [f.MaskedAffineFlow(mask, Net(DIM, DIM), Net(DIM, DIM))],
        "CoupledRationalQuadraticSpline": lambda: [f.CoupledRationalQuadraticSpline(DIM, 2, 64)],
        "AutoregressiveRationalQuadraticSpline": lambda: [f.AutoregressiveRationalQuadraticSpline(DIM, 2, 64)],
        "LULinearPermute": lambda: [f.LULinearPermute(DIM)],
        "ActNorm, Permute": lambda: [f.ActNorm(DIM), f.Permute(DIM)],
    }
    for name, make in layers.items():
        yield name, lambda make=make: nf.NormalizingFlow(nf.distributions.DiagGaussian(DIM), make())


def freia_classes() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    def sequence(cls: Any, net: Any, **options: Any) -> nn.Module:
        made = Ff.SequenceINN(DIM)
        made.append(Fm.AffineCouplingOneSided, subnet_constructor=plain)  # so that the log-det is a tensor
        made.append(cls, subnet_constructor=net, **options)
        return made  # type: ignore[no-any-return]

    for name in (
        "AllInOneBlock",
        "GLOWCouplingBlock",
        "RNVPCouplingBlock",
        "NICECouplingBlock",
        "GINCouplingBlock",
        "AffineCouplingOneSided",
    ):
        for net, more in ((plain, ""), (Net, ", user's net")):
            yield name + more, lambda name=name, net=net: sequence(getattr(Fm, name), net)


def glasflow_classes() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from glasflow import flows

    options = {"n_inputs": DIM, "n_transforms": 1, "n_neurons": 64}
    yield "RealNVP", lambda: flows.RealNVP(scale_activation="nflows", **options)
    yield "CouplingNSF", lambda: flows.CouplingNSF(**options)


LOSSES: dict[str, tuple[Callable[[], Any], Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "nflows": (nflows_classes, lambda m, x, c: gaussian(*m(x))),
    "zuko": (zuko_classes, lambda m, x, c: density(lambda _: m(), x.clamp(-3, 3), c)),
    "normflows": (normflows_classes, lambda m, x, c: m.forward_kld(x)),
    "FrEIA": (freia_classes, lambda m, x, c: gaussian(*m(x))),
    "glasflow": (glasflow_classes, lambda m, x, c: -m.log_prob(x).mean()),
}


def slower(cell: dict[str, Any]) -> bool:
    """Whether the accelerated side is behind by its median and by its minimum."""
    return all(cell["own"][kind] < SLOWER * cell["accelerated"][kind] for kind in ("median", "min"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="a few batches and rounds: shows only that it runs")
    parser.add_argument("--only", nargs="*", help="classes whose name holds one of these")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": collect(),
        "threads": torch.get_num_threads(),
        "libraries": versions(*LOSSES),
        "classes": {},
    }
    behind = []
    for library, (classes, loss) in LOSSES.items():
        for name, build in classes() if has(library) else ():
            shown = f"{library} {name}"
            if arguments.only and not any(part in shown for part in arguments.only):
                continue
            found = results["classes"][shown] = {}
            for batch in (1, 100) if arguments.quick else BATCHES:
                found[str(batch)] = measure(Model(build, loss), batch, 0.05 if arguments.quick else 0.5)
                found[str(batch)].pop("optimizer", None)
                behind += [f"{shown}, {what} at {batch}" for what, cell in found[str(batch)].items() if slower(cell)]
            row = ", ".join(f"{b}: {c['step']['speedup']:.2f} {c['density']['speedup']:.2f}" for b, c in found.items())
            print(f"{shown}: {row}", flush=True)
    results["slower"] = behind
    print("slower:", *(behind or ["none"]), sep="\n  ")
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
