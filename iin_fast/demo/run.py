"""The demo from start to end: a first stage, its latents in files, and what the product makes of them."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import save_arrays
from ..files import try_to_write
from ..train import Settings, train
from ..train.run_folder import evaluate, report
from .data import FACTORS, Digits, load_digits, paint
from .first_stage import VAE, Judge, pair_latents, train_judge, train_vae

__all__ = ["Plan", "run_demo"]


@dataclass(frozen=True)
class Plan:
    """How much is done: steps of each training, pairs of latents, samples of a metric."""

    judge_steps: int = 800
    vae_steps: int = 2000
    pairs: int = 20_000
    iin_minutes: float = 2.0
    iin_steps: int | None = None  # as many as train itself chooses
    max_samples: int = 1000

    @classmethod
    def quick(cls) -> Plan:
        """About a minute, for a first impression."""
        return cls(judge_steps=200, vae_steps=900, pairs=4000, iin_minutes=0.25, max_samples=200)


def run_demo(
    out: Path, *, seed: int = 0, plan: Plan | None = None, say: Callable[[str], None] = print
) -> tuple[dict[str, Any], Path]:
    """Trains an autoencoder of colored digits, and an IIN on its latents, which is evaluated and reported.

    ``out`` becomes a run folder as :func:`iin_fast.train.train` makes it, with ``evaluation.json``, ``report.html`` and
    ``pictures``. Beside them are the latents: ``latents.npz`` (pairs, trained on), ``held_out.npz`` (of images that no
    network saw, with labels), ``learn_on.npz`` (of images that all saw, with labels), and the autoencoder, ``vae.pt``.

    Args:
        out: folder for the results; made if it isn't there.
        seed: of every draw and every weight.
        plan: how much is done; ``Plan.quick()`` takes a minute.
        say: called with a line of text on progress.

    Returns:
        the evaluation, and the path of the report.

    Raises:
        ImportError: scikit-learn, matplotlib, rich, safetensors, lightning-fabric or tensorboard is missing.
        FileExistsError: ``out`` holds a run.
        OSError: ``out`` can't be written.
    """
    _require_extras()
    out = _writable_folder(out)
    if not 0 <= seed < 2**32:
        raise ValueError(f"run_demo: seed is {seed}, expected 0 to 2**32 - 1")
    plan, start = plan or Plan(), time.perf_counter()
    digits, held_out = load_digits(seed)
    say(f"{len(digits)} digits to train on and {len(held_out)} held out, colored at random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the weights
        judge, vae = Judge(), VAE()
        train_judge(judge, digits, steps=plan.judge_steps, seed=seed + 1)
        train_vae(vae, digits, steps=plan.vae_steps, seed=seed + 2)
    torch.save(vae.state_dict(), out / "vae.pt")

    pairs = pair_latents(vae, digits, plan.pairs, seed=seed + 3)
    save_arrays(out / "latents.npz", dict(zip(("za", "zb", "shared"), pairs, strict=True)) | {"names": FACTORS})
    labelled = {"held_out": held_out, "learn_on": digits}
    for name, part in labelled.items():
        save_arrays(out / f"{name}.npz", _labelled(vae, part, seed + 4))

    # Pairs share their color exactly, so rho is above the published 0.975. Without patience: the held-out loss, taken without
    # noise, only falls once the noise of the training does, and ends at half of what patience stopped at.
    settings = Settings(rho=0.99, minutes=plan.iin_minutes, patience=0, steps=plan.iin_steps, seed=seed)
    train(out / "latents.npz", out, settings, accelerator="cpu", progress=True)
    found = evaluate(
        out,
        out / "held_out.npz",
        learn_on=out / "learn_on.npz",
        decoder=vae.decode,
        judge=judge.read,
        max_samples=plan.max_samples,
        progress=lambda what: say(f"evaluating: {what}"),
    )
    page = report(out, out / "held_out.npz", decoder=vae.decode)
    say(f"everything took {(time.perf_counter() - start) / 60:.1f} min")
    return found, page


def _labelled(vae: VAE, digits: Digits, seed: int) -> dict[str, Any]:
    images, labels = paint(digits, 2, torch.Generator().manual_seed(seed))
    z = torch.cat([vae.encode(part) for part in images.split(500)])
    return {"z": z, "labels": labels, "names": FACTORS, "images": (255 * images).round().byte()}


def _require_extras() -> None:
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "lightning_fabric": "lightning-fabric"}
    needed |= {name: name for name in ("rich", "safetensors", "tensorboard")}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'iin-fast[demo]'")


def _writable_folder(out: Path) -> Path:
    """Makes the folder and tries to write into it, so that a run doesn't fail after its training."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        try_to_write(out)
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise type(error)(
            f"run_demo: out is {str(out)!r}, which can't be written as a folder ({cause}); name another folder"
        ) from error
    if (out / "run.json").exists():
        raise FileExistsError(f"run_demo: {out} holds a run already; take another folder")
    return out
