"""The pretrained model whose latent space is to be interpreted: a small convolutional VAE of colored digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Digits, draw_batch
from .training import train

__all__ = ["LATENT_DIM", "VAE", "train_vae"]

LATENT_DIM = 64


class VAE(nn.Module):
    """A convolutional variational autoencoder for images ``[batch, 3, 32, 32]`` in [0, 1].

    Args:
        dim: size of the latent z.
        width: channels of the first convolution; the deeper ones have two and four times as many.
    """

    def __init__(self, dim: int = LATENT_DIM, width: int = 32) -> None:
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

    def loss(self, images: Tensor, generator: torch.Generator, *, beta: float, noise: float = 0.1) -> Tensor:
        """Negative evidence bound, mean over images: Gaussian pixels of deviation ``noise``, KL term times ``beta``."""
        mean, std = self.posterior(images)
        z = mean + std * torch.randn(mean.shape, generator=generator)
        error = F.mse_loss(self.decoder(z).sigmoid(), images, reduction="sum") / (2 * noise**2)
        divergence = 0.5 * (mean**2 + std**2 - 1).sum() - std.log().sum()
        return (error + beta * divergence) / len(images)


def train_vae(
    vae: VAE, digits: Digits, *, steps: int, seed: int, batch: int = 64, lr: float = 2e-3, beta: float = 1.0
) -> Iterator[float]:
    """Trains ``vae`` on freshly jittered and colored ``digits``; yields the loss of every step, in nats per image."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        images, _ = draw_batch(digits, batch, generator)
        return vae.loss(images, generator, beta=beta)

    return train(vae, loss, torch.optim.Adam(vae.parameters(), lr=lr), steps)
