"""What latents look like before a training: features that can't be learned from, scales, rank, classes of few rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data import MISSING, Latents
from ..iin.inputs import OUTLYING, USUAL, Inputs, constant_features, copied_features, mostly, usual_values
from ..iin.linear import NULL_VARIANCE

__all__ = ["Findings", "inspect_latents", "outlier_line"]

ALMOST = 0.99  # share of the rows with one value
SCALES = 100.0  # times the median deviation, or that part of it
FEW_ROWS = 10
FEW_LATENTS = 100
FEW_EXAMPLES = 50
SHOWN = 8


@dataclass(frozen=True)
class Findings:
    """What :func:`inspect_latents` found; ``lines()`` says it in words.

    Attributes:
        n, dim: rows and features.
        constant: features with one value.
        copies: feature to the first one with the same values; without the constant ones.
        almost_constant: features with one value in 99 % of the rows or more.
        badly_scaled: features whose deviation is more than 100 times the median of all, or less than a hundredth of it.
        outliers: a sentence on values far off the usual ones, with their rows and features; empty where there are none.
        rank: directions that vary, of ``live`` features that are neither constant nor copies.
        few: concept to class to rows, of classes with fewer than 10.
        examples: concept to the different latents that say what it is, where these are fewer than 50: rows with a label, or rows of
            pairs that share the concept.
    """

    n: int
    dim: int
    constant: list[int]
    copies: dict[int, int]
    almost_constant: list[int]
    badly_scaled: list[int]
    outliers: str
    rank: int
    few: dict[str, dict[int | str, int]]
    examples: dict[str, int]

    @property
    def live(self) -> int:
        return self.dim - len(self.constant) - len(self.copies)

    def lines(self) -> list[str]:
        """A sentence for each thing that may spoil a training; none where all is well."""
        found = []
        for which, what in ((self.constant, "constant"), (list(self.copies), "equal to others")):
            if which:
                found.append(
                    f"{_features(which, self.dim)} {what}; standardised inputs, the default, set such features aside"
                )
        if self.almost_constant:
            found.append(f"{_features(self.almost_constant, self.dim)} constant in {ALMOST:.0%} of the rows or more")
        if self.badly_scaled:
            found.append(
                f"{_features(self.badly_scaled, self.dim)} {SCALES:.0f} times wider or narrower than most; "
                "standardised inputs, the default, give all one scale"
            )
        if self.outliers:
            found.append(self.outliers)
        if self.rank < self.live:
            why = "fewer rows than features" if self.n <= self.live else "some features are combinations of others"
            found.append(
                f"the latents vary in {self.rank} of {self.live} directions ({why}): without noise on the latents the density "
                "has no bound, and training overfits them"
            )
        elif self.n < FEW_LATENTS:
            found.append(f"{self.n} rows are few: a flow overfits them, and what is held out says little")
        for concept, classes in self.few.items():
            shown = ", ".join(f"{label} ({rows})" for label, rows in list(classes.items())[:SHOWN])
            more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
            found.append(f"concept {concept!r}: classes with fewer than {FEW_ROWS} rows: {shown}{more}")
        for concept, rows in self.examples.items():
            found.append(
                f"concept {concept!r} is said by {rows} different latents, which a flow overfits: a linear answer, the "
                "difference of the classes' means or an axis of iin_fast.LinearIIN, is as good or better, and takes seconds"
            )
        return found


@torch.no_grad()
def inspect_latents(latents: Latents, replaced: bool = True) -> Findings:
    """Looks at latents before a training: what in them a flow can't learn from, or learns badly.

    ``replaced``: whether the training takes usual values in place of outliers, as all do but those of the preset ``"paper"``.

    Example:
        >>> from iin_fast.data import Latents
        >>> from iin_fast.train import inspect_latents
        >>> z = torch.cat([torch.randn(200, 3), torch.ones(200, 1)], 1)
        >>> inspect_latents(Latents.of(z)).lines()
        ['1 of 4 features (3) is constant; standardised inputs, the default, set such features aside']
    """
    z, outliers = usual_values(latents.z)
    constant = constant_features(z)
    first = copied_features(z)
    own = torch.arange(latents.dim)
    copies = ~constant & (first != own)
    live = ~constant & ~copies
    # The value in the middle of the sorted ones is the value of most rows, if there is one.
    almost = live & ((z == z.median(0).values).double().mean(0) >= ALMOST)
    badly = torch.zeros_like(live)
    rank = 0
    if live.any():
        deviation = z.double().std(0, correction=0)
        middle = deviation[live].median()
        badly = live & ((deviation > SCALES * middle) | (deviation * SCALES < middle))
        x = Inputs.of(z)(z.double())[0]
        rank = int((torch.linalg.eigvalsh(x.T @ x / len(x)) > NULL_VARIANCE).sum())
    few: dict[str, dict[int | str, int]] = {}
    examples: dict[str, int] = {}
    for name, column in zip(latents.names, latents.shared.T if latents.shared is not None else (), strict=False):
        examples[name] = len(z[column.repeat(2)].unique(dim=0))
    if latents.labels is not None:
        for name, column in zip(latents.names, latents.labels.T, strict=True):
            examples[name] = int((column != MISSING).sum())
            labels, rows = column[column != MISSING].unique(return_counts=True)
            texts = latents.classes.get(name)
            small = {
                texts[label] if texts else int(label): int(n)
                for label, n in zip(labels, rows, strict=True)
                if n < FEW_ROWS
            }
            if small:
                few[name] = small
    return Findings(
        n=latents.n,
        dim=latents.dim,
        constant=_places(constant),
        copies={j: int(first[j]) for j in _places(copies)},
        almost_constant=_places(almost),
        badly_scaled=_places(badly),
        outliers=outlier_line(outliers, replaced),
        rank=rank,
        few=few,
        examples={name: rows for name, rows in examples.items() if rows < FEW_EXAMPLES},
    )


def outlier_line(outliers: torch.Tensor, replaced: bool = True) -> str:
    """What a training, with standardised inputs if it has them ``replaced``, does with outliers, bool ``[n, dim]``, and where they are; empty where there are none."""
    if not outliers.any():
        return ""
    n, dim = outliers.shape
    taken = "the farthest usual value is taken in their place"
    if not replaced:
        taken = "they are taken as they are; standardised inputs take the farthest usual value in their place"
    elif mostly(outliers):
        taken = "as most rows have some, they are taken as they are; try the arcsinh of such features"
    return (
        f"outliers in {_some(_places(outliers.any(1)), n, 'rows')} and {_some(_places(outliers.any(0)), dim, 'features')}, over "
        f"{OUTLYING:.0f} times as far from the median as {USUAL:.0%} of the values: {taken}"
    )


def _places(mask: torch.Tensor) -> list[int]:
    found: list[int] = mask.nonzero()[:, 0].tolist()
    return found


def _features(which: Sequence[int], dim: int) -> str:
    return f"{_some(which, dim, 'features')} {'is' if len(which) == 1 else 'are'}"


def _some(which: Sequence[int], of: int, what: str) -> str:
    shown = ", ".join(map(str, which[:SHOWN])) + (", …" if len(which) > SHOWN else "")
    return f"{len(which)} of {of} {what} ({shown})"
