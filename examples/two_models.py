"""What two models of the same pictures know: an autoencoder and a classifier of colored digits.

The paper's comparison (Sec. 4.1, ColorMNIST): both models see the same colored digits, the autoencoder has to paint them
again, the classifier has to name the digit. How many dimensions their latents devote to digit and to color is estimated from
pairs that share one of them; then an IIN is trained on either latent, and swaps are judged the same way for both: by networks
that read digit and hue from latents. The classifier has no decoder: what its latents show is the picture with the nearest one.

    python examples/two_models.py        # a few minutes on one core
"""

import colorsys
import shutil
import time
from pathlib import Path
from typing import Any, cast

import torch
from common import arguments, write_results
from pictures import sheet
from torch import Tensor, nn

import iin_fast
from iin_fast.data import Latents, encode_all, from_layer
from iin_fast.demo.data import Digits, colorize, draw_colors, jitter, load_digits
from iin_fast.demo.first_stage import VAE, pair_latents, train_judge, train_vae
from iin_fast.evaluate import evaluate
from iin_fast.train import Settings, train

DIM = 64
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
CONCEPTS = ("digit", "color")


class Classifier(nn.Module):
    """Names the digit in a colored picture. ``neck`` is the latent that is looked at, before its ReLU."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.neck = nn.Linear(4 * width * 16, DIM)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the digit."""
        return self.head(self.neck(self.body(images)).relu())


class Neck:
    """The classifier's latent: its layer, and a little noise where a generator is given, as a VAE has it."""

    def __init__(self, classifier: Classifier, noise: float = 0.1) -> None:
        self.layer = from_layer(classifier, "neck")
        self.noise = noise

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z = self.layer.encode(images)
        if generator is None:
            return z
        return z + self.noise * z.std(0) * torch.randn(z.shape, generator=generator)


def hues(colors: Tensor) -> Tensor:
    """The nearest of six hues of colors ``[n, 3]``; -1 (unknown) for greyish ones, whose hue says little."""
    found = []
    for color in colors.tolist():
        hue, saturation, _ = colorsys.rgb_to_hsv(*color)
        found.append(round(hue * 6) % 6 if saturation > 0.4 else -1)
    return torch.tensor(found)


def paint(digits: Digits, random: torch.Generator, rounds: int) -> tuple[Tensor, Tensor]:
    """Every digit ``rounds`` times, in new strokes and colors: pictures, and digit and hue ``[n, 2]``."""
    shapes, labels = digits.shapes.repeat(rounds, 1, 1, 1), digits.labels.repeat(rounds)
    colors = draw_colors(len(labels), random)
    return colorize(jitter(shapes, random), colors), torch.stack([labels, hues(colors)], 1)


def sizes_of(za: Tensor, zb: Tensor, shared: Tensor) -> dict[str, Any]:
    """Dimensions of digit, color and residual by either estimate, and how much pairs agree."""
    factor = shared.int().argmax(1)
    sizes = {
        method: dict(
            zip(
                (*CONCEPTS, "residual"),
                iin_fast.estimate_factor_dims(za, zb, factor, method=cast(Any, method), n_factors=3),
                strict=True,
            )
        )
        for method in ("published", "paper")
    }
    agree = {}
    for k, name in enumerate(CONCEPTS):
        a, b = za[factor == k], zb[factor == k]
        a, b = a - a.mean(0), b - b.mean(0)
        agree[name] = ((a * b).mean(0).sum() / torch.cat([za, zb]).var(0).sum()).item()
    return {"sizes": sizes, "agreement": agree}


def study(
    encoder: Any,
    digits: Digits,
    test: Digits,
    run: Path,
    *,
    pairs: int,
    steps: int | None,
    rounds: int,
    most: int,
    seed: int,
) -> tuple[dict[str, Any], iin_fast.IIN]:
    """Sizes, an IIN with them, trained in the folder ``run``, and what its factors are worth on held-out digits."""
    za, zb, shared = pair_latents(encoder, digits, pairs, seed=seed)
    found = sizes_of(za, zb, shared)
    sizes = {name: found["sizes"]["published"][name] for name in CONCEPTS}
    shutil.rmtree(run, ignore_errors=True)
    data = Latents.of_pairs(za, zb, shared=shared, names=CONCEPTS)
    # The defaults but for three: the sizes are what is compared, pairs share their color exactly, and the patience was not tried since
    # it counts from three tenths of the steps on.
    model = train(
        data, run, Settings(sizes, rho=0.99, minutes=2.0, patience=0, steps=steps, seed=seed), accelerator="cpu"
    )
    random = torch.Generator().manual_seed(seed + 1)
    (images, labels), (test_images, test_labels) = paint(digits, random, rounds), paint(test, random, rounds)
    judged = evaluate(
        model,
        encode_all(encoder, test_images),
        test_labels,
        list(CONCEPTS),
        train_z=encode_all(encoder, images),
        train_labels=labels,
        max_samples=most,
        seed=seed,
    )
    found |= {"swap": judged["swap"], "leak": judged["leak"]["iin"]}
    return found, model


def main(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(seed)
    digits, test = load_digits(seed)
    vae, classifier = VAE(DIM, width=16 if quick else 32), Classifier()

    train_vae(vae, digits, steps=15 if quick else 2000, seed=seed)
    train_judge(classifier, digits, steps=15 if quick else 800, seed=seed)
    encoders = {"autoencoder": vae, "classifier": Neck(classifier)}
    settings: dict[str, Any] = {
        "pairs": 400 if quick else 20_000,
        "steps": 8 if quick else None,
        "rounds": 1 if quick else 4,
    }
    settings["most"] = 150 if quick else 2000
    found, models = {}, {}
    for name, encoder in encoders.items():
        found[name], models[name] = study(encoder, digits, test, out / name, **settings, seed=seed)

    images, labels = paint(test, torch.Generator().manual_seed(seed + 2), 1)
    with torch.no_grad():
        accuracy = (classifier(images).argmax(1) == labels[:, 0]).float().mean().item()
    draw(out / "two_models_swaps.png", encoders, models, images, labels)
    results = {"classifier accuracy": accuracy, "dimensions": DIM, "models": found}
    write_results(out, results, started)
    return results


@torch.no_grad()
def draw(path: Path, encoders: dict[str, Any], models: dict[str, Any], images: Tensor, labels: Tensor) -> None:
    """Six pictures that receive digit or color of another: decoded, or the nearest picture of all held-out ones."""
    rows = torch.stack([(labels[:, 0] == digit).nonzero()[0, 0] for digit in (2, 7, 4, 0, 9, 5)])
    donors = torch.stack([(labels[:, 0] == digit).nonzero()[1, 0] for digit in (8, 3, 1, 6, 5, 2)])
    columns, names = [images[rows], images[donors]], ["picture", "donor"]
    for name, encoder in encoders.items():
        z = encode_all(encoder, images)
        for concept in CONCEPTS:
            swapped = models[name].swap(z[rows], z[donors], concept)
            if hasattr(encoder, "decode"):
                columns.append(encoder.decode(swapped))
            else:
                columns.append(images[torch.cdist(swapped, z).argmin(1)])
            names.append(f"{concept},\n{name}")
    sheet(path, torch.stack(columns, 1), columns=names, zoom=2.6)


if __name__ == "__main__":
    given = arguments("two_models", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
