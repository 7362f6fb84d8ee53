"""Where a training stands, on disk: each checkpoint is a folder of its own, which appears whole or not at all.

``state/step-000001000`` holds what ``IIN.save`` writes (so ``IIN.load`` opens it), ``training.safetensors`` (moments of
the optimizer, random state, running sums) and ``training.json`` (step, position of the sampler). It is written under
another name, every file and folder flushed to the disk, and then renamed. Only then does the model in the run folder
follow, and the older checkpoint go. Where the best model is to be kept, it lies in ``best`` inside the checkpoint, and is
the one in the run folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import checksum, parse_json, read_json, read_tensors, serialize, sync_folder, write_file
from ..iin import IIN, checkpoint

__all__ = ["Progress", "latest", "load", "publish", "save", "tidy"]

FORMAT = "iin_fast.training"
VERSION = 1


@dataclass
class Progress:
    """Where a training stands beside its model."""

    step: int  # steps done
    optimizer: dict[str, dict[str, Tensor]]  # parameter name to moments
    sums: Tensor  # [processes, 3] float64: loss, nats per dimension and steps since the last line of the log
    random: dict[str, Tensor]  # generator to its state
    sampler: dict[str, Any]  # position
    best: dict[str, Tensor] | None = None  # parameters of the lowest held-out loss, where they are to be kept
    best_loss: float = math.inf
    lowest_loss: float = math.inf  # on held-out pairs
    stale: int = 0  # evaluations since the last one with a lower loss or a better model
    swaps: dict[str, Tensor] = field(default_factory=dict)  # of the first and the best model, where swaps are judged


def save(run: Path, model: IIN, progress: Progress) -> Path:
    """Write a checkpoint, and the model into the run folder; the one before goes when this one is safe.

    Raises:
        ValueError: NaN or Inf in a parameter or a moment; nothing is changed then.
        OSError: the folder can't be written.
    """
    name = f"step-{progress.step:09d}"
    folder = run / "state"
    temporary = folder / f".{name}.{uuid.uuid4().hex}"
    tensors = {f"optimizer/{key}/{k}": v for key, moments in progress.optimizer.items() for k, v in moments.items()}
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} has NaN or Inf")
    tensors |= {f"random/{key}": state for key, state in progress.random.items()}
    tensors |= {f"swaps/{key}": outcomes for key, outcomes in progress.swaps.items()}
    tensors["sums"] = progress.sums
    record = {"format": FORMAT, "version": VERSION, "step": progress.step, "sampler": progress.sampler}
    if progress.best is not None:
        record["best_loss"] = progress.best_loss
    if math.isfinite(progress.lowest_loss):
        record |= {"lowest_loss": progress.lowest_loss, "stale": progress.stale}
    text = json.dumps(record, indent=2) + "\n"
    header = {"training": text, "crc32": checksum(tensors)}
    try:
        temporary.mkdir(parents=True)
        model.save(temporary)
        if progress.best is not None:
            checkpoint.save(temporary / "best", progress.best, model.config)
        write_file(temporary / "training.safetensors", serialize(tensors, header))
        write_file(temporary / "training.json", text.encode())
        os.rename(temporary, folder / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder)
    publish(run, model, progress)
    tidy(run)
    return folder / name


def publish(run: Path, model: IIN, progress: Progress) -> None:
    """Write the model that the run leaves into its folder: the best, where it is kept, or the present one."""
    checkpoint.save(run, model.state_dict() if progress.best is None else progress.best, model.config)


def latest(run: Path) -> Path | None:
    """The last checkpoint in a run folder, if there is one."""
    return max((run / "state").glob("step-*"), default=None)


def tidy(run: Path) -> None:
    """Take away all checkpoints but the last, and what a killed process left half-written."""
    kept = latest(run)
    for folder in [*(run / "state").glob(".step-*"), *(run / "state").glob("step-*")]:
        if folder != kept:
            shutil.rmtree(folder)
    for name in ("model.safetensors", "config.json", "run.json", "split.npz", "metrics.csv"):
        for file in [*run.glob(f".{name}.*"), *(run / "logs").glob(f".{name}.*")]:
            file.unlink()


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[IIN, Progress]:
    """The model and the progress in a checkpoint.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or does not belong to the others.
    """
    model = IIN.load(folder, device=device)
    file, beside = folder / "training.safetensors", folder / "training.json"
    for path in (file, beside):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; the checkpoint is not whole")
    try:
        tensors, header = read_tensors(file)
        record = read_json(beside)
        same = parse_json(header.get("training", "null")) == record
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: damaged checkpoint ({error})") from error
    if not same or record.get("format") != FORMAT or header.get("crc32") != checksum(tensors):
        raise ValueError(f"{folder}: damaged checkpoint, {file.name} is not what was written with {beside.name}")
    if record.get("version") != VERSION:
        raise ValueError(
            f"{folder}: version {record.get('version')!r} of the format, expected {VERSION}; update iin-fast"
        )
    if type(record.get("step")) is not int or "sampler" not in record or "sums" not in tensors:
        raise ValueError(f"{folder}: damaged checkpoint, without its step, sampler or sums")
    optimizer: dict[str, dict[str, Tensor]] = {}
    random: dict[str, Tensor] = {}
    swaps: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, moment = rest.rpartition("/")
            optimizer.setdefault(name, {})[moment] = tensor
        elif kind == "random":
            random[rest] = tensor
        elif kind == "swaps":
            swaps[rest] = tensor
    progress = Progress(record["step"], optimizer, tensors["sums"], random, record["sampler"], swaps=swaps)
    progress.lowest_loss, progress.stale = record.get("lowest_loss", math.inf), record.get("stale", 0)
    if "best_loss" in record:
        progress.best, progress.best_loss = checkpoint.load(folder / "best")[0], record["best_loss"]
        checkpoint.check(folder / "best", progress.best, model.state_dict())
    return model, progress


def moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The state of an optimizer, by the names of the parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items()}


def set_moments(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """The inverse of :func:`moments`.

    Raises:
        ValueError: moments of other parameters.
    """
    expected = {name for name, _ in model.named_parameters()}
    if set(moments) - expected or (moments and expected - set(moments)):
        raise ValueError(f"train: the checkpoint has moments of {sorted(moments)}, expected {sorted(expected)}")
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {i: dict(moments[names[id(p)]]) for i, p in enumerate(order) if names[id(p)] in moments}
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
