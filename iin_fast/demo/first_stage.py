"""What the demo trains before the product comes in: an autoencoder to be interpreted, and a judge that reads its images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train.logs import Bar
from .data import PALETTE, ColoredPairs, Digits, draw_batch, read_color

__all__ = ["LATENT_DIM", "VAE", "Judge", "fit", "pair_latents", "train_judge", "train_vae"]

LATENT_DIM = 64


class VAE(nn.Module):
    """A convolutional variational autoencoder for images ``[batch, 3, 32, 32]`` in [0, 1].

    Args:
        dim: size of the latent z.
        width: channels of the first convolution; the deeper ones have two and four times as many.
    """

    def __init__(self, dim: int = LATENT_DIM, width: int = 24) -> None:
        super().__init__()
        self.dim = dim
        w1, w2, w3 = width, 2 * width, 4 * width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w1, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(w1, w2, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(w2, w3, 4, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(w3 * 16, 2 * dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(dim, w3 * 16),
            nn.SiLU(),
            nn.Unflatten(1, (w3, 4, 4)),
            nn.ConvTranspose2d(w3, w2, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(w2, w1, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(w1, 3, 4, 2, 1),
        )
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on the CPU

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | image), each ``[batch, dim]``."""
        mean, log_std = self.encoder(images).chunk(2, 1)
        return mean, log_std.clamp(-8, 4).exp()

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z of ``images``, ``[batch, dim]``: a draw from the posterior if there is a generator, else its mean."""
        mean, std = self.posterior(images)
        return mean if generator is None else mean + std * torch.randn(mean.shape, generator=generator)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images ``[batch, 3, 32, 32]`` in [0, 1] of ``z`` ``[batch, dim]``."""
        return self.decoder(z).sigmoid()

    def loss(self, images: Tensor, generator: torch.Generator, *, beta: float = 1.0, noise: float = 0.1) -> Tensor:
        """Negative evidence bound, mean over images: Gaussian pixels of deviation ``noise``, KL term times ``beta``."""
        mean, std = self.posterior(images)
        z = mean + std * torch.randn(mean.shape, generator=generator)
        error = F.mse_loss(self.decoder(z).sigmoid(), images, reduction="sum") / (2 * noise**2)
        divergence = 0.5 * (mean**2 + std**2 - 1).sum() - std.log().sum()
        return (error + beta * divergence) / len(images)


class Judge(nn.Sequential):
    """Logits of the digit ``[batch, 10]`` in images ``[batch, 3, 32, 32]``. Knows nothing of the VAE or of the IIN."""

    def __init__(self, width: int = 24) -> None:
        super().__init__(
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

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Probabilities of the digit and of the palette's colors; the color is measured, not learned."""
        near = -20 * torch.cdist(read_color(images), PALETTE)
        return {"digit": self(images).softmax(1), "color": near.softmax(1)}


def train_vae(vae: VAE, digits: Digits, *, steps: int, seed: int, batch: int = 64) -> None:
    """Trains ``vae`` on freshly jittered and colored ``digits``."""
    generator = torch.Generator().manual_seed(seed)
    fit(vae, lambda: vae.loss(draw_batch(digits, batch, generator)[0], generator), steps, "autoencoder")


def train_judge(judge: nn.Module, digits: Digits, *, steps: int, seed: int, batch: int = 64) -> None:
    """Trains ``judge``, a classifier of the digit, on freshly jittered and colored ``digits``."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        images, labels = draw_batch(digits, batch, generator)
        return F.cross_entropy(judge(images), labels)

    fit(judge, loss, steps, "judge")


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, name: str, lr: float = 2e-3) -> None:
    """Takes ``steps`` steps of Adam down ``loss``, which draws its own batch at each call; leaves ``model`` in eval mode."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    model.train()
    with Bar(steps, 0, True, name) as bar:
        for step in range(steps):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            bar.step(step + 1, f"loss {value.item():.2f}")
    model.eval()


def pair_latents(encoder: VAE, digits: Digits, n: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``n`` pairs of latents, drawn from the posterior of images that share the digit or the color.

    Returns:
        za ``[n, dim]``, zb ``[n, dim]``, shared ``[n, 2]``
    """
    pairs = ColoredPairs(digits, seed=seed)
    parts = []
    for begin in range(0, n, 400):
        a, b, shared = pairs.draw(min(400, n - begin))
        parts.append((encoder.encode(a, pairs.generator), encoder.encode(b, pairs.generator), shared))
    za, zb, shared = map(torch.cat, zip(*parts, strict=True))
    return za, zb, shared
