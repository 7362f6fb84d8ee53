"""Rows of up to a million terms, and how far from the truth a sum of them may lie."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["check_sums", "long_terms"]


def long_terms(dtype: torch.dtype, *, most: int = 1_000_000) -> Iterator[Tensor]:
    """Terms [2, n], equal and random, with and without cancellation."""
    generator = torch.Generator().manual_seed(0)
    for n in (70_001, 196_608, 999_983, 1_000_000):
        if n > most:
            continue
        equal = torch.tensor([[-1.7779], [0.1]], dtype=torch.float64).expand(2, n)
        random = torch.randn(2, n, generator=generator, dtype=torch.float64)
        for terms in (equal, random, random.abs()):
            yield terms.to(dtype)


def check_sums(got: Tensor, terms: Tensor) -> None:
    """At most twice the error of torch.sum, where that is more than the rounding of the result or of its largest parts."""
    truth = [math.fsum(row) for row in terms.tolist()]
    eps = torch.finfo(got.dtype).eps
    for ours, torchs, true, row in zip(got.tolist(), terms.sum(1).tolist(), truth, terms.double(), strict=True):
        bound = max(2 * abs(torchs - true), eps * max(abs(true), row.norm().item()))
        assert abs(ours - true) <= bound, f"{row.numel()} terms: {ours!r} for {true!r}, torch {torchs!r}"
