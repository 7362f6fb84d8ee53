"""Numbers that say how well factors are swapped, and the baseline that does without an IIN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import iin_fast

from .. import evaluate as metrics
from .data import Digits, colorize, draw_colors
from .first_stage import VAE
from .judge import Judge, read_color

__all__ = [
    "HeldOut",
    "MeanShift",
    "Swap",
    "iin_swap",
    "invertibility_error",
    "likelihoods",
    "reconstruction_scores",
    "score_swaps",
]

# (factor, index of the images that keep the rest, index of the images that give the factor) -> z ``[n, dim]``
Swap = Callable[[str, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Colored images with their latents: what the pictures show and the numbers are taken on.

    Args:
        images: ``[n, 3, 32, 32]``.
        labels: the digit, ``[n]``.
        colors: the color each was painted in, ``[n, 3]``.
        z: the posterior mean, ``[n, dim]``.
    """

    images: Tensor  # [n, 3, 32, 32]
    labels: Tensor  # [n]
    colors: Tensor  # [n, 3]
    z: Tensor  # [n, dim]

    @classmethod
    def of(cls, vae: VAE, digits: Digits, *, seed: int) -> HeldOut:
        """Paints every digit in one random color and encodes it."""
        colors = draw_colors(len(digits), torch.Generator().manual_seed(seed))
        images = colorize(digits.shapes, colors)
        return cls(images, digits.labels, colors, vae.encode(images))

    def __len__(self) -> int:
        return len(self.labels)


def iin_swap(model: iin_fast.IIN, data: HeldOut) -> Swap:
    """The swap between images of ``data`` in the factor space of ``model``."""

    @torch.no_grad()
    def swap(factor: str, keeper: Tensor, donor: Tensor) -> Tensor:
        return model.swap(data.z[keeper], data.z[donor], factor)

    return swap


class MeanShift:
    """The baseline: swaps by a shift of z, without an IIN.

    A digit swap adds the difference between the mean z of the two digits. Colors are continuous and so have no classes
    to average over; their means are the straight line through z fitted by least squares, and a color swap adds the
    difference between its two values. Unlike the IIN, which sees only z, the baseline is told the digits and colors of
    the images it swaps between.

    Args:
        train: what the means are taken on.
    """

    def __init__(self, train: HeldOut) -> None:
        self.digit_means = torch.stack([train.z[train.labels == digit].mean(0) for digit in range(10)])  # [10, dim]
        centred = train.colors - train.colors.mean(0)
        self.color_slopes = torch.linalg.lstsq(centred, train.z - train.z.mean(0)).solution  # [3, dim]

    def on(self, data: HeldOut) -> Swap:
        """The swap between images of ``data``."""

        def swap(factor: str, keeper: Tensor, donor: Tensor) -> Tensor:
            if factor == "digit":
                return data.z[keeper] + self.digit_means[data.labels[donor]] - self.digit_means[data.labels[keeper]]
            return data.z[keeper] + (data.colors[donor] - data.colors[keeper]) @ self.color_slopes

        return swap


def score_swaps(swap: Swap, data: HeldOut, vae: VAE, judge: Judge, *, seed: int, rounds: int = 4) -> dict[str, float]:
    """Swaps digit and color between held-out images and lets the judge read the results.

    Every image keeps its rest ``rounds`` times and receives the factor of a random image that shows another digit.
    Colors are compared as ``read_color`` reads them, as the mean absolute difference over R, G and B, in [0, 1].

    Returns:
        swap_digit_accuracy: share of digit swaps in which the judge reads the donor's digit.
        swap_digit_color_error: distance of the swapped image's color to the color before.
        swap_color_accuracy: share of color swaps in which the judge still reads the digit it was.
        swap_color_error: distance of the swapped image's color to the donor's.
    """
    keeper = torch.arange(len(data)).repeat(rounds)
    donor = _other_digit(data.labels, rounds, torch.Generator().manual_seed(seed))
    color = read_color(data.images)
    with_digit, with_color = vae.decode(swap("digit", keeper, donor)), vae.decode(swap("color", keeper, donor))
    return {
        "swap_digit_accuracy": (judge.read(with_digit) == data.labels[donor]).float().mean().item(),
        "swap_digit_color_error": (read_color(with_digit) - color[keeper]).abs().mean().item(),
        "swap_color_accuracy": (judge.read(with_color) == data.labels[keeper]).float().mean().item(),
        "swap_color_error": (read_color(with_color) - color[donor]).abs().mean().item(),
    }


def reconstruction_scores(data: HeldOut, vae: VAE, judge: Judge) -> dict[str, float]:
    """What bounds every swap: how well the originals are read, and what encoding and decoding alone already costs.

    Returns:
        judge_accuracy: share of originals that the judge reads right.
        reconstruction_accuracy: the same for their reconstructions.
        reconstruction_color_error: distance of the reconstruction's color to the original's.
    """
    images = vae.decode(data.z)
    return {
        "judge_accuracy": (judge.read(data.images) == data.labels).float().mean().item(),
        "reconstruction_accuracy": (judge.read(images) == data.labels).float().mean().item(),
        "reconstruction_color_error": (read_color(images) - read_color(data.images)).abs().mean().item(),
    }


def likelihoods(
    iin: iin_fast.IIN, unsupervised: iin_fast.IIN, vae: VAE, data: HeldOut, *, seed: int
) -> dict[str, float]:
    """Negative log-likelihood of held-out latents, drawn from the posterior as in training, in nats per dimension.

    Returns:
        nll_nats_per_dim of ``iin``, unsupervised_nll_nats_per_dim of ``unsupervised``, and normal_nll_nats_per_dim of
        N(0, I), the prior that the VAE itself assumes.
    """
    z = vae.encode(data.images, torch.Generator().manual_seed(seed))
    return {
        "nll_nats_per_dim": metrics.nats_per_dim(iin, z),
        "unsupervised_nll_nats_per_dim": metrics.nats_per_dim(unsupervised, z),
        "normal_nll_nats_per_dim": metrics.normal_nats_per_dim(z),
    }


def invertibility_error(iin: iin_fast.IIN, data: HeldOut) -> float:
    """max |T^-1(T(z)) - z| over the latents of ``data``."""
    return metrics.invertibility_error(iin, data.z)["max"]


def _other_digit(labels: Tensor, rounds: int, generator: torch.Generator) -> Tensor:
    """For each image, ``rounds`` times over, the index of a random image with another digit, ``[rounds * n]``."""
    differs = (labels[:, None] != labels[None, :]).float()
    return torch.multinomial(differs, rounds, replacement=True, generator=generator).T.reshape(-1)
