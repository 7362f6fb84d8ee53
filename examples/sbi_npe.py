"""Posterior estimation with sbi, with and without ``iin_fast.patch``.

The SLCP task: five parameters of a two-dimensional Gaussian, four points drawn from it; the posterior has four modes. sbi
trains neural posterior estimators on nflows and on zuko, from the same seed, by its own code and under
``patch("nflows", "zuko")``: held-out log-probability, and a classifier that tries to tell the samples of both apart (C2ST,
0.5 where it can't). The same comparison between two seeds of sbi's own code says what training varies. Then seconds of
short trainings, both sides in turn, three times.

    pip install '.[sbi]'
    python examples/sbi_npe.py  # some minutes, on an otherwise idle machine
"""

import os
import statistics
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import arguments, write_results
from torch import Tensor

import iin_fast
from iin_fast.info import collect

# The estimator as sbi names it.
ESTIMATORS = {"nflows spline": "nsf", "zuko spline": "zuko_nsf", "nflows affine": "maf", "zuko affine": "zuko_maf"}


def simulate(theta: Tensor, random: torch.Generator) -> Tensor:  # [n, 5] -> [n, 8]
    """Four points of a Gaussian with mean theta 0 and 1, deviations theta 2² and 3², correlation tanh(theta 4)."""
    mean, spread, correlation = theta[:, None, :2], theta[:, None, 2:4] ** 2, theta[:, None, 4].tanh()
    noise = torch.randn(len(theta), 4, 2, generator=random)
    second = correlation * noise[..., 0] + (1 - correlation**2).sqrt() * noise[..., 1]
    return (mean + spread * torch.stack([noise[..., 0], second], -1)).flatten(1)


def train(
    model: str, theta: Tensor, x: Tensor, observed: Tensor, logs: Path, *, epochs: int, samples: int, seed: int
) -> dict[str, Any]:
    """One estimator: seconds of training and of sampling, best held-out log-probability, samples drawn twice."""
    from sbi.inference import NPE
    from sbi.utils import BoxUniform
    from torch.utils.tensorboard import SummaryWriter

    torch.manual_seed(seed)
    npe = NPE(
        BoxUniform(-3 * torch.ones(5), 3 * torch.ones(5)),
        density_estimator=model,
        summary_writer=SummaryWriter(logs),
        show_progress_bars=False,
    )
    npe.append_simulations(theta, x)
    started = time.perf_counter()
    estimator = npe.train(training_batch_size=200, max_num_epochs=epochs, stop_after_epochs=epochs + 1)
    seconds = time.perf_counter() - started
    drawn = []
    with torch.no_grad():
        for again in (0, 1):
            torch.manual_seed(seed + again)
            started = time.perf_counter()
            drawn.append(estimator.sample((samples,), condition=observed)[:, 0])
            sampling = time.perf_counter() - started
    best = -min(npe.summary["validation_loss"])
    return {"seconds": seconds, "sampling": sampling, "log-prob": best, "samples": drawn}


def apart(first: list[Tensor], second: list[Tensor], seed: int) -> dict[str, float]:
    """C2ST of independent samples, and how far their means and deviations differ, in deviations.

    ``same noise`` is the median distance between the samples that both make of the same noise, in deviations.
    """
    from sbi.utils.metrics import c2st

    own, other, scale = first[0], second[1], first[0].std(0)
    return {
        "C2ST": float(c2st(own, other, seed=seed)),
        "mean": float(((own.mean(0) - other.mean(0)) / scale).abs().max()),
        "deviation": float((other.std(0) / scale - 1).abs().max()),
        "same noise": float(((first[0] - second[0]) / scale).abs().median()),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    random = torch.Generator().manual_seed(seed)
    count, epochs, samples, timed, repeats = (400, 2, 200, 1, 2) if quick else (5000, 30, 4000, 3, 3)
    theta = 6 * torch.rand(count, 5, generator=random) - 3
    x = simulate(theta, random)
    observed = simulate(torch.tensor([[0.7, -2.9, -1.0, -0.9, 0.6]]), random)
    found: dict[str, Any] = {}
    for name, model in ESTIMATORS.items():

        def trained(side: str, seed: int, epochs: int, model: str = model) -> dict[str, Any]:
            with iin_fast.patch("nflows", "zuko") if side == "patched" else nullcontext():
                return train(model, theta, x, observed, out / "logs", epochs=epochs, samples=samples, seed=seed)

        own, fast, other = (
            trained("own", seed, epochs),
            trained("patched", seed, epochs),
            trained("own", seed + 1, epochs),
        )
        runs: dict[str, list[dict[str, Any]]] = {"own": [], "patched": []}
        for repeat in range(repeats):
            for side in runs:
                runs[side].append(trained(side, seed + repeat, timed))
        found[name] = {
            **{
                what: {side: spread([run[what] for run in many]) for side, many in runs.items()}
                for what in ("seconds", "sampling")
            },
            "log-prob": {"own": own["log-prob"], "patched": fast["log-prob"]},
            "own against patched": apart(own["samples"], fast["samples"], seed),
            "own against another seed": apart(own["samples"], other["samples"], seed),
        }
    results = {
        "machine": collect(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("sbi", "nflows", "zuko")},
        "simulations": count,
        "epochs": epochs,
        "timed epochs": timed,
        "repeats": repeats,
        "estimators": found,
    }
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    given = arguments("sbi", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
