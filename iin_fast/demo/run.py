"""The demo from start to end: what is done in which order, and what it leaves in the output folder."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import iin_fast
from iin_fast.info import collect

from . import pictures
from .data import FACTORS, Digits, load_digits
from .evaluate import (
    HeldOut,
    MeanShift,
    Swap,
    iin_swap,
    invertibility_error,
    likelihoods,
    reconstruction_scores,
    score_swaps,
)
from .first_stage import VAE, train_vae
from .judge import Judge, train_judge
from .report import write_report
from .second_stage import estimate_dims, train_iin, train_unsupervised
from .throughput import MEASUREMENTS, PUBLISHED_BATCH, PUBLISHED_SIZE, measure_throughput

__all__ = ["Plan", "run_demo"]

# What is drawn at random, each from a generator of its own.
DRAWS = ("judge", "vae", "dims", "iin", "unsupervised", "held_out", "swaps", "baseline", "likelihoods", "samples")


@dataclass(frozen=True)
class Plan:
    """How much is done: steps of each training, the size of the IIN, and timed repeats.

    The defaults take about five minutes on two cores; ``Plan.quick()`` walks the same way in a few seconds.
    """

    judge_steps: int = 800
    vae_steps: int = 2800
    iin_steps: int = 2000
    unsupervised_steps: int = 800
    n_flows: int = 8
    hidden_dim: int = 256
    hidden_depth: int = 2
    dims_pairs: int = 4000
    swap_rounds: int = 4
    throughput_repeats: int = 20

    @classmethod
    def quick(cls) -> Plan:
        """A plan that proves that everything runs, not that it works."""
        return cls(
            judge_steps=40,
            vae_steps=40,
            iin_steps=20,
            unsupervised_steps=10,
            n_flows=2,
            hidden_dim=64,
            dims_pairs=400,
            swap_rounds=1,
            throughput_repeats=2,
        )


def run_demo(out: Path, *, seed: int = 0, quick: bool = False) -> dict:
    """Trains first stages and IINs on colored digits, swaps factors of held-out images, and writes what came out.

    Writes into ``out``: ``swap_digit.png``, ``swap_color.png``, ``interpolation.png``, ``samples.png``, ``loss.png``,
    ``metrics.json`` (the same for the same seed on one machine), ``throughput.json`` and ``run.json`` (times, versions,
    machine), ``iin`` and ``vae.pt`` (the trained models), and ``report.html``, which shows all of it.

    Args:
        out: folder for the results; made if it isn't there.
        seed: of every draw and every weight.
        quick: a few steps of everything, in seconds; the results then say nothing.

    Returns:
        the metrics, as in ``metrics.json``

    Raises:
        ImportError: scikit-learn, matplotlib or rich is missing.
        OSError: ``out`` can't be written.
    """
    _require_extras()
    out = _writable_folder(out)
    if not 0 <= seed < 2**32:
        raise ValueError(f"run_demo: seed is {seed}, expected 0 to 2**32 - 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the weights; everything else is drawn from generators of its own
        return _run(out, Plan.quick() if quick else Plan(), seed)


def _run(out: Path, plan: Plan, seed: int) -> dict:
    seeds = dict(zip(DRAWS, np.random.SeedSequence(seed).generate_state(len(DRAWS)).tolist(), strict=True))
    with _Bars() as bars:
        work = _train(bars, plan, seed, seeds)
        with bars.stage("Judging", 3) as step:
            metrics = {**_judge(work, plan, seeds, step), "seed": seed}
            _write_json(out / "metrics.json", metrics)
            work.iin.save(out / "iin")
            torch.save(work.vae.state_dict(), out / "vae.pt")
        with bars.stage("Drawing", 5) as step:
            _draw(out, work, bars.losses, seeds, step)
        with bars.stage("Throughput", len(MEASUREMENTS)) as step:
            throughput: dict = {"size": PUBLISHED_SIZE, "batch": PUBLISHED_BATCH, "environment": collect()}
            for name, result in measure_throughput(repeats=plan.throughput_repeats):
                throughput[name] = result
                step()
            _write_json(out / "throughput.json", throughput)
    seconds = {**bars.seconds, "total": sum(bars.seconds.values())}
    run = {"seconds": seconds, "plan": asdict(plan), "environment": collect()}
    _write_json(out / "run.json", run)
    write_report(out / "report.html", metrics, throughput, run)
    _summarize(out, metrics, throughput, run)
    return metrics


@dataclass(frozen=True)
class _Work:
    """What the trainings leave behind."""

    train: Digits
    held_out: HeldOut
    judge: Judge
    vae: VAE
    iin: iin_fast.IIN
    unsupervised: iin_fast.IIN


def _train(bars: _Bars, plan: Plan, seed: int, seeds: dict[str, int]) -> _Work:
    """Trains the judge and the VAE, estimates the factor dimensions, and trains both IINs."""
    with bars.stage("Judge", plan.judge_steps) as step:
        train, test = load_digits(seed)
        bars.note(f"Data: {len(train)} digits to train on, {len(test)} held out, colored at random")
        judge = Judge()
        for loss in train_judge(judge, train, steps=plan.judge_steps, seed=seeds["judge"]):
            step(loss)
    with bars.stage("VAE", plan.vae_steps) as step:
        vae = VAE()
        for loss in train_vae(vae, train, steps=plan.vae_steps, seed=seeds["vae"]):
            step(loss)

    dims = estimate_dims(vae, train, seed=seeds["dims"], n_pairs=plan.dims_pairs)
    bars.note("Factor dimensions, estimated: " + ", ".join(f"{name} {size}" for name, size in dims.items()))
    named = {name: dims[name] for name in FACTORS}
    size = plan.n_flows, plan.hidden_dim, plan.hidden_depth

    with bars.stage("IIN", plan.iin_steps) as step:
        iin = iin_fast.IIN(vae.dim, named, *size)
        for loss in train_iin(iin, vae, train, steps=plan.iin_steps, seed=seeds["iin"]):
            step(loss)
    with bars.stage("Unsupervised IIN", plan.unsupervised_steps) as step:
        unsupervised = iin_fast.IIN(vae.dim, None, *size)
        for loss in train_unsupervised(
            unsupervised, vae, train, steps=plan.unsupervised_steps, seed=seeds["unsupervised"]
        ):
            step(loss)
    return _Work(train, HeldOut.of(vae, test, seed=seeds["held_out"]), judge, vae, iin, unsupervised)


def _judge(work: _Work, plan: Plan, seeds: dict[str, int], step: Callable[[], None]) -> dict:
    """All numbers about held-out images."""
    data, vae, judge = work.held_out, work.vae, work.judge

    def scores(swap: Swap) -> dict[str, float]:
        return score_swaps(swap, data, vae, judge, seed=seeds["swaps"], rounds=plan.swap_rounds)

    iin_scores = scores(iin_swap(work.iin, data))
    step()
    baseline = MeanShift(HeldOut.of(vae, work.train, seed=seeds["baseline"])).on(data)
    baseline_scores = scores(baseline)
    step()
    metrics = {
        **reconstruction_scores(data, vae, judge),
        **iin_scores,
        **{f"baseline_{name}": value for name, value in baseline_scores.items()},
        "factor_dims": work.iin.sizes,
        **likelihoods(work.iin, work.unsupervised, vae, data, seed=seeds["likelihoods"]),
        "invertibility_error": invertibility_error(work.iin, data),
    }
    step()
    return metrics


def _draw(
    out: Path, work: _Work, losses: dict[str, list[float]], seeds: dict[str, int], step: Callable[[], None]
) -> None:
    """All pictures of held-out images, and of the losses."""
    swap = iin_swap(work.iin, work.held_out)
    for factor in FACTORS:
        pictures.draw_swap(out / f"swap_{factor}.png", factor, swap, work.held_out, work.vae)
        step()
    pictures.draw_interpolation(out / "interpolation.png", work.iin, work.held_out, work.vae)
    step()
    pictures.draw_samples(out / "samples.png", work.unsupervised, work.vae, seed=seeds["samples"])
    step()
    units = {"Judge": "image", "VAE": "image", "IIN": "pair", "Unsupervised IIN": "z"}
    pictures.draw_loss(out / "loss.png", losses, {name: f"nats per {unit}" for name, unit in units.items()})
    step()


def _require_extras() -> None:
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich", "safetensors": "safetensors"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'iin-fast[demo]'")


def _writable_folder(out: Path) -> Path:
    """Makes the folder and tries to write into it, so that a run doesn't fail after its training."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise type(error)(
            f"run_demo: out is {str(out)!r}, which can't be written as a folder ({cause}); name another folder"
        ) from error
    return out


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


class _Bars:
    """Progress bars, one for each stage; keeps how long each took and the losses of those that have one."""

    def __init__(self) -> None:
        from rich import progress

        self._progress = progress.Progress(
            progress.TextColumn("{task.description:<16}"),
            progress.BarColumn(bar_width=30),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[loss]}"),
        )
        self.note = self._progress.console.print
        self.seconds: dict[str, float] = {}
        self.losses: dict[str, list[float]] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Callable[..., None]]:
        """A bar of ``steps`` steps; what it yields is called after each of them, with the loss if there is one."""
        task = self._progress.add_task(name, total=steps, loss="")

        def step(loss: float | None = None) -> None:
            if loss is not None:
                self.losses.setdefault(name, []).append(loss)
            self._progress.update(task, advance=1, loss="" if loss is None else f"loss {loss:.2f}")

        start = time.perf_counter()
        yield step
        self.seconds[name] = time.perf_counter() - start
        if not self._progress.console.is_terminal:  # there, bars aren't drawn before the end
            self.note(f"{name}: {self.seconds[name]:.0f} s")


def _summarize(out: Path, metrics: dict, throughput: dict, run: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Swaps between held-out images", title_justify="left")
    table.add_column("")
    for column in ("IIN", "class-mean shift", "no swap"):
        table.add_column(column, justify="right")
    rows = {
        "digit swap: reads as the donor's digit": ("swap_digit_accuracy", "reconstruction_accuracy"),
        "digit swap: change of color": ("swap_digit_color_error", "reconstruction_color_error"),
        "color swap: digit kept": ("swap_color_accuracy", "reconstruction_accuracy"),
        "color swap: distance to the donor": ("swap_color_error", "reconstruction_color_error"),
    }
    for text, (key, floor) in rows.items():
        table.add_row(text, *(f"{metrics[name]:.3f}" for name in (key, f"baseline_{key}", floor)))
    console = Console()
    console.print(table)
    console.print(f"The judge reads {metrics['judge_accuracy']:.1%} of the original held-out images right.")
    size = ", ".join(f"{name} {value}" for name, value in throughput["size"].items())
    console.print(f"Speed at {size}, batch {throughput['batch']}:")
    for name in MEASUREMENTS:
        ours, eager = throughput[name]["iin_fast"]["median_ms"], throughput[name]["published_eager"]["median_ms"]
        console.print(
            f"  {name.replace('_', ' ')}: {ours:.1f} ms, published composition {eager:.1f} ms, "
            f"{throughput[name]['speedup']:.1f}x"
        )
    console.print(f"Everything took {run['seconds']['total'] / 60:.1f} min. Open {out / 'report.html'}")
