"""What a training can be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..checks import checked_int

__all__ = ["PRECISIONS", "Settings"]

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
BASE_RATE = 4.5e-6  # per pair of a batch, as published
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "rho": (lambda x: 0 < x < 1, "between 0 and 1, both excluded"),
    "learning_rate": (lambda x: 0 < x < math.inf, "more than 0"),
    "held_out": (lambda x: 0 <= x < 1, "0 to below 1"),
    "noise": (lambda x: 0 <= x < math.inf, "a finite number from 0"),
    "unlabelled": (lambda x: 0 <= x <= 1, "0 to 1"),
}


@dataclass(frozen=True)
class Settings:
    """What a training is told, checked; the same settings and data give the same model on the same machine.

    Each field is an option of ``iin-fast train``, and its entry here is the option's help.

    Args:
        factors: sizes like digit=22,color=11, a mapping of concept to number of dimensions; the rest is residual, and concepts
            that are not named are left out. By default they are estimated from pairs, see ``dims_method``.
        context: a concept that is not a factor but known: the flow is conditional on its class (see ``context_dim`` of
            :class:`iin_fast.IIN`). Every latent needs its label.
        dims_method: how sizes are estimated: ``"published"`` or ``"paper"``, of :func:`iin_fast.estimate_factor_dims`.
        others: in the concepts that a pair does not share, it may ``"differ"``, ``"agree"``, or fall as it may
            (``"any"``); see :class:`iin_fast.PairSampler`.
        unlabelled: share of the pairs that come from samples without any label; by default half, if there are any.
        standardise: features of mean 0 and deviation 1 before the flow, as a part of the model; constant ones and copies of
            others are set aside and come back as they were. See :class:`iin_fast.iin.Inputs`.
        rho: correlation of a shared factor, between 0 and 1 exclusive.
        n_flows: blocks of the flow; see :class:`iin_fast.IIN`.
        hidden_dim: width of its networks.
        hidden_depth: hidden layers of its networks beside the first.
        coupling: ``"affine"`` or ``"spline"``.
        batch: pairs in a step, over all processes; it holds twice as many latents.
        steps: optimizer steps.
        learning_rate: of Adam (β 0.5, 0.9); by default 4.5e-6 × ``batch``, as published.
        decay_start: from this step on the learning rate falls in a straight line, to 0 at the end; by default half of
            ``steps``.
        noise: deviation of the Gaussian noise that every step adds to its latents, in standard deviations of each feature
            over the training rows; 0 for none, as published. It keeps the flow from learning few latents by heart.
        held_out: share of the latents that is never trained on, from 0 to below 1.
        keep: which model a run leaves: ``"last"``, that of the last step, as published; or ``"best"``, the one with the
            lowest held-out loss of all looks.
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
    dims_method: str = "published"
    others: str = "differ"
    unlabelled: float | None = None
    standardise: bool = False
    rho: float = 0.975
    n_flows: int = 12
    hidden_dim: int = 512
    hidden_depth: int = 2
    coupling: str = "affine"
    batch: int = 25
    steps: int = 10_000
    learning_rate: float | None = None
    decay_start: int | None = None
    noise: float = 0.0
    held_out: float = 0.1
    keep: str = "last"
    precision: str = "32-true"
    seed: int = 0
    log_every: int = 50
    held_out_every: int = 500
    save_every: int = 1000

    def __post_init__(self) -> None:
        where = "Settings"
        least = {"hidden_depth": 0, "seed": 0, "decay_start": 0}
        for name in (
            *("n_flows", "hidden_dim", "hidden_depth", "batch", "steps", "decay_start", "seed"),
            *("log_every", "held_out_every", "save_every"),
        ):
            value = getattr(self, name)
            if value is not None or name != "decay_start":
                object.__setattr__(self, name, checked_int(where, name, value, least=least.get(name, 1)))
        for name, (fits, expected) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("learning_rate", "unlabelled"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{where}: {name} is {value!r}, expected a number")
            if not fits(value):
                raise ValueError(f"{where}: {name} is {value}, expected {expected}")
            object.__setattr__(self, name, float(value))
        if not isinstance(self.standardise, bool):
            raise TypeError(f"{where}: standardise is {self.standardise!r}, expected True or False")
        for name, allowed in (
            ("dims_method", ("published", "paper")),
            ("others", ("differ", "any", "agree")),
            ("coupling", ("affine", "spline")),
            ("keep", ("last", "best")),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{where}: {name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, allowed))}"
                )
        if self.decay_start is not None and self.decay_start > self.steps:
            raise ValueError(f"{where}: decay_start is {self.decay_start}, expected at most steps = {self.steps}")
        if self.factors is not None:
            if not isinstance(self.factors, Mapping):
                kind = type(self.factors).__name__
                raise TypeError(f"{where}: factors is a {kind}, expected a mapping of concept to size")
            sizes = {name: checked_int(where, f"factors[{name!r}]", size) for name, size in self.factors.items()}
            object.__setattr__(self, "factors", sizes)
        if self.context is not None and not isinstance(self.context, str):
            raise TypeError(f"{where}: context is {self.context!r}, expected the name of a concept")
        if self.context is not None and self.context in (self.factors or ()):
            raise ValueError(f"{where}: factors has {self.context!r}, which is the context, expected one or the other")

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        base = BASE_RATE * self.batch if self.learning_rate is None else self.learning_rate
        start = self.steps // 2 if self.decay_start is None else self.decay_start
        return base if step < start else base * (self.steps - step) / (self.steps - start)

    def record(self) -> dict[str, Any]:
        """All settings as plain values, defaults filled in."""
        plain = asdict(self)
        plain["factors"] = None if self.factors is None else dict(self.factors)
        plain["learning_rate"] = self.rate(-1)
        plain["decay_start"] = self.steps // 2 if self.decay_start is None else self.decay_start
        return plain
