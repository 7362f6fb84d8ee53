"""Who decides whether a swap worked: a classifier that reads the digit, and a formula that reads the color."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Digits, draw_batch
from .training import train

__all__ = ["Judge", "read_color", "train_judge"]


class Judge(nn.Module):
    """Reads the digit from a colored image. Knows nothing of the VAE or of the IIN."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * width * 16, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[batch, 10]`` of images ``[batch, 3, 32, 32]``."""
        return self.net(images)

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """The digit in each image, ``[batch]``."""
        return self(images).argmax(1)


def read_color(images: Tensor) -> Tensor:
    """The color of the ink in ``images`` ``[batch, 3, h, w]``: RGB in [0, 1], ``[batch, 3]``.

    The mean RGB over all pixels, each weighted by the fourth power of its intensity (its largest channel), so that the
    ink counts, the ground doesn't, and the half-inked edge of a stroke hardly does. On an original image it gives the
    color the digit was painted in to about 0.02.
    """
    weight = images.amax(1, keepdim=True) ** 4
    return (weight * images).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1e-8)


def train_judge(
    judge: Judge, digits: Digits, *, steps: int, seed: int, batch: int = 64, lr: float = 2e-3
) -> Iterator[float]:
    """Trains ``judge`` on freshly jittered and colored ``digits``; yields the loss of every step, in nats per image."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        images, labels = draw_batch(digits, batch, generator)
        return F.cross_entropy(judge(images), labels)

    return train(judge, loss, torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=1e-2), steps)
