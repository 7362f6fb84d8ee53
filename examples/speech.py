"""What a pretrained speaker encoder knows: Resemblyzer's, on voices that espeak-ng makes.

The encoder (Wan, Wang, Papir, Lopez Moreno, Generalized End-to-End Loss for Speaker Verification, ICASSP 2018) was trained to tell
speakers apart, whatever they say. espeak-ng speaks ten sentences in eight voices and three pitches, faster or slower, louder or
softer. How well can speaker, sentence and pitch be read from an embedding, and which of them can be swapped alone? Everything is
as it comes: the weights of the package, the default training of an IIN.

    apt install espeak-ng && pip install --no-deps resemblyzer     # the weights; its code needs packages that this one does not
    python examples/speech.py                                      # about seven minutes on one core
"""

import importlib.util
import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, write_results
from torch import Tensor, nn

import iin_fast
from iin_fast.data import Latents
from iin_fast.evaluate import evaluate
from iin_fast.train import Settings, train

VOICES = ("m1", "m3", "m7", "f1", "f2", "f3", "f5", "klatt2")
SENTENCES = (
    "The ship sails in the morning.",
    "My brother keeps two grey dogs.",
    "She left her umbrella on the train.",
    "We ate bread and cheese for lunch.",
    "The old clock has stopped again.",
    "Nobody knows what he is called.",
    "Please close the window behind you.",
    "It rained all night and all day.",
    "They bought a house by the river.",
    "This road goes up to the castle.",
)
PITCHES = (20, 50, 80)
CONCEPTS = ("speaker", "sentence", "pitch")
RATE = 16_000  # samples per second that the encoder hears
WINDOW, STEP, BANDS, FRAMES = 400, 160, 40, 160  # of its spectrogram: 25 and 10 ms; a piece of speech is 1.6 s


def say(text: str, voice: str, pitch: int, speed: int, volume: int) -> np.ndarray:
    """Sound of ``text`` from the first sound to the last, in [-1, 1], at 16 kHz."""
    from scipy.signal import resample_poly

    options = ["-v", f"en+{voice}", "-p", pitch, "-s", speed, "-a", volume]
    command = ["espeak-ng", *map(str, options), "--stdout", text]
    wave = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout[44:], "<i2") / 2**15
    first, *_, last = np.flatnonzero(np.abs(wave) > 0.01)
    return resample_poly(wave[first:last], 320, 441)  # espeak-ng speaks at 22,050 Hz


def spectrogram(wave: np.ndarray) -> np.ndarray:
    """Energy in 40 bands of the mel scale, ``[frames, 40]``, as Resemblyzer takes it with librosa."""
    padded = np.pad(wave, WINDOW // 2)
    starts = np.arange(0, len(padded) - WINDOW + 1, STEP)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(padded[starts[:, None] + np.arange(WINDOW)] * hann)) ** 2
    # Slaney's mel scale: linear up to 1000 Hz, which is 15, then 27 bands for each factor of 6.4.
    top = 15 + 27 * math.log(RATE / 2 / 1000) / math.log(6.4)
    mel = np.linspace(0, top, BANDS + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    frequency = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    rise = (frequency - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - frequency) / np.diff(edges)[1:, None]
    bands = np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return (power @ bands.T).astype(np.float32)


class Encoder(nn.Module):
    """Resemblyzer's network with the weights of its package: the mean embedding of the pieces of a sound, ``[256]``."""

    def __init__(self) -> None:
        super().__init__()
        found = importlib.util.find_spec("resemblyzer")
        if found is None or found.origin is None:
            raise SystemExit("no package resemblyzer; this example needs: pip install --no-deps resemblyzer")
        self.lstm, self.linear = nn.LSTM(BANDS, 256, 3, batch_first=True), nn.Linear(256, 256)
        weights = torch.load(Path(found.origin).parent / "pretrained.pt", map_location="cpu", weights_only=True)
        self.load_state_dict(weights["model_state"], strict=False)  # two numbers of its loss are left over

    @torch.no_grad()
    def forward(self, wave: np.ndarray) -> Tensor:
        level = np.sqrt(np.mean(wave**2))
        loud = wave * max(1.0, 10 ** (-30 / 20) / level)  # -30 dB at least
        bands = torch.from_numpy(spectrogram(np.pad(loud, (0, FRAMES * STEP))))
        count = max(1, round((len(wave) / STEP - FRAMES) / (FRAMES / 2)) + 1)  # pieces, each half over the next
        pieces = torch.stack([bands[start : start + FRAMES] for start in range(0, count * FRAMES // 2, FRAMES // 2)])
        embedded = self.linear(self.lstm(pieces)[1][0][-1]).relu()
        mean = (embedded / embedded.norm(dim=1, keepdim=True)).mean(0)
        return mean / mean.norm()


def draw_set(n: int, random: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Embeddings ``[n, 256]`` of random combinations, and speaker, sentence and pitch ``[n, 3]``."""
    labels = np.stack([random.integers(len(kinds), size=n) for kinds in (VOICES, SENTENCES, PITCHES)], 1)
    encoder = Encoder()
    embedded = [
        encoder(say(SENTENCES[s], VOICES[v], PITCHES[p], random.integers(130, 190), random.integers(60, 140)))
        for v, s, p in labels
    ]
    return torch.stack(embedded), labels


def agreement(z: Tensor, labels: np.ndarray, seed: int) -> dict[str, float]:
    """Covariance of pairs that share a concept (and differ in the others) over the variance."""
    pairs = iin_fast.PairSampler({name: labels[:, k] for k, name in enumerate(CONCEPTS)}, seed=seed).sample(20_000)
    x = z - z.mean(0)
    share = (x[pairs.a] * x[pairs.b]).sum(1) / (x**2).sum(1).mean()
    return {name: share[pairs.factor == k].mean().item() for k, name in enumerate(CONCEPTS)}


def study(z: Tensor, labels: np.ndarray, run: Path, seed: int, quick: bool) -> dict[str, Any]:
    """One split, one training with the default settings, all metrics."""
    order = np.random.default_rng([seed, 1]).permutation(len(z))
    learn, held = np.split(order, [round(0.7 * len(order))])
    shutil.rmtree(run, ignore_errors=True)
    settings = Settings(seed=seed, steps=20 if quick else None)
    model = train(Latents.of(z[learn], labels[learn], CONCEPTS), run, settings, accelerator="cpu")
    found = evaluate(
        model,
        z[held],
        labels[held],
        CONCEPTS,
        train_z=z[learn],
        train_labels=labels[learn],
        max_samples=150 if quick else 2000,
        seed=seed,
    )
    return {
        "sizes": model.sizes,
        "agreement": agreement(z[held], labels[held], seed),
        "swap": found["swap"],
        "leak": found["leak"]["iin"],
        "verdict": found["verdict"],
    }


def main(out: Path, *, quick: bool = False, seed: int = 0, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    started = time.perf_counter()
    z, labels = draw_set(150 if quick else 1600, np.random.default_rng(seed))
    chosen = seeds[:1] if quick else seeds
    results = {
        "rows": len(z),
        "dimensions": z.shape[1],
        "dead": int((z.abs().amax(0) == 0).sum()),
        "seeds": {str(seed + s): study(z, labels, out / f"seed{seed + s}", seed + s, quick) for s in chosen},
    }
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    given = arguments("speech", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
