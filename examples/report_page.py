"""From a file of latents to a page about them: the report that docs/metrics.md shows.

scikit-learn's handwritten digits in four colors, 8 × 8 × 3 numbers each, and their 32 principal components as the latent: an
autoencoder that is done in a line, with its decoder. An IIN learns digit and color on 1500 digits; metrics and pictures are of
the others, none of whose strokes it has seen. Few latents: noise keeps it from overfitting them.

    python examples/report_page.py        # a few minutes; runs/report_page/run/report.html

With Chromium or Chrome at hand the page is photographed as well, on a desk and on a phone.
"""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, write_results
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from iin_fast.data import save_arrays
from iin_fast.train import Settings, run_folder, train

COLORS = np.array([(1.0, 0.24, 0.2), (0.24, 0.82, 0.29), (0.25, 0.43, 0.94), (0.95, 0.77, 0.2)])
CONCEPTS = ["digit", "color"]
DIM = 32
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def paint(shapes: Any, digits: Any) -> tuple[Any, Any]:
    """Each digit in each color, in no order: pictures ``[4 n, 192]``, and digit and color ``[4 n, 2]``."""
    order = np.random.default_rng(0).permutation(len(COLORS) * len(shapes))
    color, row = order // len(shapes), order % len(shapes)
    pictures = shapes[row][..., None] * COLORS[color][:, None, None]
    return pictures.reshape(len(order), -1), np.stack([digits[row], color], 1)


def photograph(page: Path, picture: Path, width: int, most: int = 100_000) -> bool:
    """The page, ``width`` wide and at most ``most`` high, as a PNG; False where there is no browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return False
    # A frame of that width, as windows of a browser may not be narrower than 500; its end is found by the color of the page.
    height = 12000 if width < 600 else 7000
    frame = picture.with_suffix(".frame.html")
    style = f"border:0;width:{width}px;height:{height}px"
    frame.write_text(f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" style="{style}"></iframe>')
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    command = [browser, *options, f"--screenshot={picture.resolve()}", frame.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    frame.unlink()
    shot = Image.open(picture).convert("RGB")
    pixels = np.asarray(shot)
    written = np.flatnonzero((pixels != pixels[-1]).any(axis=(1, 2)))
    shot.crop((0, 0, width, min(int(written[-1]) + 40, most))).quantize(256).save(picture, optimize=True)
    return True


def main(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.images))
    (pictures, labels), (others, other_labels) = (
        paint(digits.images[rows] / 16, digits.target[rows]) for rows in (order[:1500], order[1500:])
    )
    mean = pictures.mean(0)
    basis = np.linalg.svd(pictures - mean, full_matrices=False)[2][:DIM]
    learned, held_out = (
        save_arrays(
            out / f"{name}.npz",
            {"z": ((x - mean) @ basis.T).astype(np.float32), "labels": y, "names": np.array(CONCEPTS)},
        )
        for name, x, y in (("colored_digits", pictures, labels), ("other_digits", others, other_labels))
    )

    def decode(z: Tensor) -> Tensor:
        return (z.double() @ torch.from_numpy(basis) + torch.from_numpy(mean)).reshape(-1, 8, 8, 3).clamp(0, 1)

    settings = Settings(seed=seed, **({"steps": 30, "n_flows": 2, "hidden_dim": 32} if quick else {}))
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    train(learned, run, settings, progress=not quick)
    found = run_folder.evaluate(run, held_out, max_samples=60 if quick else 1000, seed=seed)
    page = run_folder.report(run, held_out, decoder=decode)
    for name, *size in (("report", 1100), ("report_top", 1100, 1480), ("report_phone", 390)):
        if not quick and not photograph(page, out / f"{name}.png", *size):
            print("no browser found: the page is not photographed")
            break
    results = {
        "swaps that give the concept and keep the other": {
            name: {who: found["swap"][who][name]["both"] for who in ("iin", "mean_shift", "linear_iin", "pca", "raw")}
            for name in CONCEPTS
        },
        "nats per dimension": found["likelihood"],
    }
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    options = arguments("report_page", __doc__ or "")
    main(options.out, quick=options.quick, seed=options.seed)
