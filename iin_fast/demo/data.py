"""Colored handwritten digits, and pairs of them that share either the digit or the color."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FACTORS",
    "IMAGE_SIZE",
    "PALETTE",
    "ColoredPairs",
    "Digits",
    "colorize",
    "draw_batch",
    "draw_colors",
    "jitter",
    "load_digits",
    "paint",
    "read_color",
]

IMAGE_SIZE = 32
FACTORS = ("digit", "color")  # the order of the columns of ``shared`` and of labels
# What images with labels are painted in; pairs have colors of their own, which no label could name.
PALETTE = torch.tensor(
    [
        *((1.0, 0.15, 0.15), (1.0, 0.55, 0.1), (1.0, 0.95, 0.2), (0.2, 0.85, 0.25)),  # red, orange, yellow, green
        *((0.2, 0.9, 0.95), (0.25, 0.35, 1.0), (0.95, 0.3, 0.9), (0.95, 0.95, 0.95)),  # cyan, blue, magenta, white
    ]
)


@dataclass(frozen=True)
class Digits:
    """Digits without color.

    Args:
        shapes: how much ink each pixel holds, in [0, 1], ``[n, 1, 32, 32]``.
        labels: the digit, 0 to 9, ``[n]``.
    """

    shapes: Tensor  # [n, 1, 32, 32]
    labels: Tensor  # [n]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Digits:
        """The digits at ``index``, in that order."""
        return Digits(self.shapes[index], self.labels[index])


def load_digits(seed: int = 0, *, test_fraction: float = 0.25) -> tuple[Digits, Digits]:
    """Loads scikit-learn's 1797 handwritten digits as 32x32 shapes, split by image into train and test.

    The 8x8 originals are enlarged with a cubic kernel and their contrast is raised, which turns the blurred edges that
    enlarging leaves into strokes about one pixel sharp. Both parts hold every digit in the same proportion.

    Returns:
        train, test
    """
    from sklearn.datasets import load_digits as load_from_sklearn
    from sklearn.model_selection import train_test_split

    images, labels = load_from_sklearn(return_X_y=True)
    small = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    large = F.interpolate(F.pad(small, (1, 1, 1, 1)), size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    shapes = ((large - 0.2) / 0.5).clamp(0, 1)

    train, test = train_test_split(range(len(labels)), test_size=test_fraction, random_state=seed, stratify=labels)
    digits = Digits(shapes, torch.as_tensor(labels, dtype=torch.int64))
    return digits.take(torch.tensor(train)), digits.take(torch.tensor(test))


def draw_colors(n: int, generator: torch.Generator) -> Tensor:
    """Draws ``n`` colors, RGB in [0, 1], ``[n, 3]``.

    Hue and saturation come from a uniform point of the RGB cube; the brightness (the largest channel) is then drawn
    from [0.7, 1], because a nearly black digit on a black ground shows neither its shape nor its color.
    """
    colors = torch.rand(n, 3, generator=generator)
    brightness = 0.7 + 0.3 * torch.rand(n, 1, generator=generator)
    return colors / colors.amax(1, keepdim=True).clamp_min(1e-6) * brightness


def colorize(shapes: Tensor, colors: Tensor) -> Tensor:
    """Paints ``shapes`` ``[n, 1, h, w]`` in ``colors`` ``[n, 3]`` on black: images ``[n, 3, h, w]`` in [0, 1]."""
    return shapes * colors[:, :, None, None]


def jitter(shapes: Tensor, generator: torch.Generator) -> Tensor:
    """Turns, slants, scales and shifts each shape a little, as another hand would have written it.

    1300 images are too few for a flow with millions of weights; this keeps it from overfitting them.
    """
    n = len(shapes)
    uniform = torch.rand(n, 6, generator=generator) * 2 - 1
    angle, slant = 0.15 * uniform[:, 0], 0.15 * uniform[:, 1]
    width, height = 1 + 0.08 * uniform[:, 2], 1 + 0.08 * uniform[:, 3]
    shift = 0.05 * uniform[:, 4:]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    stretch = torch.stack([width, slant, torch.zeros(n), height], 1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn @ stretch, shift[:, :, None]], 2), list(shapes.shape), align_corners=False)
    return F.grid_sample(shapes, grid, align_corners=False)


def draw_batch(digits: Digits, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws ``batch`` digits, jittered and colored: images ``[batch, 3, 32, 32]`` and labels ``[batch]``."""
    index = torch.randint(len(digits), (batch,), generator=generator)
    shapes = jitter(digits.shapes[index], generator)
    return colorize(shapes, draw_colors(batch, generator)), digits.labels[index]


def paint(digits: Digits, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paints each digit ``rounds`` times, in colors of the palette: images, and digit and color ``[n, 2]``."""
    labels = digits.labels.repeat(rounds)
    color = torch.randint(len(PALETTE), (len(labels),), generator=generator)
    return colorize(digits.shapes.repeat(rounds, 1, 1, 1), PALETTE[color]), torch.stack([labels, color], 1)


def read_color(images: Tensor) -> Tensor:
    """The color of the ink in ``images`` ``[batch, 3, h, w]``: RGB in [0, 1], ``[batch, 3]``.

    The mean RGB over all pixels, each weighted by the fourth power of its intensity (its largest channel), so that the
    ink counts, the ground doesn't, and the half-inked edge of a stroke hardly does. On an original image it gives the
    color the digit was painted in to about 0.02.
    """
    weight = images.amax(1, keepdim=True) ** 4
    return (weight * images).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1e-8)


class ColoredPairs:
    """Draws pairs of colored images that share exactly one concept: the digit, or the color.

    The protocol of ColorfulMNIST (Esser, Rombach, Ommer 2020, section 4): a pair shares the digit and has two
    independent colors, or shares the color and shows two different digits.

    Args:
        digits: what to draw from.
        seed: of the drawing; the same seed gives the same pairs in the same order.
    """

    def __init__(self, digits: Digits, *, seed: int) -> None:
        self.digits = digits
        self.generator = torch.Generator().manual_seed(seed)
        order = digits.labels.argsort()
        self._by_label = order  # [n], the indices of all 0s, then of all 1s, ...
        counts = digits.labels.bincount(minlength=10)
        self._count, self._start = counts, counts.cumsum(0) - counts

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws ``batch`` pairs.

        Returns:
            images of the first of each pair ``[batch, 3, 32, 32]``, images of the second, and which concept each pair
            shares, a boolean ``[batch, 2]`` with the columns digit and color.
        """
        rng = self.generator
        first = torch.randint(len(self.digits), (batch,), generator=rng)
        label = self.digits.labels[first]
        share_digit = torch.rand(batch, generator=rng) < 0.5
        count = torch.where(share_digit, self._count[label], len(self.digits) - self._count[label])
        rank = (torch.rand(batch, generator=rng) * count).long().clamp_max(count - 1)
        # In the images sorted by label, "another digit" is all that follows this digit's run, continued at the front.
        run_end = self._start[label] + self._count[label]
        position = torch.where(share_digit, self._start[label] + rank, (run_end + rank) % len(self.digits))
        second = self._by_label[position]

        color_a, color_b = draw_colors(batch, rng), draw_colors(batch, rng)
        color_b = torch.where(share_digit[:, None], color_b, color_a)
        a = colorize(jitter(self.digits.shapes[first], rng), color_a)
        b = colorize(jitter(self.digits.shapes[second], rng), color_b)
        return a, b, torch.stack([share_digit, ~share_digit], 1)
