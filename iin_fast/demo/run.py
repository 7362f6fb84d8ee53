"""The demo from start to end: what is done in which order, and what it leaves in the output folder."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Plan", "run_demo"]


@dataclass(frozen=True)
class Plan:
    """How much is done: steps of each training, the size of the IIN, and timed repeats.

    The defaults take about five minutes on two cores; ``Plan.quick()`` walks the same way in a few seconds.
    """

    judge_steps: int = 800
    vae_steps: int = 2400
    iin_steps: int = 1500
    unsupervised_steps: int = 500
    n_flows: int = 8
    hidden_dim: int = 256
    hidden_depth: int = 2
    dims_pairs: int = 4000
    throughput_repeats: int = 15

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
    plan = Plan.quick() if quick else Plan()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the weights; everything else is drawn from generators of its own
        return _run(out, plan, seed)


def _run(out: Path, plan: Plan, seed: int) -> dict:
    import iin_fast

    from . import pictures, report
    from .data import load_digits
    from .evaluate import (
        HeldOut,
        MeanShift,
        iin_swap,
        invertibility_error,
        likelihoods,
        reconstruction_scores,
        score_swaps,
    )
    from .first_stage import VAE, train_vae
    from .judge import Judge, train_judge
    from .second_stage import estimate_dims, train_iin, train_unsupervised
    from .throughput import MEASUREMENTS, PUBLISHED_BATCH, PUBLISHED_SIZE, measure_throughput

    seconds: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    with _progress() as progress:
        note = progress.console.print

        with _stage(progress, "Judge", plan.judge_steps, seconds, losses) as step:
            train, test = load_digits(seed)
            note(f"Data: {len(train)} digits to train on, {len(test)} held out, colored at random")
            judge = Judge()
            for loss in train_judge(judge, train, steps=plan.judge_steps, seed=seed + 1):
                step(loss)
        with _stage(progress, "VAE", plan.vae_steps, seconds, losses) as step:
            vae = VAE()
            for loss in train_vae(vae, train, steps=plan.vae_steps, seed=seed + 2):
                step(loss)
        held_out = HeldOut.of(vae, test, seed=seed + 3)

        dims = estimate_dims(vae, train, seed=seed + 4, n_pairs=plan.dims_pairs)
        note("Factor dimensions, estimated: " + ", ".join(f"{name} {size}" for name, size in dims.items()))
        named = {name: size for name, size in dims.items() if name != "residual"}
        size = {"n_flows": plan.n_flows, "hidden_dim": plan.hidden_dim, "hidden_depth": plan.hidden_depth}

        iin = iin_fast.IIN(vae.dim, factors=named, **size)
        with _stage(progress, "IIN", plan.iin_steps, seconds, losses) as step:
            for loss in train_iin(iin, vae, train, steps=plan.iin_steps, seed=seed + 5):
                step(loss)
        unsupervised = iin_fast.IIN(vae.dim, **size)
        with _stage(progress, "Unsupervised IIN", plan.unsupervised_steps, seconds, losses) as step:
            for loss in train_unsupervised(unsupervised, vae, train, steps=plan.unsupervised_steps, seed=seed + 6):
                step(loss)

        with _stage(progress, "Judging and drawing", 7, seconds) as step:
            swap = iin_swap(iin, held_out)
            scores = score_swaps(swap, held_out, vae, judge, seed=seed + 7)
            step()
            baseline = MeanShift(HeldOut.of(vae, train, seed=seed + 8)).on(held_out)
            baseline_scores = score_swaps(baseline, held_out, vae, judge, seed=seed + 7)
            step()
            metrics = {
                **reconstruction_scores(held_out, vae, judge),
                **scores,
                **{f"baseline_{name}": value for name, value in baseline_scores.items()},
                "factor_dims": dims,
                **likelihoods(iin, unsupervised, vae, held_out, seed=seed + 9),
                "invertibility_error": invertibility_error(iin, held_out),
                "seed": seed,
            }
            _write_json(out / "metrics.json", metrics)
            for factor in named:
                pictures.draw_swap(out / f"swap_{factor}.png", factor, swap, held_out, vae)
                step()
            pictures.draw_interpolation(out / "interpolation.png", iin, held_out, vae)
            step()
            pictures.draw_samples(out / "samples.png", unsupervised, vae, seed=seed + 10)
            step()
            units = {"VAE": "nats per image", "Judge": "nats per image", "IIN": "nats per pair"}
            pictures.draw_loss(out / "loss.png", losses, {name: units.get(name, "nats per z") for name in losses})
            iin.save(out / "iin")
            torch.save(vae.state_dict(), out / "vae.pt")
            step()

        with _stage(progress, "Throughput", len(MEASUREMENTS), seconds) as step:
            throughput: dict = {"size": PUBLISHED_SIZE, "batch": PUBLISHED_BATCH, **_environment()}
            for name, result in measure_throughput(repeats=plan.throughput_repeats):
                throughput[name] = result
                step()

        run = {"seconds": {**seconds, "total": sum(seconds.values())}, "plan": asdict(plan), **_environment()}
        _write_json(out / "throughput.json", throughput)
        _write_json(out / "run.json", run)
        report.write(out / "report.html", metrics, throughput, run)
    _summarize(out, metrics, throughput, run)
    return metrics


def _environment() -> dict[str, str | int]:
    """What the numbers were taken on."""
    import iin_fast

    return {
        "iin_fast": getattr(iin_fast, "__version__", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _require_extras() -> None:
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
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


def _progress() -> Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description:<20}"),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[note]}"),
    )


@contextmanager
def _stage(
    progress: Progress, name: str, steps: int, seconds: dict[str, float], losses: dict[str, list[float]] | None = None
) -> Iterator[Callable[..., None]]:
    """A bar of ``steps`` steps; what it yields is called after each, with the loss if there is one.

    Notes in ``seconds`` how long the stage took and in ``losses`` the loss of every step.
    """
    task = progress.add_task(name, total=steps, note="")
    history = losses.setdefault(name, []) if losses is not None else []

    def step(loss: float | None = None) -> None:
        if loss is not None:
            history.append(loss)
        progress.update(task, advance=1, note="" if loss is None else f"loss {loss:.2f}")

    start = time.perf_counter()
    yield step
    seconds[name] = time.perf_counter() - start


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
        "color swap: distance to the donor's color": ("swap_color_error", "reconstruction_color_error"),
    }
    for text, (key, floor) in rows.items():
        table.add_row(text, *(f"{metrics[name]:.3f}" for name in (key, f"baseline_{key}", floor)))
    console = Console()
    console.print(table)
    console.print(f"The judge reads {metrics['judge_accuracy']:.1%} of the original held-out images right.")
    from .throughput import MEASUREMENTS

    for name in MEASUREMENTS:
        ours, eager = throughput[name]["iin_fast"]["median_ms"], throughput[name]["published_eager"]["median_ms"]
        console.print(
            f"{name.replace('_', ' ')}: {ours:.1f} ms, published composition {eager:.1f} ms, "
            f"{throughput[name]['speedup']:.1f}x (batch {throughput['batch']}, {throughput['size']})"
        )
    console.print(f"Everything took {run['seconds']['total'] / 60:.1f} min. Open {out / 'report.html'}")
