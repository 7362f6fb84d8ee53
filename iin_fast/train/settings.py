"""The settings of a training, and what it chooses by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from ..checks import checked_int, checked_seed

__all__ = ["PRECISIONS", "Facts", "Settings"]

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
BASE_RATE = 4.5e-6  # per pair of a batch, as published
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "minutes": (lambda x: 0 < x < math.inf, "more than 0"),
    "rho": (lambda x: 0 < x < 1, "between 0 and 1, both excluded"),
    "variance": (lambda x: 0 < x <= 1, "above 0 to 1"),
    "learning_rate": (lambda x: 0 < x < math.inf, "more than 0"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a finite number from 0"),
    "clip": (lambda x: 0 <= x < math.inf, "a finite number from 0"),
    "contrast": (lambda x: 0 <= x < math.inf, "a finite number from 0"),
    "held_out": (lambda x: 0 <= x < 1, "0 to below 1"),
    "noise": (lambda x: 0 <= x < math.inf, "a finite number from 0"),
    "noise_end": (lambda x: 0 <= x < math.inf, "a finite number from 0"),
    "unlabelled": (lambda x: 0 <= x <= 1, "0 to 1"),
}
LEAST = {
    **dict.fromkeys(("n_flows", "hidden_dim", "batch", "steps", "log_every", "held_out_every", "save_every"), 1),
    **dict.fromkeys(("hidden_depth", "warmup", "decay_start", "patience"), 0),
}
ALLOWED: dict[str, tuple[str, ...]] = {
    "preset": ("auto", "paper"),
    "dims_method": ("linear", "published", "paper"),
    "others": ("differ", "any", "agree"),
    "start": ("linear", "redrawn", "random"),
    "coupling": ("affine", "spline"),
    "keep": ("last", "best", "swaps"),
    "precision": PRECISIONS,
}
PAPER: dict[str, Any] = {
    "dims_method": "published",
    "others": "differ",
    "start": "random",
    "standardise": False,
    "variance": 1.0,
    "rho": 0.975,
    "n_flows": 12,
    "hidden_dim": 512,
    "hidden_depth": 2,
    "coupling": "affine",
    "batch": 25,
    "steps": 10_000,
    "warmup": 0,
    "weight_decay": 0.0,
    "clip": 0.0,
    "contrast": 0.0,
    "noise": 0.0,
    "keep": "last",
    "patience": 0,
    "held_out_every": 500,
    "save_every": 1000,
}
# Flops per second that the steps of a default training are counted with: a core of a laptop that does other things too.
SPEED = {"affine": 15e9, "spline": 5e9}
MOST_STEPS, LEAST_STEPS = 3000, 200
EVALUATIONS = 30
CONTRAST = 10.0  # where concepts lie in no direction, and of many rows
MANY_ROWS = 3000
NOISE_FALLS = 0.1, 0.3  # from and to these shares of the steps
PATIENT = 0.3  # share of the steps after which a training may end early: before, noise still falls, and the held-out loss with it


class Facts(NamedTuple):
    """What the choice of settings depends on."""

    rows: int  # to train on
    held_out: int  # rows
    dim: int  # directions in which the rows vary
    kind: str  # labels, pairs or unlabelled
    hidden: tuple[str, ...] = ()  # concepts that small networks read, and no linear map
    whole: bool = True  # no label is missing
    variance: float = 1.0  # share whose directions hold all concepts


@dataclass(frozen=True)
class Settings:
    """What a training is told, checked; the same settings and data give the same model on the same machine.

    Each field is an option of ``iin-fast train``, and its entry here is the option's help. What is None is chosen from the latents
    when the training starts (:meth:`chosen`), and stands in ``run.json``; docs/decisions.md says how, and why.

    Args:
        factors: sizes like digit=22,color=11, a mapping of concept to number of dimensions; the rest is residual. Sizes of
            concepts that are not named are estimated, see ``dims_method``; a concept of size 0 is left out. With a size of
            ``residual``, all sizes sum to the features, and concepts that are not named are left out.
        context: a concept that is not a factor but known: the flow is conditional on its class (see ``context_dim`` of
            :class:`iin_fast.IIN`). Every latent needs its label.
        preset: ``"auto"``: what is not given is chosen from the latents; or ``"paper"``: it is as published.
        minutes: how long a training may take on two CPU cores, about; steps are chosen by it.
        dims_method: how sizes are estimated: ``"linear"`` (directions that pairs have in common beyond chance, see
            :class:`iin_fast.LinearIIN`), or ``"published"`` or ``"paper"``, of :func:`iin_fast.estimate_factor_dims`.
        others: in the concepts that a pair does not share, it may ``"differ"``, ``"agree"``, or fall as it may
            (``"any"``); see :class:`iin_fast.PairSampler`.
        unlabelled: share of the pairs that come from samples without any label; by default half, if there are any.
        start: ``"linear"``: the flow starts as the identity behind the linear IIN, which training can only improve on;
            ``"redrawn"``: the same is the first model to keep, then the flow's weights are drawn at random, which finds concepts
            that no linear map reads; or ``"random"``.
        standardise: features of mean 0 and deviation 1 before the flow, as a part of the model; constant ones and copies of
            others are set aside and come back as they were. See :class:`iin_fast.iin.Inputs`. A linear start does so too. Of outliers, far
            off the usual values of a feature, the farthest usual value is learned.
        variance: share of the variance of standardised features whose leading directions the flow learns on after a linear or redrawn
            start. Directions of less variance are a part of the residual as they are, and no swap of a factor moves them. By default
            0.975 to 1: the least share in which networks read every concept as well as in all.
        rho: correlation of a shared factor, between 0 and 1 exclusive.
        n_flows: blocks of the flow; see :class:`iin_fast.IIN`.
        hidden_dim: width of its networks.
        hidden_depth: hidden layers of its networks beside the first.
        coupling: ``"affine"`` or ``"spline"``.
        batch: pairs in a step, over all processes; it holds twice as many latents.
        steps: optimizer steps.
        learning_rate: of Adam (β 0.5, 0.9 as published; 0.9, 0.99 after a linear start); as published 4.5e-6 × ``batch``.
        warmup: steps in which the learning rate rises from 0.
        decay_start: from this step on the learning rate falls in a straight line, to 0 at the end; by default half of
            ``steps``.
        weight_decay: share of each weight matrix that a step takes off, times the learning rate (AdamW). From a linear start it
            pulls the flow back to the linear solution.
        clip: longest gradient, as a norm over all parameters; 0 for any length.
        contrast: weight of a second loss, which asks of each pair whether it shares a concept, by the concept's factor alone. It
            finds concepts that lie in no direction; by default 10 after a redrawn start and of 3,000 rows or more that have all
            their labels, else 0.
        noise: deviation of the Gaussian noise that every step adds to its latents, in standard deviations of each feature
            over the training rows; 0 for none, as published. It keeps the flow from overfitting few latents.
        noise_end: deviation from three tenths of the steps on. The noise falls to it from one tenth on, each step by the same factor.
            Of the preset ``"paper"`` it is ``noise``.
        held_out: share of the latents that is never trained on, from 0 to below 1.
        keep: which model a run leaves: ``"last"``, that of the last step, as published; ``"best"``, the one with the
            lowest held-out loss of all evaluations; or ``"swaps"``, the one whose swaps of held-out latents change one concept and keep
            the others most often, as small networks read them that learned on the other rows, and the nearest latents. Where that
            takes labels which are not there, it is ``"best"``.
        patience: evaluations in a row without a lower held-out loss or a better model, after which the training stops, counted from three
            tenths of ``steps`` on; 0 for no such end.
        precision: ``"32-true"``, ``"64-true"``, or ``"bf16-mixed"`` (autocast; parameters stay float32).
        seed: of weights, split and pairs.
        log_every: steps between two lines of the log.
        held_out_every: steps between two looks at held-out pairs.
        save_every: steps between two checkpoints.

    Raises:
        TypeError, ValueError: a value of another type or out of range.
    """

    factors: Mapping[str, int] | None = None
    context: str | None = None
    preset: str = "auto"
    minutes: float = 5.0
    dims_method: str | None = None
    others: str | None = None
    unlabelled: float | None = None
    start: str | None = None
    standardise: bool | None = None
    variance: float | None = None
    rho: float | None = None
    n_flows: int | None = None
    hidden_dim: int | None = None
    hidden_depth: int | None = None
    coupling: str | None = None
    batch: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    decay_start: int | None = None
    weight_decay: float | None = None
    clip: float | None = None
    contrast: float | None = None
    noise: float | None = None
    noise_end: float | None = None
    held_out: float = 0.1
    keep: str | None = None
    patience: int | None = None
    precision: str = "32-true"
    seed: int = 0
    log_every: int = 50
    held_out_every: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        where = "Settings"
        open_ = {name for name, value in asdict(self).items() if value is None} - NEEDED
        for name, least in LEAST.items():
            if name not in open_:
                object.__setattr__(self, name, checked_int(where, name, getattr(self, name), least=least))
        object.__setattr__(self, "seed", checked_seed(where, self.seed))
        for name, (fits, expected) in RANGES.items():
            value = getattr(self, name)
            if name in open_:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{where}: {name} is {value!r}, expected a number")
            if not fits(value):
                raise ValueError(f"{where}: {name} is {value}, expected {expected}")
            object.__setattr__(self, name, float(value))
        if "standardise" not in open_ and not isinstance(self.standardise, bool):
            raise TypeError(f"{where}: standardise is {self.standardise!r}, expected True or False")
        for name, allowed in ALLOWED.items():
            if name not in open_ and getattr(self, name) not in allowed:
                raise ValueError(
                    f"{where}: {name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, allowed))}"
                )
        if self.preset == "paper":
            for name, value in PAPER.items():
                if name in open_:
                    object.__setattr__(self, name, value)
        if self.steps is not None and self.decay_start is not None and self.decay_start > self.steps:
            raise ValueError(f"{where}: decay_start is {self.decay_start}, expected at most steps = {self.steps}")
        if self.factors is not None:
            if not isinstance(self.factors, Mapping):
                kind = type(self.factors).__name__
                raise TypeError(f"{where}: factors is a {kind}, expected a mapping of concept to size")
            sizes = {
                name: checked_int(where, f"factors[{name!r}]", size, least=0) for name, size in self.factors.items()
            }
            object.__setattr__(self, "factors", sizes)
        if self.context is not None and not isinstance(self.context, str):
            raise TypeError(f"{where}: context is {self.context!r}, expected the name of a concept")
        if self.context is not None and self.context in (self.factors or ()):
            raise ValueError(f"{where}: factors has {self.context!r}, which is the context, expected one or the other")

    def chosen(self, facts: Facts) -> Settings:
        """These settings with a value for all that is None, by what the latents are."""
        if self.preset == "paper":
            return self
        start = self.start or ("redrawn" if facts.hidden else "linear")
        coupling = self.coupling or "affine"
        many = facts.kind == "labels" and facts.whole and facts.rows >= MANY_ROWS
        choice: dict[str, Any] = {
            "dims_method": "linear",
            "others": "any",
            "start": start,
            "standardise": True,
            "variance": facts.variance,
            "rho": 0.975,
            "n_flows": 8,
            "hidden_dim": 128,
            "hidden_depth": 2,
            "coupling": coupling,
            "batch": 64,
            "learning_rate": 2e-3,
            "weight_decay": 0.0,
            "clip": 1.0,
            "contrast": CONTRAST if start == "redrawn" or many else 0.0,
            "patience": 4,
            "noise": 0.1 if start == "redrawn" else 0.5,
            "noise_end": 0.05 if self.noise is None else min(0.05, self.noise),
            "keep": "last" if not facts.held_out else "swaps" if facts.kind == "labels" else "best",
        }
        found = self._filled(choice)
        if found.steps is None:
            flops = 6 * 2 * found.batch * found.parameters(facts.dim)  # forward, and twice that backward
            most = int(60 * self.minutes * SPEED[coupling] / flops)
            found = replace(found, steps=max(LEAST_STEPS, min(MOST_STEPS, most)))
        rest = {
            "warmup": min(100, found.steps // 10),
            "decay_start": found.steps // 2,
            "held_out_every": max(1, found.steps // EVALUATIONS),
            "save_every": max(1, found.steps // 2),
        }
        return found._filled(rest)  # type: ignore[no-any-return]

    def _filled(self, values: Mapping[str, Any]) -> Any:
        """These settings with ``values`` where they have None."""
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def text(self, facts: Facts) -> str:
        """What a training with these settings does, in a few words."""
        rows = f"{facts.rows} latents ({facts.held_out} more held out) that vary in {facts.dim} directions"
        if self.variance is not None and self.variance < 1 and self.start != "random":
            rows += f", but for {1 - self.variance:.1%} of the variance"
        if facts.hidden:
            rows += f"; no linear map reads {', '.join(facts.hidden)}"
        noise = f"{self.noise:g}" if self.noise_end is None else f"{self.noise:g} to {self.noise_end:g}"
        return (
            f"{rows}: {self.start} start, {self.n_flows} {self.coupling} blocks of width {self.hidden_dim}, "
            f"{self.steps} steps of {self.batch} pairs, learning rate {self.rate(-1):.2g}, noise {noise}, "
            f"keep {self.keep} (preset {self.preset})"
        )

    def parameters(self, dim: int) -> int:
        """About how many weights the flow has, of latents that vary in ``dim`` directions."""
        assert self.n_flows and self.hidden_dim and self.hidden_depth is not None
        ends = self.hidden_dim * dim
        if self.coupling == "spline":
            return self.n_flows * 2 * (13 * ends + 2 * self.hidden_depth * self.hidden_dim**2)
        return self.n_flows * 4 * (ends + self.hidden_depth * self.hidden_dim**2)

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        assert self.batch and self.steps
        base = BASE_RATE * self.batch if self.learning_rate is None else self.learning_rate
        start = self.steps // 2 if self.decay_start is None else self.decay_start
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup and step >= 0 else 1.0
        return base * rise * (1.0 if step < start else (self.steps - step) / (self.steps - start))

    def noise_at(self, step: int) -> float:
        """The deviation of the noise in step ``step``, counted from 0."""
        assert self.noise is not None and self.steps
        if not self.noise or self.noise_end is None:
            return self.noise
        first, last = NOISE_FALLS
        done = min(1.0, max(0.0, (step / self.steps - first) / (last - first)))
        if not self.noise_end:
            return self.noise * (1 - done)
        return float(self.noise * (self.noise_end / self.noise) ** done)

    def record(self) -> dict[str, Any]:
        """All settings as plain values; those of the preset ``"paper"`` with the published defaults filled in."""
        plain = asdict(self)
        plain["factors"] = None if self.factors is None else dict(self.factors)
        if self.steps is not None and self.batch is not None:
            plain["learning_rate"] = self.rate(-1)
            plain["decay_start"] = self.steps // 2 if self.decay_start is None else self.decay_start
        return plain


# None is no value of these.
NEEDED = {"preset", "minutes", "held_out", "precision", "seed", "log_every"}
