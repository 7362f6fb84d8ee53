"""What the examples share: training an IIN on labelled latents, and the files they write."""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

import iin_fast


def fit(
    z: Tensor,  # [n, dim]
    labels: Mapping[str, ArrayLike],  # concept to [n]
    sizes: Mapping[str, int],
    *,
    steps: int,
    batch: int = 128,
    rho: float = 0.97,
    lr: float = 2e-3,
    noise: float = 0.0,
    n_flows: int = 8,
    hidden_dim: int = 256,
    seed: int = 0,
) -> iin_fast.IIN:
    """An IIN trained with the factor loss on pairs that share one concept.

    ``noise`` is the deviation of what is added to every latent: with few latents it keeps the flow from learning them by
    heart.
    """
    random = torch.Generator().manual_seed(seed)
    model = iin_fast.IIN(z.shape[1], sizes, n_flows, hidden_dim, generator=random)
    sampler = iin_fast.PairSampler(labels, seed=seed, others="any")
    loss_of = iin_fast.FactorLoss(rho)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.9), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model(z[:1024])  # ActNorm starts from data
    for _ in range(steps):
        pairs = sampler.sample(batch)
        za, zb = z[pairs.a], z[pairs.b]
        if noise:
            za = za + noise * torch.randn(za.shape, generator=random)
            zb = zb + noise * torch.randn(zb.shape, generator=random)
        loss = loss_of(model, za, zb, pairs.shared)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def arguments(name: str, description: str) -> argparse.Namespace:
    """--out, --quick and --seed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder for results and pictures")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that only shows that everything works")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_results(out: Path, results: Mapping[str, Any], started: float) -> None:
    """``results.json`` in the folder ``out``, with what it was measured on."""
    out.mkdir(parents=True, exist_ok=True)
    made_by = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "iin_fast": iin_fast.__version__,
    }
    text = json.dumps({**results, "run": made_by}, indent=1)
    (out / "results.json").write_text(text + "\n")
    print(text)
