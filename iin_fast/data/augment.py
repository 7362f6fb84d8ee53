"""Pairs from a change that one can make to any sample: a style, a pitch, a crop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_int, checked_seed
from ..iin import ConceptPairs
from .adapters import Adapter
from .encode import encode_all

__all__ = ["augmentation_pairs"]


def augmentation_pairs(
    adapter: Adapter | Callable[[Any], Tensor],
    x: Any,
    augment: Callable[[Any, int], Any],
    *,
    styles: int = 8,
    n: int = 10_000,
    name: str = "style",
    rest: str = "content",
    batch: int = 256,
    seed: int = 0,
) -> ConceptPairs:
    """Creates pairs for training out of a change that a function makes: no labels are needed.

    Every sample is changed in each of ``styles`` ways and encoded. Half of the pairs are two samples in one style, which share
    ``name``; the others are one sample in two styles, which share ``rest``.

    Args:
        adapter: of :func:`encode_all`.
        x: samples ``[k, …]``, two at least, as :func:`encode_all` takes them; all in memory.
        augment: ``augment(x, style)`` gives all of ``x`` changed in way ``style``, an integer from 0. The same style has to be the
            same change (the same colours, the same pitch) of any sample.
        styles: how many ways, 2 at least.
        n: number of pairs.
        name, rest: of the factors for what changes and for what stays.
        batch: inputs per call of the model.
        seed: of the drawing.

    Returns:
        pairs; ``np.savez(file, za=pairs.za, zb=pairs.zb, shared=pairs.shared, names=pairs.names)`` is what ``iin-fast train`` reads.

    Raises:
        TypeError, ValueError: as :func:`encode_all`; too few samples or styles, an ``augment`` that gives another number of them.

    References:
        Esser, Rombach, Ommer, CVPR 2020, Sec. 3.2 (there a style transfer changes pictures).

    Example:
        >>> pairs = augmentation_pairs(lambda x: x * 1.0, torch.randn(20, 4), lambda x, style: x + style, n=100)
        >>> pairs.names, pairs.shared.sum(0).tolist()
        (('style', 'content'), [50, 50])
    """
    where = "augmentation_pairs"
    styles, n = checked_int(where, "styles", styles, least=2), checked_int(where, "n", n, least=2)
    samples = len(x)
    if samples < 2:
        raise ValueError(f"{where}: x has {samples} samples, expected two at least")
    if name == rest:
        raise ValueError(f"{where}: rest is {rest!r}, expected another name than that of the style")
    encoded = []
    for number in range(styles):
        encoded.append(encode_all(adapter, augment(x, number), batch))
        if len(encoded[-1]) != samples:
            raise ValueError(
                f"{where}: augment(x, {number}) gives {len(encoded[-1])} samples, expected {samples} like x"
            )
    z = torch.stack(encoded)  # [styles, samples, dim]
    random = torch.Generator().manual_seed(checked_seed(where, seed))

    def two(most: int, size: int) -> tuple[Tensor, Tensor]:
        a = torch.randint(most, (size,), generator=random)
        return a, (a + 1 + torch.randint(most - 1, (size,), generator=random)) % most

    within, across = n - n // 2, n // 2
    style, (first, second) = torch.randint(styles, (within,), generator=random), two(samples, within)
    sample, (one, other) = torch.randint(samples, (across,), generator=random), two(styles, across)
    za, zb = torch.cat([z[style, first], z[one, sample]]), torch.cat([z[style, second], z[other, sample]])
    factor = torch.cat([torch.zeros(within, dtype=torch.int64), torch.ones(across, dtype=torch.int64)])
    order = torch.randperm(n, generator=random)
    shared = factor[:, None] == torch.arange(2)
    return ConceptPairs(za[order], zb[order], shared[order], factor[order], (name, rest))
