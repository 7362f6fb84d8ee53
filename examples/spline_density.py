"""Densities of real tables by neural spline flows: iin-fast's and nflows', the same flow under the same protocol.

Tables of scikit-learn: breast cancer (569 tumours, 30 measurements) and 16 principal components of handwritten digits
(1797). For every seed a new split; both flows see the same rows in the same order, with a little noise, and are judged on
test rows as they were when the validation rows were likeliest. The flow: blocks of ActNorm, a spline coupling of each half,
a random permutation and an LU-decomposed linear map. Needs nflows.

    python examples/spline_density.py       # some minutes
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, write_results
from nflows.distributions.normal import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    ActNorm,
    CompositeTransform,
    LULinear,
    PiecewiseRationalQuadraticCouplingTransform,
    RandomPermutation,
)
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import iin_fast

SIZE = {"n_flows": 3, "hidden_dim": 32, "hidden_depth": 2, "bins": 8, "tail_bound": 3.0}
BATCH = 512


def ours(dim: int) -> torch.nn.Module:
    return iin_fast.nn.NeuralSplineFlow(dim, **SIZE)


def theirs(dim: int) -> torch.nn.Module:
    first = torch.arange(dim) < (dim + 1) // 2

    def coupling(transformed: torch.Tensor) -> torch.nn.Module:
        def conditioner(inputs: int, outputs: int) -> torch.nn.Module:
            return ResidualNet(inputs, outputs, SIZE["hidden_dim"], num_blocks=SIZE["hidden_depth"])

        return PiecewiseRationalQuadraticCouplingTransform(
            transformed.int(), conditioner, num_bins=SIZE["bins"], tails="linear", tail_bound=SIZE["tail_bound"]
        )

    layers: list[torch.nn.Module] = []
    for _ in range(SIZE["n_flows"]):
        layers += [ActNorm(dim), coupling(~first), coupling(first), RandomPermutation(dim), LULinear(dim)]
    return Flow(CompositeTransform(layers), StandardNormal([dim]))


SYSTEMS: dict[str, Callable[[int], torch.nn.Module]] = {"iin-fast": ours, "nflows": theirs}


def tables(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Train, validation and test rows of each table, standardised by the train rows."""
    found = {}
    for name, rows in (
        ("breast cancer", load_breast_cancer().data),
        ("digits, 16 components", load_digits().data),
    ):
        rest, test = train_test_split(rows, test_size=0.2, random_state=seed)
        train, valid = train_test_split(rest, test_size=0.2, random_state=seed)
        if name.startswith("digits"):
            components = PCA(16, random_state=0).fit(train)
            train, valid, test = (components.transform(part) for part in (train, valid, test))
        scaler = StandardScaler().fit(train)
        found[name] = tuple(torch.tensor(scaler.transform(part), dtype=torch.float32) for part in (train, valid, test))
    return found


def fit(
    make: Callable[[int], torch.nn.Module],
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Test likelihood in nats per row, and seconds of training."""
    train, valid, test = parts
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    flow = make(train.shape[1])
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = -float("inf"), None
    started = time.perf_counter()
    for step in range(steps):
        rows = train[torch.randint(len(train), (BATCH,), generator=random)]
        rows = rows + 0.1 * torch.randn(rows.shape, generator=random)
        loss = -flow.log_prob(rows).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            flow.eval()
            with torch.no_grad():
                likelihood = flow.log_prob(valid).mean().item()
            flow.train()
            if likelihood > best:
                best, kept = likelihood, copy.deepcopy(flow.state_dict())
    seconds = time.perf_counter() - started
    assert kept is not None
    flow.load_state_dict(kept)
    flow.eval()
    with torch.no_grad():
        return {"test nats": flow.log_prob(test).mean().item(), "seconds": seconds}


def main(out: Path, *, quick: bool = False, seed: int = 0, repeats: int = 5) -> dict[str, Any]:
    torch.set_num_threads(1)  # nets this small gain nothing from a second one
    started = time.perf_counter()
    repeats, steps = (1, 40) if quick else (repeats, 600)
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for repeat in range(repeats):
        for table, parts in tables(seed + repeat).items():
            for system, make in SYSTEMS.items():
                run = fit(make, parts, steps=steps, seed=seed + repeat)
                runs.setdefault(table, {}).setdefault(system, []).append(run)
                print(table, system, run, flush=True)
    found: dict[str, Any] = {}
    for table, systems in runs.items():
        found[table] = {}
        for system, values in systems.items():
            nats, seconds = (np.array([v[what] for v in values]) for what in ("test nats", "seconds"))
            found[table][system] = {
                "test nats": {"mean": float(nats.mean()), "std": float(nats.std())},
                "seconds": {"min": seconds.min(), "median": float(np.median(seconds)), "max": seconds.max()},
            }
        pairs = [a["test nats"] - b["test nats"] for a, b in zip(systems["iin-fast"], systems["nflows"], strict=True)]
        times = [b["seconds"] / a["seconds"] for a, b in zip(systems["iin-fast"], systems["nflows"], strict=True)]
        found[table]["difference in nats"] = {"mean": float(np.mean(pairs)), "std": float(np.std(pairs))}
        found[table]["times faster"] = {"min": min(times), "median": float(np.median(times)), "max": max(times)}
    results = {"seeds": repeats, "steps": steps, "batch": BATCH, "threads": 1, "flow": SIZE, "tables": found}
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    given = arguments("spline_density", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
