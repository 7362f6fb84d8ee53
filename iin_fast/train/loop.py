"""The training loop, on Lightning Fabric: one process or many, the same batches, the same run folder."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import shutil
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import MISSING, Latents, class_context
from ..data.rows import training_rows
from ..files import npz_bytes, read_json, safetensors_library, write_file
from ..iin import IIN, FactorLoss, Factors, Inputs, LinearIIN, checkpoint
from ..iin.factors import RESIDUAL
from ..iin.inputs import copied_features, usual_values
from ..iin.linear import leading_directions, white_inputs
from . import state
from .batches import Batch, Batches, estimate_sizes, fit_linear, split_rows, units
from .findings import outlier_line
from .judge import SwapJudge
from .lock import lock
from .logs import Bar, Log, event_writer, held_out_rise, loss_rise, output
from .numerics import first_not_finite, not_finite_part
from .run_folder import read_like, recorded
from .settings import PAPER, PATIENT, Facts, Settings
from .summary import summary

__all__ = ["train"]

HELD_OUT_PAIRS = 1024
# What the loss may rise by, in nats per dimension of either latent, if that doubles it; and over how many steps its median is taken.
MOST_RISE, RECENT_STEPS = 10.0, 10
MOST_GAIN = 30.0  # of whitening, times which noise is let through
REDRAW_EVERY = 5  # evaluations
FOUND = 0.5  # of the swaps that the linear solution misses
CONTRAST_RHO = 0.9  # less than that of the loss: odds less steep


def train(
    latents: Latents | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    epochs: float | None = None,
    rows: int | None = None,
    device: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    progress: bool = False,
    loggers: Sequence[Any] = (),
) -> IIN:
    r"""Trains an IIN on latents, and writes all that comes of it into the folder ``out``.

    With labels or ready pairs the loss is that of :class:`iin_fast.FactorLoss` (normalised, nats per pair); without, and
    for two samples of which no label is known, it is the likelihood of two independent latents:

    .. math:: \ell = -\log p(z^a) - \log p(z^b)

    The folder: ``model.safetensors`` and ``config.json`` (:meth:`iin_fast.IIN.load` opens it), ``run.json`` (settings,
    versions, data), ``logs/metrics.csv`` and TensorBoard events, ``split.npz`` (rows ``train``, ``held_out``), ``state/``
    (what a resume needs). Several processes share the batch: they give the same result up to the rounding of sums.

    Args:
        latents: a file for :func:`iin_fast.data.load_latents`, or :class:`iin_fast.data.Latents`; None with ``resume``: those of
            the run.
        out: the run folder; with several nodes one that all of them see.
        settings: what to train; by default :class:`Settings`' own defaults.
        resume: go on from the last checkpoint in ``out``, with the same latents and the run's own settings; without one, start.
            ``settings`` may give more ``steps``, another ``patience`` and intervals. On one machine, with as many threads and
            processes, the result is that of a run that never stopped, bit for bit.
        force: take away the run that ``out`` holds, and train anew.
        epochs: in place of ``steps``: how many times each row is seen, on average.
        rows: of a file, train on so many rows, drawn at random; by default all, or of a large file (over 1 GiB of .npy, Parquet or
            Arrow) what fills 64 MiB.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, in place of ``accelerator`` and ``devices``.
        accelerator, devices, nodes, strategy: of Lightning Fabric: ``"auto"``, ``"cpu"``, ``"cuda"``, …; devices of each
            node; ``"auto"`` or ``"ddp"``. Under torchrun its environment counts, and ``devices`` and ``nodes`` are left.
        progress: show a progress bar.
        loggers: get the numbers of ``logs/metrics.csv`` too, and the settings: loggers of Lightning Fabric, such as
            ``lightning.pytorch.loggers.MLFlowLogger`` and ``WandbLogger``.

    Returns:
        the trained model, on its device: the one in the run folder.

    Warns:
        UserWarning: latents with outliers, which were not learned as they are; or the loss, or the held-out one, rose in the course
            of the training; see :func:`loss_rise`, :func:`held_out_rise`.

    Raises:
        FileExistsError: ``out`` holds a run, and ``resume`` and ``force`` are False.
        FloatingPointError: the loss, a gradient or a parameter is not finite, with the block and layer where that begins, or
            the loss rose by 10 nats per dimension and more than it was; the last checkpoint stays.
        ImportError: lightning-fabric, tensorboard or safetensors is missing.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP; a checkpoint of the last step is written before.
        RuntimeError: another training is at work in ``out``.
        TypeError, ValueError: latents, settings or a checkpoint that don't fit, factors of no dimensions.

    References:
        Esser, Rombach, Ommer, A Disentangling Invertible Interpretation Network, CVPR 2020, Sec. 3.

    Example:
        >>> import tempfile, torch
        >>> from iin_fast.data import Latents
        >>> from iin_fast.train import Settings, train
        >>> latents = Latents.of(torch.randn(64, 6), {"digit": torch.arange(64) % 4})
        >>> with tempfile.TemporaryDirectory() as run:
        ...     train(latents, run, Settings({"digit": 2}, steps=2, n_flows=1, hidden_dim=8), accelerator="cpu").sizes
        {'digit': 2, 'residual': 4}
    """
    settings = Settings() if settings is None else settings
    if not isinstance(settings, Settings):
        raise TypeError(f"train: settings is a {type(settings).__name__}, expected iin_fast.train.Settings")
    run = Path(out)
    if resume and force:
        raise ValueError("train: resume and force are given, expected one or neither")
    before = _record(run) if resume else {}
    if latents is None:
        latents = before.get("latents", {}).get("path")
        if latents is None:
            raise ValueError(f"train: latents are missing, and {run} holds no run that says which they are")
    if isinstance(latents, Latents):
        data = latents
        if rows is not None and rows != data.n:
            raise ValueError(f"train: rows is {rows} of latents in memory, expected a file of latents with it")
    else:
        drawn = before.get("latents", {}).get("rows")
        if before and rows is not None and rows != (drawn or before.get("n")):
            raise ValueError(
                f"train: rows is {rows}, but the run in {run} has {drawn or before.get('n')}; resume takes the same"
            )
        data = read_like(before, latents, sample=drawn or rows or training_rows(Path(latents)))
    if before and not isinstance(latents, Latents):
        data = data.coded_like(
            before.get("classes", {}), before.get("edges", {}), before.get("names", ()), str(latents)
        )
    given_steps = settings.steps
    settings = _resumed(settings, before, run)
    fingerprint, outliers = data.fingerprint(), ""
    if settings.standardise is not False or settings.start != "random":
        usual, far = usual_values(data.z)
        data, outliers = replace(data, z=usual), outlier_line(far)
    if not before:
        _check_residual(data, settings)
    known, judge = _facts(data, settings)
    if epochs is not None:
        if given_steps is not None:
            raise ValueError(f"train: epochs is {epochs} and steps is {given_steps}, expected one of them")
        if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs < math.inf:
            raise ValueError(f"train: epochs is {epochs!r}, expected a number above 0")
        latents_in_a_step = 2 * (settings.chosen(known).batch or 1)
        steps = max(1, round(epochs * known.rows / latents_in_a_step))
        _check_steps(steps, before, run)
        settings = replace(settings, steps=steps)
    settings = settings.chosen(known)
    _check_folder(run, fingerprint, before, resume, force)  # of several processes, before they wait for each other
    fabric = _fabric(accelerator, devices, nodes, strategy, settings, device)
    with lock(run) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero:
            _check_folder(run, fingerprint, before, resume, force)
        fabric.barrier()
        found = state.latest(run) if resume else None
        fabric.barrier()  # nothing is written before all have looked
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            training = _Training(
                fabric, data, fingerprint, run, settings, found, before, progress, known.hidden, loggers, judge
            )
            training.open_folder(force)
            if progress and fabric.is_global_zero:
                output().out("\n".join([*training.summary(), settings.text(known)]), highlight=False)
            model = training.run()
        fabric.barrier()
    if settings.keep != "last":
        model.load_state_dict(checkpoint.load(run)[0])
    for advice in (outliers, held_out_rise(run), loss_rise(run)) if fabric.is_global_zero else ():
        if advice:
            warnings.warn(f"train: {advice}", stacklevel=2)
    return model


class _Objective(nn.Module):
    """The model with its loss as one module, so that what wraps it sees a scalar."""

    def __init__(self, model: IIN, rho: float, contrast: float = 0.0) -> None:
        super().__init__()
        self.model, self.contrast = model, contrast
        self.loss = FactorLoss(rho, normalized=True)

    def forward(self, za: Tensor, zb: Tensor, shared: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean loss in nats per pair, and nats per dimension of the latents, without gradient.

        ``context`` is that of ``za``, then that of ``zb``.
        """
        factors, logdet = self.model(torch.cat([za, zb]), context)
        a, b = (Factors._wrap(part, self.model.sizes) for part in factors.tensor.chunk(2))
        logdet_a, logdet_b = logdet.chunk(2)
        loss = self.loss.from_factors(a, logdet_a, b, logdet_b, shared).mean()
        if self.contrast:
            loss = loss + self.contrast * contrast(a, b, shared)
        with torch.no_grad():
            square = factors.tensor.double().square().sum(1)
            nll = 0.5 * square - logdet.double() + 0.5 * self.model.dim * math.log(2 * math.pi)
        return loss, nll.mean() / self.model.dim


def contrast(a: Factors, b: Factors, shared: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over concepts, of whether pairs share a concept, as its factor says it.

    The odds are those of the loss: the density of the pair if it shares the concept, over that of two independent samples. The
    likelihood of pairs gains nothing from a factor that begins to hold a concept while the others still hold it too; this does.
    """
    total = a.tensor.new_zeros(())
    for name, share in zip(a, shared.T, strict=False):  # without the residual
        x, y, square = a[name], b[name], 1 - CONTRAST_RHO**2
        common = CONTRAST_RHO * x * y - 0.5 * CONTRAST_RHO**2 * (x.square() + y.square())
        odds = (common / square - 0.5 * math.log(square)).sum(1)
        total = total + nn.functional.binary_cross_entropy_with_logits(odds, share.to(odds.dtype))
    return total


class _Training:
    def __init__(
        self,
        fabric: Any,
        data: Latents,
        fingerprint: str,
        run: Path,
        settings: Any,
        found: Path | None,
        before: dict[str, Any],
        progress: bool,
        hidden: tuple[str, ...] = (),
        loggers: Sequence[Any] = (),
        judge: SwapJudge | None = None,
    ) -> None:
        self.fabric, self.data, self.folder, self.settings, self.show = fabric, data, run, settings, progress
        self.loggers, self.fingerprint = loggers, fingerprint
        self.split = train_rows, held_rows = split_rows(data, settings.held_out, settings.seed)
        self.context: Tensor | None = None  # [n, classes]
        if settings.context is not None:
            where = str(data.path or "train")
            self.context = class_context(where, data.labels, data.names, settings.context)
        concepts = _concepts(data, settings)
        options: dict[str, Any] = {
            "seed": settings.seed,
            "others": settings.others,
            "unlabelled": settings.unlabelled,
        }
        self.batches = Batches(data, units(data, train_rows), concepts, **options)
        self.noise: Tensor | None = None  # [dim], deviation of each feature
        if settings.noise:
            rows = data.z[torch.from_numpy(train_rows)]
            self.noise = rows.double().std(0, correction=0)
            # A copy that is set aside gets the noise of its original: what they differ by would be far from its 0.
            own = torch.arange(data.dim)
            self.noisy = copied_features(rows) if settings.standardise or settings.start != "random" else own
        self.held_out: Batch | None = None
        if len(held_rows):
            held = Batches(data, units(data, held_rows), concepts, **options, lenient=True)
            self.held_out = None if held.empty else held.draw(HELD_OUT_PAIRS, 0)
        if settings.keep != "last" and self.held_out is None:
            raise ValueError(
                f"train: keep is {settings.keep!r}, expected 'last' where there are no held-out pairs to judge by"
            )
        self.judge: SwapJudge | None = None
        if settings.keep == "swaps" and data.labels is not None and fabric.is_global_zero:
            judge = judge or SwapJudge(data, train_rows, held_rows, concepts, seed=settings.seed)
            judge.context = self.context
            self.judge = judge if judge.keepers else None
        self.dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self.z = data.z.to(self.dtype)

        self.narrow: Tensor | None = None  # of the inputs that the model then has
        if found is None:
            model = self._fresh(concepts, train_rows, hidden)
            self.progress = state.Progress(0, {}, torch.zeros(fabric.world_size, 3, dtype=torch.float64), {}, {})
        else:
            model, self.progress = state.load(found)
            self._check_position()
            if settings.steps > before.get("steps", settings.steps):
                self.progress.stale = 0  # what had ended early goes on
        self.model = model
        self.narrow = None if self.noise is None or model.inputs is None else _narrow_directions(model.inputs)
        self.objective = _Objective(model, settings.rho, settings.contrast)
        matrices = [p for name, p in model.named_parameters() if "weight" in name]
        others = [p for name, p in model.named_parameters() if "weight" not in name]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.rate(0),
            betas=(0.9, 0.99) if settings.start == "linear" else (0.5, 0.9),
            fused=True,
        )
        self.wrapped, self.optimizer = fabric.setup(self.objective, optimizer)
        self.sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)
        if found is not None:
            state.set_moments(model, optimizer, self.progress.optimizer)
            sums = self.progress.sums
            own = sums[fabric.global_rank] if len(sums) == fabric.world_size else sums.mean(0)
            self.sums.copy_(own)
            torch.set_rng_state(self.progress.random["torch"])
        self.raw_optimizer = optimizer
        self.first_loss = math.inf  # of the first step of this process
        self.recent: deque[Tensor] = deque(maxlen=RECENT_STEPS)
        self.pairs: list[Tensor] = []  # of this step, and their loss
        self.loss = torch.zeros(())
        self.saved = self.progress.step if found is not None else None

    def open_folder(self, force: bool) -> None:
        """Write what this training is; ``force`` takes a run away that lies there. Nothing is written before all else is known to fit."""
        if not self.fabric.is_global_zero:
            return
        if force:
            _clear(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        state.tidy(self.folder)
        if self.saved is not None:  # a run may have been killed between its last checkpoint and this
            state.publish(self.folder, self.model, self.progress)
        self._write_record()
        for logger in self.loggers:
            with suppress(NotImplementedError):  # Fabric's own CSVLogger has none
                logger.log_hyperparams(asdict(self.settings))

    def summary(self) -> list[str]:
        """What this training is, for a person."""
        fabric, settings = self.fabric, self.settings
        device = f"{fabric.device.type} ({_device_name(fabric.device)}), "
        device += f"{fabric.world_size} processes of {torch.get_num_threads()} threads"
        if fabric.world_size == 1:
            device = device.replace("1 processes of ", "").replace(" 1 threads", " 1 thread")
        given, (trained, held) = settings.factors or {}, map(len, self.split)
        return summary(
            self.data, self.model, given, settings.dims_method, trained, held, device, self.folder, settings.context
        )

    def _fresh(self, concepts: tuple[str, ...], train_rows: np.ndarray[Any, Any], hidden: tuple[str, ...]) -> IIN:
        settings = self.settings
        rows = self.z[torch.from_numpy(train_rows)]
        inputs = Inputs.of(rows) if settings.standardise else None
        sizes = {name: size for name, size in (settings.factors or {}).items() if size and name != RESIDUAL}
        if settings.dims_method != "linear" and len(sizes) < len(concepts):
            learned = self.data if inputs is None else replace(self.data, z=inputs(self.z)[0])
            sizes = estimate_sizes(learned, self.batches, method=settings.dims_method) | sizes
            empty = [name for name in concepts if sizes[name] == 0]
            if empty:
                raise ValueError(
                    f"train: the estimate gives {empty} no dimension ({sizes}); give factors, or take "
                    "dims_method='linear'"
                )
        if hidden and settings.dims_method == "linear":
            sizes = self._hidden_sizes(concepts, train_rows, hidden) | sizes
        sizes = {name: sizes[name] for name in concepts if name in sizes}
        if concepts and (settings.start == "linear" or len(sizes) < len(concepts)):
            linear = self._linear(train_rows, concepts, sizes)
            sizes = {name: linear.sizes[name] for name in concepts}
            if settings.start != "random":
                inputs = linear.start()
        elif settings.start != "random":
            inputs = white_inputs(rows, settings.variance)
        model = self._drawn(sizes if concepts else None, inputs, settings.seed)
        if settings.start == "random":
            self._initialize(model)
        else:
            model.start_as_identity()
        return model

    def _linear(self, train_rows: np.ndarray[Any, Any], concepts: tuple[str, ...], sizes: dict[str, int]) -> LinearIIN:
        data, settings = replace(self.data, z=self.z), self.settings
        return fit_linear(data, train_rows, concepts, sizes, settings.seed, settings.variance)

    def _hidden_sizes(
        self, concepts: tuple[str, ...], train_rows: np.ndarray[Any, Any], hidden: tuple[str, ...]
    ) -> dict[str, int]:
        """Sizes where some concepts lie in no direction: those get one for each class, what the others leave allowing.

        The others are estimated without them. What two concepts decide together would count as a part of both.
        """
        data, visible = self.data, tuple(name for name in concepts if name not in hidden)
        found = self._linear(train_rows, visible, {}).sizes if visible else {}
        sizes = {name: found[name] for name in visible}
        room = Inputs.of(self.z[torch.from_numpy(train_rows)]).live - sum(sizes.values())
        assert data.labels is not None
        for name in hidden:
            labels = data.labels[:, data.names.index(name)]
            classes = len(labels[labels != MISSING].unique())
            sizes[name] = max(1, min(classes, room // len(hidden)))
        return sizes

    def _drawn(self, sizes: dict[str, int] | None, inputs: Inputs | None, seed: int) -> IIN:
        """A model with random weights."""
        settings = self.settings
        return IIN(
            self.data.dim,
            sizes,
            settings.n_flows,
            settings.hidden_dim,
            settings.hidden_depth,
            generator=torch.Generator().manual_seed(seed),
            coupling=settings.coupling,
            context_dim=0 if self.context is None else self.context.shape[1],
            inputs=inputs,
            dtype=self.dtype,
        )

    def _initialize(self, model: IIN) -> None:
        za, zb, _, *context = self._pairs(0, slice(None))  # the whole batch, in every process alike
        model.initialize(torch.cat([za, zb]), *context)

    def _pairs(self, step: int, own: slice) -> list[Tensor]:
        """What step ``step`` learns from: rows ``own`` of its batch, as :class:`_Objective` takes them.

        The noise follows from seed and step alone, like the pairs: a resume and any number of processes see the same.
        """
        settings = self.settings
        batch = self.batches.draw(settings.batch, step)
        za, zb, *rest = self._rows(Batch(*(part[own] for part in batch)))
        if self.noise is not None:
            random = np.random.default_rng([settings.seed, step, 1])
            drawn = torch.from_numpy(random.standard_normal((2, settings.batch, self.data.dim)))[:, own]
            if self.narrow is not None:
                drawn = drawn - (drawn @ self.narrow) @ self.narrow.T
            za, zb = (
                z + (settings.noise_at(step) * self.noise * part[:, self.noisy]).to(z)
                for z, part in zip((za, zb), drawn, strict=True)
            )
        return [za, zb, *rest]

    def _rows(self, batch: Batch) -> list[Tensor]:
        """First samples, second ones, what they share, and the context of all where there is one."""
        found = [self.z[batch.a], self.z[batch.b], batch.shared]
        if self.context is not None:
            found.append(self.context[torch.cat([batch.a, batch.b])].to(self.dtype))
        return found

    def run(self) -> IIN:
        settings, fabric = self.settings, self.fabric
        size, rank = settings.batch // fabric.world_size, fabric.global_rank
        own = slice(rank * size, (rank + 1) * size)
        device = fabric.device
        # Every step where that costs nothing; else each line of the log, where all processes meet.
        watched = device.type == "cpu" and fabric.world_size == 1
        log, ended = Log(self.folder, self.progress.step, self.loggers) if fabric.is_global_zero else None, False
        self.wrapped.train()
        try:
            with (
                _stop_signals() as stopped,
                Bar(settings.steps, self.progress.step, self.show and fabric.is_global_zero) as bar,
            ):
                self.clock, self.since = time.perf_counter(), self.progress.step
                if self.progress.step == 0 and settings.start != "random":
                    self._start(log)
                steps = range(self.progress.step, settings.steps)
                if 0 < settings.patience <= self.progress.stale:  # a resume of what has stopped early
                    steps = range(0)
                if steps and fabric.world_size > 1:
                    # DDP puts the gradients that it sums in another order after its first backward, and with it come other
                    # roundings: that is done before the first step, so that the first step of a resume is like any other.
                    fabric.backward(self._loss(self._pairs(steps[0], own))[0])
                    self.optimizer.zero_grad()
                for step in steps:
                    rate = settings.rate(step)
                    for group in self.optimizer.param_groups:
                        group["lr"] = rate
                    self.pairs = self._pairs(step, own)
                    loss, nats = self._loss(self.pairs)
                    self.loss = loss.detach()
                    if step == steps[0]:
                        self.first_loss = fabric.all_reduce(self.loss.clone()).item()
                    self.recent.append(self.loss)
                    if watched:
                        self._check_finite(loss.item())
                    fabric.backward(loss)
                    if settings.clip:
                        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
                        if watched and not math.isfinite(norm):
                            part = not_finite_part((name, p.grad) for name, p in self.model.named_parameters())
                            raise self._failure(f"the gradient of {part or 'all parameters together'} is not finite")
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.sums += torch.stack([loss.detach().double(), nats.double(), torch.ones_like(nats).double()])
                    done = self.progress.step = step + 1
                    bar.step(done)

                    last = done == settings.steps
                    evaluate = self.held_out is not None and (done % settings.held_out_every == 0 or last)
                    line = evaluate or last or done % settings.log_every == 0
                    if line:
                        self._line(rate, evaluate, log, bar)
                    if evaluate and self._lost():
                        self._redraw()
                    stop, enough = stopped.is_set(), evaluate and 0 < settings.patience <= self.progress.stale
                    if fabric.world_size > 1:  # all stop at one step: they agree where they meet anyway
                        flags = torch.tensor([float(stop), float(enough)])
                        stop, enough = (
                            line and flag for flag in fabric.all_reduce(flags, reduce_op="sum").bool().tolist()
                        )
                    last = last or enough
                    if last or stop or done % settings.save_every == 0:
                        self._save(log)
                    if enough:
                        break
                    if stop and not last:
                        raise KeyboardInterrupt
            ended = True
        finally:
            if log is not None:
                log.close(ended)
        return self.model.eval()

    def _loss(self, pairs: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.wrapped(*(x.to(self.fabric.device, non_blocking=True) for x in pairs))  # type: ignore[no-any-return]

    def _line(self, rate: float, evaluate: bool, log: Log | None, bar: Bar) -> None:
        """One line of the log; with ``evaluate``, the held-out pairs too."""
        sums = self.fabric.all_reduce(self.sums.clone(), reduce_op="mean").tolist()
        loss, nats = sums[0] / sums[2], sums[1] / sums[2]
        self._check_finite(loss)
        self._check_risen(self.first_loss, self._recent_loss())
        self.sums.zero_()
        done = self.progress.step
        seconds = time.perf_counter() - self.clock
        values = {"loss": loss, "nats_per_dim": nats, "learning_rate": rate}
        values["samples_per_second"] = 2 * self.settings.batch * (done - self.since) / max(seconds, 1e-9)
        if evaluate and log is not None:
            values |= self._look()
        if log is not None:
            log.write(done, values)
        bar.tell(done, values)
        self.clock, self.since = time.perf_counter(), done

    def _start(self, log: Log | None) -> None:
        """The linear solution is the first model to keep. It is the first checkpoint, or what is drawn in its place is."""
        if log is not None and self.held_out is not None:
            log.write(0, self._look())
        if self.settings.start == "redrawn":
            self._redraw()
        self._save(log)

    @torch.no_grad()
    def _redraw(self) -> None:
        """Random weights in place of those of the flow, others at each step; the optimizer begins anew."""
        inputs = copy.deepcopy(self.model.inputs)
        assert inputs is not None
        drawn = self._drawn(self.model.sizes, inputs.cpu(), self.settings.seed + self.progress.step)
        self._initialize(drawn)
        self.model.load_state_dict(drawn.state_dict())
        for moments in self.raw_optimizer.state.values():
            for value in moments.values():
                value.zero_()
        self.progress.stale, self.progress.lowest_loss = 0, math.inf

    def _lost(self) -> bool:
        """Whether a redrawn flow has found so little of what the linear solution misses that other weights may do better."""
        done, every = self.progress.step, REDRAW_EVERY * self.settings.held_out_every
        if self.settings.start != "redrawn" or done % every or 2 * done > self.settings.steps:
            return False
        swaps = self.progress.swaps
        lost = self.judge is not None and bool(1 - swaps["best"].mean() > FOUND * (1 - swaps["first"].mean()))
        return bool(self.fabric.broadcast(lost))  # the first process has the judge

    @torch.no_grad()
    def _look(self) -> dict[str, float]:
        """What held-out latents say of the model as it is: for a line of the log. The best one so far is remembered."""
        assert self.held_out is not None
        totals = torch.zeros(2, dtype=torch.float64, device=self.fabric.device)
        for parts in zip(*(part.split(256) for part in self.held_out), strict=True):
            batch = Batch(*parts)
            with self.fabric.autocast():
                found = self.objective(*(x.to(self.fabric.device) for x in self._rows(batch)))
            totals += torch.stack([value.double() for value in found]) * len(batch.a)
        loss, nats = (totals / len(self.held_out.a)).tolist()
        values = {"held_out_loss": loss, "held_out_nats_per_dim": nats}
        progress = self.progress
        if self.judge is None:
            better = loss < progress.best_loss
        else:
            swaps = self.judge(self.model)
            values["held_out_swaps"] = swaps.mean().item()
            first, best = progress.swaps.get("first"), progress.swaps.get("best")
            if first is None or best is None:
                progress.swaps["first"], better = swaps, True
            else:
                better = swaps.mean() > best.mean() and self.judge.better(swaps, first)
            if better:
                progress.swaps["best"] = swaps.clone()
        lower = loss < progress.lowest_loss
        progress.lowest_loss = min(loss, progress.lowest_loss)
        early = progress.step < PATIENT * self.settings.steps
        progress.stale = 0 if better or lower or early else progress.stale + 1
        if self.settings.keep != "last" and better:
            parameters = self.model.state_dict().items()
            progress.best = {name: value.detach().to("cpu", copy=True) for name, value in parameters}
            progress.best_loss = loss
        return values

    def _save(self, log: Log | None) -> None:
        begin = time.perf_counter()
        progress, fabric = self.progress, self.fabric
        progress.sums = fabric.all_gather(self.sums).reshape(fabric.world_size, 3).cpu()
        if not torch.isfinite(progress.sums).all():
            self._check_finite(math.nan)
        if self.pairs:  # a step may have spoilt what it learned from: such a model takes no good one's place
            with torch.no_grad(), fabric.autocast():
                loss = self.objective(*(x.to(fabric.device) for x in self.pairs))[0]
            before, loss = fabric.all_reduce(torch.stack([self.loss, loss])).tolist()
            self._check_finite(loss)
            self._check_risen(before, loss)
            self._check_risen(self.first_loss, self._recent_loss())
        if fabric.is_global_zero and self.saved != progress.step:
            if log is not None:
                log.sync()
            progress.optimizer = state.moments(self.model, self.raw_optimizer)
            progress.random = {"torch": torch.get_rng_state()}
            progress.sampler = {"seed": self.settings.seed, "step": progress.step, "latents": self.fingerprint}
            try:
                state.save(self.folder, self.model, progress)
            except ValueError as error:  # NaN or Inf
                raise self._failure(str(error)) from error
        self.saved = progress.step
        fabric.barrier()
        self.clock += time.perf_counter() - begin

    def _check_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        za, zb, _, *context = self.pairs
        where = first_not_finite(self.model, torch.cat([za, zb]), *context)
        raise self._failure("the loss is not finite" + (f" (first: {where})" if where else ""))

    def _recent_loss(self) -> float:
        """The median of the last steps: one batch with an outlier of the latents says nothing of the training."""
        return float(self.fabric.all_reduce(torch.stack(list(self.recent)).median()))

    def _check_risen(self, before: float, loss: float) -> None:
        """Whether a loss is so far above another that the training has diverged."""
        if loss > before + max(MOST_RISE * 2 * self.data.dim, abs(before)):  # a large loss varies by much, too
            raise self._failure(f"the loss rose from {before:.4g} to {loss:.4g} nats per pair")

    def _failure(self, what: str) -> FloatingPointError:
        kept = (
            f"the checkpoint of step {self.saved} is intact"
            if self.saved is not None
            else "no checkpoint was written yet"
        )
        return FloatingPointError(
            f"train: {what} after step {self.progress.step} or shortly before; {kept}. A lower learning_rate (now "
            f"{self.settings.rate(max(0, self.progress.step - 1)):.3g}) or a larger batch helps; so do latents without "
            "outliers and constant features"
        )

    def _check_position(self) -> None:
        expected = {"seed": self.settings.seed, "step": self.progress.step, "latents": self.fingerprint}
        if self.progress.sampler != expected:
            raise ValueError(
                f"train: the checkpoint's sampler stands at {self.progress.sampler}, expected {expected}; it is of "
                "other latents"
            )

    def _context_classes(self) -> list[int]:
        """The classes that the context has; empty without one."""
        if self.settings.context is None or self.data.labels is None:
            return []
        found: list[int] = self.data.labels[:, self.data.names.index(self.settings.context)].unique().tolist()
        return found

    def _write_record(self) -> None:
        fabric, data, settings = self.fabric, self.data, self.settings
        path = None if data.path is None else str(data.path.resolve())
        record = {
            "format": FORMAT,
            "version": 1,
            "latents": {"path": path, "kind": data.kind, "sha256": self.fingerprint}
            | ({"rows": data.n, "of": data.sampled_from} if data.sampled_from else {}),
            "n": data.n,
            "dim": data.dim,
            "columns": list(data.columns),
            "names": list(data.names),
            "classes": {name: list(texts) for name, texts in data.classes.items()},
            "edges": {name: list(edges) for name, edges in data.edges.items()},
            "context_classes": self._context_classes(),
            "factors": self.model.sizes,
            "steps": settings.steps,
            "settings": settings.record(),
            "device": {
                "kind": str(fabric.device.type),
                "name": _device_name(fabric.device),
                "processes": fabric.world_size,
                "threads": torch.get_num_threads(),
            },
            "versions": _versions(),
        }
        write_file(self.folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())
        write_file(self.folder / "split.npz", npz_bytes({"train": self.split[0], "held_out": self.split[1]}))


@torch.no_grad()
def _narrow_directions(inputs: Inputs) -> Tensor | None:
    """Directions ``[dim, n]`` of standardised features that noise would bury: n with ``x - (x @ n) @ n.T`` is without most of it.

    Whitening makes what hardly varies as large as all else, and with it noise of the deviation of the features. In such a direction noise has the
    deviation of the direction in place of that.
    """
    if inputs.linear is None:
        return None
    matrix = inputs.linear.matrix.double()
    square, turn = torch.linalg.eigh(matrix @ matrix.T)
    narrow = square > MOST_GAIN**2
    if not narrow.any():
        return None
    found = torch.zeros(inputs.dim, int(narrow.sum()), dtype=torch.float64)
    found[inputs.keep] = turn[:, narrow] * (1 - square[narrow].rsqrt()).sqrt()
    return found


def _concepts(data: Latents, settings: Settings) -> tuple[str, ...]:
    """What gets a factor: concepts of which a size is given, and the others unless a residual is given too."""
    given = settings.factors or {}
    unknown = [name for name in given if name not in (*data.names, RESIDUAL)]
    if unknown:
        known = list(data.names) or "none, as there are no labels"
        raise ValueError(f"train: factors names {unknown[0]!r}, expected concepts of the latents: {known}")
    others = () if RESIDUAL in given else data.names
    named = dict.fromkeys((*given, *others))
    return tuple(name for name in named if name not in (RESIDUAL, settings.context) and given.get(name) != 0)


def _check_residual(data: Latents, settings: Settings) -> None:
    """Refuse a size of the residual that is not what the concepts leave over."""
    given = settings.factors or {}
    if RESIDUAL in given and sum(given.values()) != data.dim:
        raise ValueError(
            f"train: factors is {dict(given)}, which sums to {sum(given.values())}, expected {data.dim}, the features of the "
            "latents, where residual is among them; leave residual out, and it is what the concepts leave over"
        )


def _facts(data: Latents, settings: Settings) -> tuple[Facts, SwapJudge | None]:
    """What the settings are chosen by; and the judge, if they took one."""
    train_rows, held_rows = split_rows(data, settings.held_out, settings.seed)
    if settings.preset == "paper":
        return Facts(len(train_rows), len(held_rows), data.dim, data.kind), None
    options: dict[str, Any] = {"others": settings.others or "any", "unlabelled": settings.unlabelled, "lenient": True}
    held = 0
    if len(held_rows) and not Batches(data, units(data, held_rows), _concepts(data, settings), **options).empty:
        held = len(held_rows)
    rows = data.z[torch.from_numpy(train_rows)]
    inputs = Inputs.of(rows)
    hidden: tuple[str, ...] = ()
    variance, judge = 1.0, None
    if settings.start != "random" and data.labels is not None and held:
        judge = SwapJudge(data, train_rows, held_rows, _concepts(data, settings), seed=settings.seed)
        hidden = judge.hidden() if settings.start != "linear" else ()
        variance = judge.enough_variance()
    least = leading_directions(inputs(rows.double())[0], settings.variance or variance)[2]
    if settings.start != "random" and inputs.live - least < 2:
        raise ValueError(
            f"train: latents vary in {inputs.live - least} direction beside constants and copies, expected 2 at least; "
            "start='random' with standardise=False trains on all features as they are"
        )
    whole = data.labels is None or not bool((data.labels == MISSING).any())
    return Facts(len(train_rows), held, inputs.live - least, data.kind, hidden, whole, variance), judge


def _fabric(accelerator: str, devices: int, nodes: int, strategy: str, settings: Any, device: str | None = None) -> Any:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.utilities.exceptions import MisconfigurationException
    except ImportError as error:
        raise ImportError("train needs lightning-fabric: pip install 'iin-fast[train]'") from error
    event_writer()  # what is missing is said before a folder is made
    safetensors_library()
    if strategy not in ("auto", "ddp"):
        raise ValueError(f"train: strategy is {strategy!r}, expected 'auto' or 'ddp'; a sharded one is not supported")
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    for name, value in (("devices", devices), ("nodes", nodes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"train: {name} is {value!r}, expected a positive integer")
    if settings.batch % (devices * nodes):
        raise ValueError(
            f"train: batch is {settings.batch}, expected a multiple of {devices * nodes}, the number of processes"
        )
    kind: Any = accelerator
    which: Any = devices
    if device is not None:
        kind, _, index = device.partition(":")
        if (
            accelerator != "auto"
            or devices * nodes > 1
            or (index and not index.isdigit())
            or kind not in ("cpu", "cuda")
        ):
            raise ValueError(
                f"train: device is {device!r}, expected 'cpu', 'cuda' or 'cuda:1', without accelerator, devices and nodes"
            )
        which = [int(index)] if index and kind == "cuda" else 1
    precision: Any = settings.precision
    try:
        fabric = Fabric(accelerator=kind, devices=which, num_nodes=nodes, strategy=strategy, precision=precision)
    except (ImportError, MisconfigurationException, RuntimeError, ValueError) as error:
        raise ValueError(f"train: no {devices} × accelerator {kind!r} here: {error}") from error
    fabric.launch()
    return fabric


FORMAT = "iin_fast.run"  # of run.json

# What a training, and the commands after it, write into a folder.
FOLDERS = ("state", "logs", "pictures")
FILES = ("run.json", "split.npz", "config.json", "model.safetensors", "evaluation.json", "report.html")


def _check_folder(run: Path, fingerprint: str, before: dict[str, Any], resume: bool, force: bool) -> None:
    """Refuse a folder with another run in it, or with files of somebody else that would be written over."""
    there = [name for name in (*FOLDERS, *FILES) if os.path.lexists(run / name)]
    if there and not _holds_run(run):
        raise FileExistsError(f"train: {run} holds {', '.join(there)} and no run of iin-fast; take another folder")
    if there and not resume and not force:
        raise FileExistsError(
            f"train: {run} holds a run already; resume it, or take another folder; force (--force) trains anew"
        )
    for name in there:
        if (run / name).is_dir() != (name in FOLDERS):
            raise OSError(
                f"train: {run / name} is no {'folder' if name in FOLDERS else 'file'}; take another folder for the run"
            )
    known = before.get("latents", {})
    if known and known.get("sha256") != fingerprint:
        raise ValueError(
            f"train: latents is {fingerprint!r}, but the run in {run} has {known.get('sha256')!r}; resume takes the same latents"
        )


def _holds_run(run: Path) -> bool:
    try:
        return bool(read_json(run / "run.json").get("format") == FORMAT)
    except (OSError, ValueError):
        return False


def _record(run: Path) -> dict[str, Any]:
    """What the training in ``run`` wrote of itself; empty where there is none."""
    record, file = recorded(run), run / "run.json"
    if file.is_file() and not all(isinstance(record.get(name), dict) for name in ("latents", "settings", "versions")):
        raise ValueError(f"{file}: damaged, or not of a training (without latents, settings or versions)")
    return record


# What a resume may be given anew.
OPEN = ("steps", "patience", "log_every", "held_out_every", "save_every")


def _resumed(settings: Settings, record: dict[str, Any], run: Path) -> Settings:
    """The settings of the run that ``record`` is of, with what is given anew of ``OPEN``."""
    if not record:
        return settings
    names = {field.name: field.default for field in fields(Settings)}
    known = {name: value for name, value in record["settings"].items() if name in names}
    try:
        own = Settings(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run / 'run.json'}: damaged settings ({error})") from error
    preset = PAPER if settings.preset == "paper" else {}
    values = {name: getattr(settings, name) for name in names}
    given = {name: x for name, x in values.items() if x != names[name] and x != preset.get(name, names[name])}
    for name, value in given.items():
        if name in known:
            check_setting(name, value, known[name], run)
    _check_steps(given.get("steps"), record, run)
    return replace(own, **{name: value for name, value in given.items() if name in OPEN})


def check_setting(name: str, value: Any, known: Any, run: Path) -> None:
    """Refuse another value of a setting than that which a run has, unless a resume may change it."""
    if name not in OPEN and value != known:
        raise ValueError(
            f"train: {name} is {value!r}, but the run in {run} has {known!r}; resume takes the same latents and settings"
        )


def _check_steps(steps: int | None, record: dict[str, Any], run: Path) -> None:
    """Refuse fewer steps than a run has."""
    if steps is not None and steps < record.get("steps", 0):
        raise ValueError(
            f"train: steps is {steps}, but the run in {run} has {record['steps']}; resume takes as many or more"
        )


def _clear(run: Path) -> None:
    """Take away what a training, and the commands after it, wrote into a folder; nothing else."""
    for name in FOLDERS:
        shutil.rmtree(run / name, ignore_errors=True)
    for name in FILES:
        (run / name).unlink(missing_ok=True)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and SIGHUP set; a second one of them acts as usual. What is ignored (nohup, ``&``) stays so."""
    event = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def stop(number: int, frame: Any) -> None:
        event.set()
        for signum, handler in before.items():
            signal.signal(signum, handler)

    if threading.current_thread() is threading.main_thread():
        known = {number.name: number for number in signal.Signals}
        for signum in (
            known[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in known
        ):  # Windows has no hangup
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, stop) or signal.SIG_DFL
    try:
        yield event
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} processors"


def _versions() -> dict[str, str]:
    import lightning_fabric

    from .. import __version__

    return {
        "iin-fast": __version__,
        "torch": torch.__version__,
        "lightning-fabric": lightning_fabric.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
