"""Hours of use in one process: python -m tests.faults.soak --minutes 60 (make soak).

Trainings, steps of a flow, evaluations, saves and loads, refusals, again and again. Resident memory must stay within a percent of what it
was after the first tenth, and the median round of the last tenth as fast as that of the first.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

from iin_fast import IIN, FactorLoss
from iin_fast.data import Latents, load_latents, save_arrays
from iin_fast.nn import NeuralSplineFlow
from iin_fast.train import Settings, run_folder, train


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, z: torch.Tensor) -> None:
    for part in z.split(50):
        loss = -model.log_prob(part).mean()  # type: ignore[operator, union-attr]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300, 1), generator=generator)
    z = torch.randn(300, 6, generator=generator) + labels
    models = [IIN(6, {"digit": 2}, n_flows=2, hidden_dim=32), NeuralSplineFlow(6, n_flows=2, hidden_dim=32)]
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-4) for model in models]
    settings = Settings({"digit": 2}, preset="paper", steps=10, n_flows=2, hidden_dim=16, batch=16, save_every=5)
    memory: list[float] = []
    seconds: list[float] = []
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = save_arrays(folder / "z.npz", {"z": z, "labels": labels})
        (folder / "bad.npz").write_bytes(file.read_bytes()[:500])
        while time.monotonic() < end or len(seconds) < 20:
            begin = time.process_time()
            for model, optimizer in zip(models, optimizers, strict=True):
                for _ in range(5):
                    steps(model, optimizer, z)
            FactorLoss(0.9)(models[0], z[:100], z[100:200], torch.ones(100, 1, dtype=torch.bool)).mean().backward()
            models[0].save(folder / "model")  # type: ignore[operator]
            IIN.load(folder / "model").sample(100)
            try:
                load_latents(folder / "bad.npz")
                raise AssertionError("a damaged file was read")
            except ValueError:
                pass
            if len(seconds) % 10 == 0:
                train(Latents.of(z, labels, ["digit"]), folder / f"run-{len(seconds)}", settings, accelerator="cpu")
                run_folder.evaluate(folder / f"run-{len(seconds)}", save_arrays(folder / "y.npz", {"z": z + 0.1}))
            else:  # rounds that are compared do the same work
                seconds.append(time.process_time() - begin)
                gc.collect()
                memory.append(resident())
                continue
            seconds.append(seconds[-1] if seconds else time.process_time() - begin)
            memory.append(resident())
    tenth = max(2, len(seconds) // 10)
    grown = statistics.median(memory[-tenth:]) / statistics.median(memory[tenth : 2 * tenth]) - 1
    slower = statistics.median(seconds[-tenth:]) / statistics.median(seconds[tenth : 2 * tenth]) - 1
    shown = ", ".join(f"{value:.0f}" for value in memory[:: max(1, len(memory) // 20)])
    print(f"soak: MiB over time: {shown}")
    print(
        f"soak: {len(seconds)} rounds in {given.minutes:g} minutes; {memory[-1]:.0f} MiB resident, {grown:+.2%} since the first "
        f"tenth; a round takes the processor {statistics.median(seconds):.3f} s, {slower:+.1%}"
    )
    if grown > 0.01:
        raise SystemExit("soak: memory grew by more than 1 %")
    if slower > 0.2:
        raise SystemExit("soak: rounds became slower by more than a fifth")


if __name__ == "__main__":
    main()
