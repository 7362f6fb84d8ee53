"""Shapes with known factors: how disentangled an autoencoder's latents are, before and after T.

Drawn on the fly in the manner of dSprites (Matthey et al. 2017): one of three shapes in one of three sizes, four directions
and four by four places, with some play within each class. A small convolutional autoencoder compresses them, knowing nothing
of the factors; an IIN on its latents is trained with no option. DCI, MIG and SAP are taken on held-out
pictures: for dimensions of z, for principal components, for the IIN's factors. A network that saw only pictures judges swaps.

    python examples/shapes.py        # a few minutes on one core
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, write_results
from pictures import sheet
from torch import Tensor, nn

from iin_fast import IIN
from iin_fast.data import Latents, encode_all
from iin_fast.evaluate import evaluate
from iin_fast.train import Settings
from iin_fast.train import train as train_iin

CLASSES = {"shape": 3, "size": 3, "direction": 4, "x": 4, "y": 4}
SIDE = 32


def draw(labels: Tensor, random: torch.Generator) -> Tensor:
    """Pictures ``[n, 1, 32, 32]`` in [0, 1] of classes ``[n, 5]``, with play of a third of a step around each class."""
    play = (torch.rand(labels.shape, generator=random) - 0.5) / 1.5
    place = (labels + play) / torch.tensor([float(n) for n in CLASSES.values()])  # 0 to 1 over the classes
    size = 4.6 + 4.6 * place[:, 1]
    angle = 2 * math.pi * place[:, 2]
    center = 11.5 + 9 * (place[:, 3:] + 0.5 / 4)
    grid = torch.arange(SIDE) + 0.5
    x = grid[None, None, :] - center[:, 0, None, None]
    y = grid[None, :, None] - center[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u, v = cos * x + sin * y, cos * y - sin * x  # the shape's own axes
    r = size[:, None, None]
    # Signed distances, negative inside, of shapes that no turn maps onto themselves.
    wedge = torch.maximum(-u - 0.6 * r, (u + 2 * v.abs() - r) / math.sqrt(5))  # a triangle that points along u
    half = torch.maximum((u**2 + v**2).sqrt() - r, -u)  # half a disc
    leg = torch.maximum((u + 0.6 * r).abs() - 0.3 * r, v.abs() - r)
    foot = torch.maximum(u.abs() - 0.9 * r, (v - 0.7 * r).abs() - 0.3 * r)
    corner = torch.minimum(leg, foot)  # an L
    distance = torch.stack([wedge, half, corner])[labels[:, 0], torch.arange(len(labels))]
    return (0.5 - distance).clamp(0, 1)[:, None]


def draw_set(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures and their classes ``[n, 5]``, all combinations alike."""
    labels = torch.stack([torch.randint(size, (n,), generator=random) for size in CLASSES.values()], 1)
    return draw(labels, random), labels


class Autoencoder(nn.Module):
    """Pictures to latents and back; a little noise on the latents keeps them from being crowded."""

    def __init__(self, dim: int = 20, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 4, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 2 * dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(dim, 2 * width * 16),
            nn.SiLU(),
            nn.Unflatten(1, (2 * width, 4, 4)),
            nn.ConvTranspose2d(2 * width, 2 * width, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        mean: Tensor = self.encoder(images).chunk(2, 1)[0]
        return mean

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        images: Tensor = self.decoder(z).sigmoid()
        return images

    def loss(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Cross-entropy of pixels plus a quarter of the KL divergence from N(0, 1), per picture."""
        mean, log_std = self.encoder(images).chunk(2, 1)
        log_std = log_std.clamp(-6, 2)
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=random)
        error = F.binary_cross_entropy_with_logits(self.decoder(z), images, reduction="sum")
        divergence = 0.5 * (mean**2 + (2 * log_std).exp() - 1).sum() - log_std.sum()
        return (error + 0.25 * divergence) / len(images)


class Judge(nn.Module):
    """Reads all factors from a picture; knows neither autoencoder nor IIN."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 128),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(128, size) for name, size in CLASSES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {name: head(features) for name, head in self.heads.items()}

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        read = self(images)
        losses = [F.cross_entropy(read[name], labels[:, k]) for k, name in enumerate(CLASSES)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def read(self, images: Any) -> dict[str, Tensor]:
        return {name: logits.softmax(1) for name, logits in self(images).items()}


def train(model: nn.Module, loss_of: Any, steps: int, lr: float) -> float:
    """Steps down ``loss_of()``; the mean of the last tenth of the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10) :]))


def pictures_of(out: Path, model: IIN, decode: Callable[[Tensor], Tensor], images: Tensor, z: Tensor) -> None:
    """Pictures that receive each factor of a donor."""
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    own, donor = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    columns = [images[own], images[donor], decode(z[own])]
    with torch.no_grad():
        columns += [decode(model.swap(z[own], z[donor], name)) for name in model.sizes]
    names = ["picture", "donor", "decoded", *model.sizes]
    sheet(out / "shapes_swaps.png", torch.stack(columns, 1), columns=names, zoom=2)


def scores(found: dict[str, Any], system: str, single: bool) -> dict[str, float]:
    """DCI, MIG and SAP of whole factors, or of single dimensions as the papers have them."""
    dci, mig, sap = (
        found[key][system]["dimensions"] if single else found[key][system] for key in ("dci", "mig", "sap")
    )
    parts = {key: dci[key] for key in ("disentanglement", "completeness", "informativeness")}
    return {**parts, "MIG": mig["mig"], "SAP": sap["sap"]}


def main(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    steps = {"autoencoder": 15, "judge": 15} if quick else {"autoencoder": 3000, "judge": 1200}
    n_train, n_test = (400, 300) if quick else (12_000, 2500)

    autoencoder, judge = Autoencoder(), Judge()
    error = train(autoencoder, lambda: autoencoder.loss(draw_set(64, random)[0], random), steps["autoencoder"], 3e-3)
    train(judge.train(), lambda: judge.loss(*draw_set(64, random)), steps["judge"], 3e-3)

    images, labels = draw_set(n_train, random)
    test_images, test_labels = draw_set(n_test, random)
    z, test_z = encode_all(autoencoder, images), encode_all(autoencoder, test_images)
    mean, scale = z.mean(0), z.std(0)
    z, test_z = (z - mean) / scale, (test_z - mean) / scale

    def decode(latents: Tensor) -> Tensor:
        return autoencoder.decode(torch.as_tensor(latents, dtype=torch.float32) * scale + mean)

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(seed=seed, steps=20 if quick else None)
        model = train_iin(Latents.of(z, labels, list(CLASSES)), Path(folder) / "run", settings, accelerator="cpu")

    found = evaluate(
        model,
        test_z,
        test_labels,
        list(CLASSES),
        train_z=z,
        train_labels=labels,
        decoder=decode,
        judge=judge.read,
        max_samples=150 if quick else 2000,
        seed=seed,
    )
    pictures_of(out, model, decode, test_images, test_z)
    results = {
        "pictures": {"train": n_train, "held out": n_test},
        "autoencoder": {"loss": error, "dimensions": z.shape[1]},
        "sizes": model.sizes,
        "swap": found["swap"],
        "scores": {
            kind: {system: scores(found, system, single) for system in ("raw", "pca", "iin")}
            for kind, single in (("factors", False), ("dimensions", True))
        },
        "likelihood": found["likelihood"],
    }
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    given = arguments("shapes", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
