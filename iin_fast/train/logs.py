"""What a training says while it runs: a table, TensorBoard events, a progress bar."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import read_json, write_file

__all__ = ["COLUMNS", "Bar", "Log", "early_end", "event_writer", "held_out_rise", "loss_rise", "output"]

EVERY = 20.0  # seconds between two lines of a bar that is no bar
COLUMNS = (
    *("step", "loss", "nats_per_dim", "learning_rate", "samples_per_second"),
    *("held_out_loss", "held_out_nats_per_dim", "held_out_swaps"),
)


def event_writer() -> Any:
    """TensorBoard's writer.

    Raises:
        ImportError: tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("train needs tensorboard: pip install 'iin-fast[train]'") from error
    return SummaryWriter


class Log:
    """``logs/metrics.csv`` and TensorBoard events in a run folder, from ``step`` on: what came after it is taken away.

    ``loggers`` get the same numbers; they are those of Lightning Fabric, or have its ``log_metrics`` and ``finalize``.
    """

    def __init__(self, run: Path, step: int, loggers: Sequence[Any] = ()) -> None:
        self._loggers = loggers
        folder = run / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "metrics.csv"
        write_file(file, _until(file, step).encode())
        self._stream = open(file, "a", newline="", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._writer = csv.DictWriter(self._stream, COLUMNS, lineterminator="\n")
        self._events: Any = event_writer()(str(folder), purge_step=step + 1 if step else None)  # type: ignore[no-untyped-call]

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line; what is not among ``values`` stays blank."""
        forms = {
            name: f"{value:.6g}" if name == "samples_per_second" else f"{value:.10g}" for name, value in values.items()
        }
        self._writer.writerow({"step": step, **forms})
        self._stream.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        for logger in self._loggers:
            logger.log_metrics(values, step=step)

    def sync(self) -> None:
        """All lines reach the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._events.flush()

    def close(self, ended: bool = True) -> None:
        self._stream.close()
        self._events.close()
        for logger in self._loggers:
            logger.finalize("success" if ended else "failed")


def output() -> Any:
    """Where a training prints."""
    try:
        from .._output import Output
    except ImportError as error:
        raise ImportError("the progress bar needs rich: pip install 'iin-fast[cli]'") from error
    return Output()


class Bar:
    """A progress bar with the time left, or outside of a terminal a line every 20 seconds; neither where ``show`` is False."""

    def __init__(self, steps: int, done: int, show: bool, name: str = "training") -> None:
        self._bar: Any = None
        self._held_out = ""
        if not show:
            return
        console = output()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(12), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self._bar = Progress(f"{name:<11}", *columns, console=console)
        self._task = self._bar.add_task(name, total=steps, completed=done, text="")
        self._said = time.monotonic()

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, text: str | None = None) -> None:
        """``done`` steps are; ``text`` is shown until another is given."""
        if self._bar is None:
            return
        self._bar.update(self._task, completed=done, **({} if text is None else {"text": text}))
        if not self._bar.console.is_terminal and time.monotonic() - self._said > EVERY:
            self._said, task = time.monotonic(), self._bar.tasks[0]
            left = "" if task.time_remaining is None else f", {task.time_remaining:.0f} s left"
            self._bar.console.print(f"{task.description}: {done} of {task.total:.0f}{left}  {task.fields['text']}")

    def tell(self, done: int, values: dict[str, float]) -> None:
        """What a training's log says after ``done`` steps."""
        if "held_out_loss" in values:
            self._held_out = f", held out {values['held_out_loss']:.2f}"
        self.step(done, f"loss {values['loss']:.2f}{self._held_out}")


def held_out_rise(run: str | os.PathLike[str]) -> str:
    """A line of advice where the held-out loss of the training in ``run`` ended well above its lowest value, or ``""``.

    Well above: by more than 0.05 nats per dimension of either latent of a pair. The flow then overfits its latents. Where
    the model with the best swaps is kept, that does no harm, and there is nothing to say.
    """
    record, lines = _written(run)
    evaluations = [(float(line["held_out_loss"]), int(line["step"])) for line in lines if line["held_out_loss"]]
    settings = record.get("settings", {})
    if (
        settings.get("keep") == "swaps"
        or not evaluations
        or not evaluations[-1][0] > min(evaluations)[0] + 0.05 * 2 * record.get("dim", math.inf)
    ):
        return ""
    lowest, step = min(evaluations)
    kept = "kept" if settings.get("keep") == "best" else "not kept (keep best does that)"
    return (
        f"the held-out loss rose from {lowest:.2f} nats per pair at step {step} to {evaluations[-1][0]:.2f} at step {evaluations[-1][1]}: "
        f"the flow overfits its latents. More noise (now {settings.get('noise', 0):g}), fewer steps or a smaller network help; "
        f"the model of step {step} was {kept}"
    )


def loss_rise(run: str | os.PathLike[str]) -> str:
    """A line of advice where the loss of the training in ``run`` ended above its start by 1 nat per dimension of either latent, or ``""``."""
    record, lines = _written(run)
    losses = [float(line["loss"]) for line in lines if line["loss"]]
    if not losses or not losses[-1] > losses[0] + 2 * record.get("dim", math.inf):
        return ""
    rate = record.get("settings", {}).get("learning_rate", 0)
    return (
        f"the loss rose from {losses[0]:.4g} to {losses[-1]:.4g} nats per pair: the learning rate (now {rate:.3g}) is too large, or "
        "the latents have outliers"
    )


def early_end(run: str | os.PathLike[str]) -> str:
    """A line that says where the training in ``run`` ended before its last step, for want of a gain, or ``""``."""
    record, lines = _written(run)
    done = max((int(line["step"]) for line in lines), default=0)
    patience = record.get("settings", {}).get("patience")
    if not patience or done >= record.get("steps", 0):
        return ""
    return (
        f"ended at step {done} of {record['steps']}: {patience} evaluations at held-out latents in a row found no better model "
        f"(--patience 0 goes on to the end)"
    )


def _written(run: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """What a training wrote of itself, and the lines of its log; nothing where one of them is missing."""
    file, made = Path(run) / "logs" / "metrics.csv", Path(run) / "run.json"
    if not file.is_file() or not made.is_file():
        return {}, []
    with open(file, newline="", encoding="utf-8") as stream:
        return read_json(made), list(csv.DictReader(stream))


def _until(file: Path, step: int) -> str:
    """The header and the lines up to ``step``; a last line that a killed process left half-written goes too."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    if step and file.is_file():
        with open(file, newline="", encoding="utf-8") as stream:
            for line in csv.reader(stream):
                if len(line) == len(COLUMNS) and line[0].isdigit() and int(line[0]) <= step:
                    writer.writerow(line)
    return text.getvalue()
