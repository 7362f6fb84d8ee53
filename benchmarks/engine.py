"""Whole flows against flowjax under jax.jit and the libraries for torch, as users train them:
python benchmarks/engine.py --jax PYTHON [--out OUT.json] [--picture docs/images/engine_batch.png] [--only NAME …]

PYTHON is that of an environment with jax and flowjax. All sides run in turn, several rounds, on the same number of threads. A
step is loss, backward and Adam; all torch sides use torch's fused Adam, ours also after iin_fast.accelerate(optimizer), and so with nll_backward in place of log_prob and backward. Every side has the same number
of layers, widths and depths; what differs (permutations, ActNorm, MADE's residual blocks) is a library's own.
"""

import same_isa  # noqa: F401

# isort: split
import argparse
import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import iin_fast
from iin_fast.bench.memory import peak_above
from iin_fast.bench.run import machine_peaks
from iin_fast.bench.timing import spread, time_of
from iin_fast.info import collect, versions

NSF = {
    "kind": "coupling",
    "transformer": "spline",
    "layers": 10,
    "hidden": 64,
    "depth": 4,
    "bins": 8,
    "dim": 6,
    "context_dim": 10,
}
LU = {**NSF, "dim": 16, "lu": True}
MAF = {
    "kind": "autoregressive",
    "transformer": "affine",
    "layers": 5,
    "hidden": 50,
    "depth": 2,
    "dim": 6,
    "context_dim": 7,
}
NVP = {"kind": "coupling", "transformer": "affine", "layers": 8, "hidden": 64, "depth": 2, "dim": 6, "context_dim": 0}
SAMPLED = {**MAF, "dim": 10, "context_dim": 0}

CASES: list[dict[str, Any]] = [
    *(
        {**NSF, "flow": "NSF", "batch": batch, "measure": measure}
        for batch in (50, 256, 4096)
        for measure in ("step", "log_prob")
    ),
    *({**LU, "flow": "NSF, LU, dim 16", "batch": 256, "measure": measure} for measure in ("step", "log_prob")),
    *(
        {**MAF, "flow": "MAF", "batch": batch, "measure": measure}
        for batch in (50, 200)
        for measure in ("step", "log_prob")
    ),
    *({**NVP, "flow": "RealNVP", "batch": 128, "measure": measure} for measure in ("step", "log_prob")),
    *(
        {**sizes, "hidden": 256, "flow": f"{flow}, 256 units", "batch": 256, "measure": measure}
        for flow, sizes in (("NSF", NSF), ("MAF", MAF))
        for measure in ("step", "log_prob")
    ),
    {**SAMPLED, "flow": "MAF, dim 10", "batch": 10_000, "measure": "sample"},
]
for case in CASES:
    case["name"] = f"{case['flow']}, {case['measure']}, batch {case['batch']}"

Call = Callable[[], Any]


def ours(case: dict[str, Any]) -> nn.Module:
    dim, context = case["dim"], case["context_dim"]
    if case["kind"] == "autoregressive":
        return iin_fast.nn.MaskedAutoregressiveFlow(
            dim, context, n_flows=case["layers"], hidden_dim=case["hidden"], hidden_depth=case["depth"] - 1
        )
    if case["transformer"] == "affine":
        return iin_fast.nn.RealNVP(
            dim, context, n_flows=case["layers"], hidden_dim=case["hidden"], hidden_depth=case["depth"] - 1
        )
    return iin_fast.nn.NeuralSplineFlow(
        dim,
        context,
        n_flows=case["layers"] // 2,
        bins=case["bins"],
        hidden_dim=case["hidden"],
        hidden_depth=case["depth"] // 2,
        mixing="lu" if case.get("lu") else "permutation",
    )


def nflows_model(case: dict[str, Any]) -> nn.Module | None:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import (
        CompositeTransform,
        LULinear,
        MaskedAffineAutoregressiveTransform,
        PiecewiseRationalQuadraticCouplingTransform,
        RandomPermutation,
    )

    dim, context = case["dim"], case["context_dim"] or None
    if case["kind"] == "coupling" and case["transformer"] == "affine":
        return None

    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, case["hidden"], context, num_blocks=case["depth"] // 2)

    layers: list[nn.Module] = []
    for i in range(case["layers"]):
        if case["kind"] == "autoregressive":
            layers.append(
                MaskedAffineAutoregressiveTransform(dim, case["hidden"], context, num_blocks=case["depth"] // 2)
            )
            layers.append(RandomPermutation(dim))
            continue
        mask = torch.arange(dim) % 2 == i % 2
        layers.append(
            PiecewiseRationalQuadraticCouplingTransform(mask, net, case["bins"], tails="linear", tail_bound=3.0)
        )
        if case.get("lu") and i % 2:
            layers.append(LULinear(dim))
    return Flow(CompositeTransform(layers), StandardNormal([dim]))


def zuko_model(case: dict[str, Any]) -> nn.Module | None:
    import zuko

    hidden = (case["hidden"],) * case["depth"]
    common = {
        "features": case["dim"],
        "context": case["context_dim"],
        "transforms": case["layers"],
        "hidden_features": hidden,
    }
    if case["kind"] == "autoregressive":
        return zuko.flows.MAF(**common, randperm=True)
    if case["transformer"] == "affine":
        return None
    return zuko.flows.NSF(**common, bins=case["bins"], passes=2)  # passes=2: couplings


def normflows_model(case: dict[str, Any]) -> nn.Module | None:
    import normflows as nf

    if case["kind"] != "coupling" or case["transformer"] != "affine":
        return None
    dim, hidden = case["dim"], [case["hidden"]] * case["depth"]
    layers: list[nn.Module] = []
    for _ in range(case["layers"]):
        net = nf.nets.MLP([dim // 2, *hidden, dim], init_zeros=True)
        layers += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(dim, mode="swap")]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)


def torch_call(side: str, flow: nn.Module, case: dict[str, Any], **adam: Any) -> Call:
    generator, device = torch.Generator().manual_seed(1), next(flow.parameters()).device

    def draw(features: int) -> Tensor:
        return torch.randn(case["batch"], features, generator=generator).to(device)

    x = draw(case["dim"])
    context = draw(case["context_dim"]) if case["context_dim"] else None

    def log_prob() -> Tensor:
        if side == "zuko":
            return flow(context).log_prob(x)
        if context is None:
            return flow.log_prob(x)
        return flow.log_prob(x, context)

    if side == COMPILED:
        log_prob = torch.compile(log_prob)

    if case["measure"] == "sample":

        def sample() -> Any:
            with torch.no_grad():
                if side == "zuko":
                    return flow(context).sample((case["batch"],))
                if side == "iin-fast":
                    return flow.sample((case["batch"],))
                return flow.sample(case["batch"])

        return sample
    if case["measure"] == "log_prob":

        def density() -> Any:
            with torch.no_grad():
                return log_prob()

        return density
    log_prob()  # data-dependent starts
    if case["measure"] == "gradient":
        return lambda: (-log_prob().mean()).backward()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True, **adam)
    if side in OURS_IN_STEPS:
        iin_fast.accelerate(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        if side == ONE_CALL:
            flow.nll_backward(x, context)  # type: ignore[operator]
        else:
            (-log_prob().mean()).backward()
        optimizer.step()

    return step


def timed(call: Call, seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(time_of(call))
    return times


class Jax:
    """JAX in a process of its own; it waits, without work, while the others are measured."""

    def __init__(self, python: str, script: str = "engine_jax.py", **options: Any) -> None:
        """``options`` go to Popen."""
        command = [python, str(Path(__file__).with_name(script))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)

        self._versions: dict[str, str] = {}

    def versions(self, limit: float | None = None) -> dict[str, str]:
        """What it says first, once it has loaded its libraries."""
        self._versions = self._versions or self._read(limit)
        return self._versions

    def _read(self, limit: float | None) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit)[0]:
            raise TimeoutError(f"no answer from JAX after {limit:.3g} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process with JAX ended; its message stands above")
        return json.loads(line)

    def measure(self, case: dict[str, Any], seconds: float, limit: float | None = None) -> dict[str, Any]:
        """``limit``: seconds that an answer may take."""
        assert self._process.stdin is not None and self.versions(limit)
        print(json.dumps(case | {"seconds": seconds}), file=self._process.stdin, flush=True)
        return self._read(limit)  # type: ignore[no-any-return]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


ACCELERATED, ONE_CALL = OURS_IN_STEPS = ("iin-fast, accelerate(optimizer)", "iin-fast, nll_backward")
SIDES = {
    "iin-fast": ours,
    **dict.fromkeys(OURS_IN_STEPS, ours),
    "nflows": nflows_model,
    "zuko": zuko_model,
    "normflows": normflows_model,
}
COMPILED = "torch.compile"  # of nflows' model, of normflows' where nflows has none


def compiled_model(case: dict[str, Any]) -> nn.Module | None:
    return None if case["measure"] == "sample" else nflows_model(case) or normflows_model(case)


MEMORY_BATCH, MEMORY_LAYERS = 4096, (10, 20, 40)


def memory(side: str, layers: int) -> float:
    """MiB that a training step of the NSF holds at most above what was there, without the gradients; in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", side, str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory_here(side: str, layers: int) -> float:
    case = {**NSF, "layers": layers, "batch": MEMORY_BATCH, "measure": "gradient"}
    flow = SIDES[side](case)
    assert flow is not None
    torch_call(side, flow, {**case, "batch": 4})()  # loads libraries, starts threads
    flow.zero_grad()
    step = torch_call(side, flow, case)
    flow.zero_grad()
    peak = peak_above(step)
    return peak - sum(p.grad.nbytes for p in flow.parameters() if p.grad is not None) / 2**20


def draw(result: dict[str, Any], picture: Path) -> None:
    """The NSF's step and density over batch sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8))
    colors: dict[str, Any] = {}  # of a side, in both plots
    for axis, measure, title in zip(axes, ("step", "log_prob"), ("training step", "log_prob"), strict=True):
        rows = [
            row
            for row in result["cases"].values()
            if row["case"]["flow"] == "NSF" and row["case"]["measure"] == measure
        ]
        rows.sort(key=lambda row: row["case"]["batch"])
        for side in rows[0]["sides"]:
            medians, least, most = ([1e3 * row["sides"][side][k] for row in rows] for k in ("median", "min", "max"))
            batches = [row["case"]["batch"] for row in rows]
            color = colors.setdefault(side, f"C{len(colors)}")
            wide = 2.5 if side.startswith("iin-fast") else 1.2
            axis.plot(batches, medians, "o-", label=side, lw=wide, color=color)
            axis.fill_between(batches, least, most, alpha=0.15, color=color)
        axis.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms (median; band: min to max)", title=title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(colors), fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"Neural spline flow, 10 couplings, hidden 64\n{machine['CPU']}, {machine['CPU instruction set']}", fontsize=10
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(picture, dpi=110)


def floor(case: dict[str, Any], parameters: int, peaks: dict[str, float]) -> float:
    """Seconds that the arithmetic of the nets takes at the machine's peak: one pass forward, two more for a step."""
    return 2 * parameters * case["batch"] * (3 if case["measure"] == "step" else 1) / (peaks["gflops"] * 1e9)


def run_case(
    case: dict[str, Any],
    sides: dict[str, Callable[[dict[str, Any]], nn.Module | None]],
    jax: Jax | None,
    rounds: int,
    seconds: float,
    peaks: dict[str, float],
) -> dict[str, Any]:
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for side, make in sides.items():
        torch.manual_seed(0)
        flow = None if side in OURS_IN_STEPS and case["measure"] != "step" else make(case)
        if flow is None:
            continue
        calls[side] = torch_call(side, flow, case)
        first = time_of(calls[side])
        rows[side] = {"parameters": sum(p.numel() for p in flow.parameters()), "first_call": first, "times": []}
        timed(calls[side], seconds / 4)  # warm-up
    if jax is not None:
        rows["flowjax"] = {"times": []} | {k: v for k, v in jax.measure(case, seconds / 4).items() if k != "times"}
    for _ in range(rounds):
        for side, call in calls.items():
            rows[side]["times"] += [statistics.median(timed(call, seconds))]
        if jax is not None:
            rows["flowjax"]["times"] += [statistics.median(jax.measure(case, seconds)["times"])]
    for row in rows.values():
        times = row.pop("times")
        row |= spread(times)
    least = floor(case, rows["iin-fast"]["parameters"], peaks)
    print(case["name"], f"floor {least * 1e3:.2f} ms", flush=True)
    for side, row in rows.items():
        ratio = row["median"] / rows["iin-fast"]["median"]
        print(
            f"  {side:31} {row['median'] * 1e3:8.3f} ms  {ratio:6.2f} x  ({row['parameters']} parameters)", flush=True
        )
    return {"case": case, "floor": least, "sides": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jax", help="the python of an environment with jax and flowjax")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_cpu.json"))
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name begins with one of these")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile as well: half a minute more for each case"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each side in a round")
    parser.add_argument("--picture", type=Path, help="file for a plot over batch sizes")
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("SIDE", "LAYERS"), help="only print what that side's step holds"
    )
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_here(arguments.memory_of[0], int(arguments.memory_of[1])))
        return
    sides = SIDES | ({COMPILED: compiled_model} if arguments.compile else {})
    peaks = machine_peaks(False)
    jax = Jax(arguments.jax) if arguments.jax else None
    libraries = versions("torch", "nflows", "zuko", "normflows")
    result = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": collect(),
        "versions": libraries | (jax.versions() if jax else {}),
        "peaks": peaks,
        "cases": {},
    }
    for case in CASES:
        if case["name"].startswith(tuple(arguments.only)):
            result["cases"][case["name"]] = run_case(case, sides, jax, arguments.rounds, arguments.seconds, peaks)
    if jax is not None:
        jax.close()
    if arguments.only == [""]:
        result["memory"] = {
            side: {layers: memory(side, layers) for layers in MEMORY_LAYERS} for side in ("iin-fast", "nflows", "zuko")
        }
        if arguments.picture:
            draw(result, arguments.picture)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
