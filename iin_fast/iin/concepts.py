"""A concept from two small groups of examples."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_dtype, check_floating, check_rank, check_shape, checked_int, checked_number, checked_seed
from ..files import check_name
from .factors import RESIDUAL

__all__ = ["ConceptPairs", "concept_pairs"]


class ConceptPairs(NamedTuple):
    """Pairs of latents that say what a concept is; what :class:`FactorLoss` takes, with the model's factors in order."""

    za: Tensor  # [n, dim]
    zb: Tensor  # [n, dim]
    shared: Tensor  # [n, names] bool
    factor: Tensor  # [n] int64, the column of shared that is True, -1 where none is
    names: tuple[str, ...]  # of the columns

    def batches(self, size: int, steps: int, *, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``steps`` random batches ``(za, zb, shared)`` of ``size`` pairs, drawn with replacement."""
        size, steps = checked_int("ConceptPairs", "size", size), checked_int("ConceptPairs", "steps", steps)
        random = torch.Generator().manual_seed(checked_seed("ConceptPairs", seed))
        for _ in range(steps):
            rows = torch.randint(len(self.za), (size,), generator=random).to(self.za.device)
            yield self.za[rows], self.zb[rows], self.shared[rows]


def concept_pairs(
    with_: Tensor,  # [m, dim]
    without: Tensor,  # [n, dim]
    background: Tensor | None = None,  # [k, dim]
    *,
    n: int = 10_000,
    name: str = "concept",
    rest: str | None = None,
    background_share: float = 0.5,
    noise: float = 0.0,
    seed: int = 0,
) -> ConceptPairs:
    """Creates pairs for training out of a handful of latents with a concept and a handful without it.

    The paper defines a concept by two sketches: examples that show its two states. Here they are latents:

    - two latents of one group share the concept (both have it, or neither has);
    - a latent of each group share nothing; or, where ``rest`` names a factor for everything else and ``with_[i]`` is the
      same thing as ``without[i]`` but for the concept (the same picture in two styles), they share the rest;
    - two latents of ``background`` share nothing. They need not show the concept; they teach the flow where latents lie.
      A handful of examples alone would be overfit.

    One half of the pairs that are not of the background comes from within the groups, evenly from either, the other half
    from across.

    Args:
        with_: latents with the concept, ``[m, dim]``, at least 2.
        without: latents without it, ``[n, dim]``, at least 2; like ``with_``.
        background: any latents of the same model, ``[k, dim]``, at least 2.
        n: number of pairs.
        name: of the concept; the IIN's factor for it.
        rest: name of a second factor, which holds what ``with_[i]`` and ``without[i]`` have in common.
        background_share: share of the pairs that come from ``background``, from 0 below 1.
        noise: deviation of Gaussian noise on every latent, in standard deviations of each feature over all that is
            given; it makes more of few examples. 0 for none.
        seed: of the drawing.

    Raises:
        TypeError, ValueError: groups that are no latents ``[m, dim]``, are too small or don't match, a bad share, name,
            noise or number; ``rest`` with groups of two sizes.

    References:
        Esser, Rombach, Ommer, CVPR 2020, Sec. 3.2 (concepts from two sketches); there a style transfer makes pairs of
        pictures from the two sketches and any training picture.

    Example:
        >>> from iin_fast import concept_pairs
        >>> pairs = concept_pairs(torch.randn(8, 16) + 1, torch.randn(6, 16) - 1, torch.randn(500, 16), n=2000)
        >>> pairs.za.shape, pairs.names
        (torch.Size([2000, 16]), ('concept',))
        >>> int(pairs.shared.sum())  # half are background, a half of the others comes from within a group
        500
    """
    where = "concept_pairs"
    groups = [("with_", with_), ("without", without)] + ([] if background is None else [("background", background)])
    for label, group in groups:
        check_floating(where, label, group)
        check_rank(where, label, group, "latents [n, dim]", 2)
        check_shape(where, label, group, (group.shape[0], with_.shape[1]), "like with_")
        check_dtype(where, label, group, with_.dtype, "like with_")
        if group.device != with_.device:
            raise ValueError(f"{where}: {label} is on {group.device}, expected {with_.device} like with_")
        if group.shape[0] < 2:
            raise ValueError(f"{where}: {label} has {group.shape[0]} latents, expected at least 2")
        if not torch.isfinite(group).all():
            raise ValueError(f"{where}: {label} has NaN or Inf, expected finite numbers")
    n, seed = checked_int(where, "n", n), checked_seed(where, seed)
    names = (name,) if rest is None else (name, rest)
    for label in names:
        check_name(f"{where}: name or rest is", label)
        if label == RESIDUAL:
            raise ValueError(
                f"{where}: name or rest has 'residual', which is what the concepts leave over; take another name"
            )
    if name == rest:
        raise ValueError(f"{where}: rest is {rest!r}, expected another name than the concept's")
    if rest is not None and len(with_) != len(without):
        raise ValueError(
            f"{where}: without has {len(without)} latents, expected {len(with_)} like with_: with a rest, with_[i] and "
            f"without[i] are the same but for the concept"
        )
    background_share = checked_number(where, "background_share", background_share, least=0, below=1)
    noise = checked_number(where, "noise", noise, least=0)

    random = torch.Generator().manual_seed(seed)
    spread = torch.cat([group for _, group in groups]).std(0)
    from_background = 0 if background is None else round(background_share * n)
    within = (n - from_background) // 2
    across = n - from_background - within
    counts = {"with_": within - within // 2, "without": within // 2}

    def draw(most: int, size: int) -> Tensor:
        return torch.randint(most, (size,), generator=random).to(with_.device)

    def two(group: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Two different rows of a group, ``size`` times."""
        a, step = draw(len(group), size), draw(len(group) - 1, size)
        return group[a], group[(a + 1 + step) % len(group)]

    parts = [two(group, counts[label]) for label, group in groups[:2]]
    a = draw(len(with_), across)
    b = a if rest is not None else draw(len(without), across)
    turned = draw(2, across).bool()[:, None]  # either group comes first
    parts.append((torch.where(turned, without[b], with_[a]), torch.where(turned, with_[a], without[b])))
    if background is not None:
        parts.append(two(background, from_background))
    za, zb = (torch.cat(side) for side in zip(*parts, strict=True))
    factor = torch.full((n,), -1, device=with_.device)
    factor[:within] = 0
    if rest is not None:
        factor[within : within + across] = 1
    if noise:
        drawn = torch.randn(2, *za.shape, generator=random, dtype=za.dtype).to(za.device)
        za, zb = za + noise * spread * drawn[0], zb + noise * spread * drawn[1]
    order = torch.randperm(n, generator=random).to(with_.device)
    shared = factor[:, None] == torch.arange(len(names), device=with_.device)
    return ConceptPairs(za[order], zb[order], shared[order], factor[order], names)
