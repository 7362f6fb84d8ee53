"""The report: a page of its own, with what a run folder holds, in images, texts or words."""

import json
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

import iin_fast
from iin_fast.evaluate import write_evaluation
from iin_fast.report import write_report
from iin_fast.report.samples import Shown
from iin_fast.report.sheets import as_images, grid
from iin_fast.report.write import _log

NAMES = ["shape", "<color>"]


class Tags(HTMLParser):
    """Counts what is opened, and fails on what is closed in another order."""

    VOID = {"meta", "img", "source", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def latents():
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randint(3, (160,), generator=generator), torch.arange(160) % 2], 1)
    z = torch.randn(160, 8, generator=generator) + 2 * labels @ torch.randn(2, 8, generator=generator).round().long()
    return z, labels, NAMES


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run folder, to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(latents, tmp_path_factory):
    """A run folder as a training leaves it, with an evaluation."""
    tmp_path = tmp_path_factory.mktemp("finished")
    z, labels, _ = latents
    factors = {"shape": 3, "<color>": 2}
    model = iin_fast.IIN(8, factors, n_flows=1, hidden_dim=8, generator=torch.Generator().manual_seed(1))
    model(z)
    model.save(tmp_path)
    record = {
        "latents": {"path": "/data/secret place/latents.npz", "sha256": "ab" * 32},
        "n": 160,
        "dim": 8,
        "names": NAMES,
        "settings": {"rho": 0.95, "note": "<b>"},
        "steps": 12,
        "machine": "a machine",
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "logs").mkdir()
    head = "step,loss,nats_per_dim,learning_rate,samples_per_second,held_out_loss,held_out_nats_per_dim\n"
    lines = [f"{i},{20 - i},{2 - i / 10},0.1,{100 + i},{30 - i if i % 5 == 0 else ''},\n" for i in range(1, 13)]
    (tmp_path / "logs" / "metrics.csv").write_text(head + "".join(lines))
    np.savez(tmp_path / "split.npz", train=np.arange(100), held_out=np.arange(100, 160))
    write_evaluation(tmp_path, z[100:], labels[100:], NAMES, train_z=z[:100], train_labels=labels[:100])
    return tmp_path


def test_a_speed_that_varies_is_called_noise(run):
    log = run / "logs" / "metrics.csv"
    log.write_text(log.read_text().replace(",112,", ",203,"))  # 101 to 203
    assert "noise of the machine" in write_report(run).read_text()


def decoder(z):
    return z.abs().reshape(-1, 2, 4).unsqueeze(1).expand(-1, 3, -1, -1)


def test_page_is_whole_and_needs_nothing_else(run, latents):
    path = write_report(run, latents=latents, decoder=decoder)
    assert path == run / "report.html"
    text = path.read_text()
    tags = Tags(text)
    for name, value in tags.attributes:
        if name in ("src", "srcset"):
            assert value.startswith("data:image/png;base64,iVBOR")
        assert name not in ("href", "onload", "onclick")
    assert "<script" not in text and "http" not in text and "@import" not in text and "url(" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "/data" not in text and "latents.npz" in text  # a page may be passed on: it shows names, not folders
    assert "&lt;color&gt;" in text and "<color>" not in text and "<b>," not in text
    assert "nan" not in re.sub(r'base64,[^"]*', "", text).lower().replace("linear", "")
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Swapping one factor",
        "From one sample to another, one factor at a time",
        "Metrics",
        "What each factor knows",
        "Who got how many dimensions",
        "Training",
        "How it was made, how fast",
    ]
    # Two grids of swaps, the two ends and four ways between them, two plots in two colors.
    assert text.count("base64,") == 2 + 1 + 4 + 4


def test_numbers_are_those_of_the_evaluation(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    text = write_report(run).read_text()
    assert "<th>linear IIN</th>" in text
    for verdict in evaluation["verdict"].values():
        assert f"<li>{escape(verdict['text'])}.</li>" in text
    for who in ("iin", "mean_shift", "linear_iin", "raw", "pca"):
        assert f"{evaluation['swap'][who]['shape']['both']:.0%}" in text
    assert f"{evaluation['likelihood']['iin']:.3f} nats per dimension" in text
    assert f"{evaluation['information']['iin']['nats']['shape']['<color>']:.2f} nats" in text
    assert "(median; slowest\n101, fastest 112)" in text and "noise of the machine" not in text


def leaves(found, place=()):
    """Where each leaf of nested dictionaries and lists is, and what it is; and where each key is, with None."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if isinstance(value, dict | list):
            yield from leaves(value, (*place, key))
        else:
            yield (*place, key), value


def test_no_markup_of_an_evaluation_reaches_the_page(run):
    """Texts, names and numbers of evaluation.json may come from anywhere; what is no number where one is shown raises."""
    shutil.rmtree(run / "logs")
    whole = json.loads((run / "evaluation.json").read_text())
    assert len(list(leaves(whole))) > 100
    texts = 0
    for place, _ in leaves(whole):
        found = json.loads(json.dumps(whole))
        inner = found
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = '<i class="x">\'&'
        (run / "evaluation.json").write_text(json.dumps(found))
        try:
            text = write_report(run).read_text()
        except ValueError as error:
            assert "damaged or of another version" in str(error), place
            continue
        assert "<i" not in text, place
        texts += "class=&#34;x&#34;&gt;&#39;&amp;" in text
    assert texts >= len(whole["verdict"]) + 1  # the verdicts, and the source of the samples, are shown


def test_an_evaluation_without_the_linear_iin_is_shown(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["verdict"]
    for metric in ("swap", "information", "dci", "mig", "sap", "leak", "correlation"):
        del evaluation[metric]["linear_iin"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = write_report(run).read_text()
    assert "<th>linear IIN</th>" not in text and "<th>mean shift</th>" in text


def test_a_linear_model_has_a_report_too(latents, tmp_path):
    z, labels, names = latents
    sampler = iin_fast.PairSampler(labels, names=names, others="any")
    iin_fast.LinearIIN.fit(z, sampler).save(tmp_path)
    found = write_evaluation(tmp_path, z[100:], labels[100:], names, train_z=z[:100], train_labels=labels[:100])
    assert found["factors"]["shape"] == 1  # its classes lie on a line
    text = write_report(tmp_path, latents=latents, decoder=decoder).read_text()
    assert "a linear map, computed from pairs" in text


def test_settings_read_as_words(run):
    from iin_fast.train import Settings

    record = json.loads((run / "run.json").read_text())
    record["settings"] = Settings({"shape": 3}, preset="paper", context="digit", unlabelled=0.5).record()
    record |= {"factors": {"shape": 3}, "versions": {"torch": "2.0"}, "format": "iin_fast.run"}
    (run / "run.json").write_text(json.dumps(record))
    text = write_report(run).read_text()
    names = re.findall(r"<tr><td>([^<]*)</td><td>", text[text.index("How it was made") :])
    assert {"correlation of a shared factor (ρ)", "share held out", "dimensions of shape", "version of torch"} <= set(
        names
    )
    assert not any("_" in name or "settings" in name or name == "format" for name in names)


def test_best_of_a_row_follows_its_direction(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    for who, leaked, gap in (
        ("iin", 0.9, 0.1),
        ("raw", 0.2, 0.7),
        ("pca", 0.5, 0.3),
        ("linear_iin", 0.6, 0.2),
    ):
        evaluation["leak"][who]["shape"]["linear"], evaluation["mig"][who]["mig"] = leaked, gap
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = write_report(run).read_text()
    assert re.search(r'Leak of shape, a linear probe.*?<td class="best">(.*?)</td>', text)[1] == "20%"
    assert re.search(r'Information gap.*?<td class="best">(.*?)</td>', text)[1] == "70%"


def test_without_decoder_the_nearest_sample_stands_in(run, latents):
    z, labels, names = latents
    text = write_report(run, latents=SimpleNamespace(z=z, labels=labels, names=names)).read_text()
    assert "There is no decoder" in text and "<b>shape " in text and text.count("base64,") == 4
    texts = [f"sentence {i} & more" for i in range(160)]
    text = write_report(run, latents=latents, images=texts).read_text()
    shown = {int(i) for i in re.findall(r"sentence (\d+) &amp; more", text)}
    assert shown and min(shown) >= 100  # held out
    images = np.random.default_rng(0).integers(0, 256, (160, 5, 4), dtype=np.uint8)
    text = write_report(run, latents=latents, images=images).read_text()
    assert "There is no decoder" in text and text.count("base64,") == 11


def test_nearest_sample_is_neither_of_the_two_it_was_made_of(run, latents):
    shown = Shown(iin_fast.IIN.load(run), latents, None, None, run / "split.npz")
    assert shown.nearest(shown.z[[4, 7]]) == [4, 7]
    found = shown.nearest(shown.z[[4]], [[4, 9]])[0]
    distance = torch.cdist(shown.z[[4]], shown.z)[0]
    assert found == [i for i in distance.argsort().tolist() if i not in (4, 9)][0]


def test_samples_shown_are_of_as_many_classes_as_there_are(run, latents):
    z, labels, names = latents
    labels = labels.clone()
    labels[100:110, 0] = -1
    shown = Shown(iin_fast.IIN.load(run), (z, labels, names), None, None, run / "split.npz")
    chosen = shown.varied("shape", 3)
    assert sorted(shown.labels[chosen, 0]) == [0, 1, 2]
    assert not set(shown.varied("shape", 5, chosen)) & set(chosen)


def test_samples_come_from_all_over_a_sorted_file_and_are_always_the_same(run):
    z = torch.arange(400.0)[:, None] + torch.zeros(iin_fast.IIN.load(run).dim)
    labels, names = torch.arange(400)[:, None] // 200, ["half"]
    model = iin_fast.IIN.load(run)
    data = SimpleNamespace(z=z, labels=labels, names=names, classes={"half": ("first", "second")})
    shown, again = (Shown(model, data, None, None, None) for _ in range(2))
    for concept in ("half", None):
        rows = shown.z[shown.varied(concept, 10), 0]
        assert torch.equal(rows, again.z[again.varied(concept, 10), 0]) and rows.unique().numel() == 10
        assert (rows % 200).max() > 100
    assert {shown.label(i) for i in shown.varied("half", 2)} == {"half first", "half second"}


def test_what_a_folder_lacks_is_left_out(run, latents):
    for name in ("evaluation.json", "run.json", "split.npz", "logs/metrics.csv"):
        (run / name).unlink()
        Tags(write_report(run, latents=latents).read_text())
    text = write_report(run).read_text()
    assert "There are none yet" in text and "base64," not in text and "Swapping" not in text
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        write_report(run)


def test_unsupervised_model_and_latents_without_labels(tmp_path, latents):
    model = iin_fast.IIN(8, n_flows=1, hidden_dim=8, generator=torch.Generator().manual_seed(1))
    model(latents[0])
    model.save(tmp_path)
    text = write_report(tmp_path, latents=(latents[0], None, None), decoder=decoder).read_text()
    assert "Swapping" not in text and "all factors" in text and "independent normal" in text


def test_what_does_not_fit_is_refused(run, latents):
    z, labels, names = latents
    with pytest.raises(TypeError, match="latents is a str"):
        write_report(run, latents="latents.npz")
    with pytest.raises(ValueError, match=r"z of shape \[160, 7\], expected \[n, 8\]"):
        write_report(run, latents=(z[:, :7], labels, names))
    with pytest.raises(ValueError, match=r"labels of shape \[160, 2\], expected \[160, 1\]"):
        write_report(run, latents=(z, labels, names[:1]))
    with pytest.raises(ValueError, match="images has 3 samples, expected 160"):
        write_report(run, latents=latents, images=["a", "b", "c"])
    with pytest.raises(ValueError, match="images have shape"):
        write_report(run, latents=latents, decoder=lambda z: z)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="evaluation.json: damaged"):
        write_report(run)


def test_log_skips_blanks_and_names_a_damaged_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,held_out_loss\n1,2.5,\n2,nan,3\n")
    assert _log(path) == {"loss": ([1.0], [2.5]), "held_out_loss": ([2.0], [3.0])}
    path.write_text("step,loss\n1,2.5\n2,x\n")
    with pytest.raises(ValueError, match="metrics.csv: line 3 is damaged"):
        _log(path)


@pytest.mark.parametrize(
    "images",
    [
        np.full((2, 4, 6), 0.5),
        np.full((2, 4, 6, 3), 0.5),
        torch.full((2, 3, 4, 6), 0.5),
        torch.full((2, 1, 4, 6), 0.5, dtype=torch.bfloat16),
        [torch.full((4, 6), 0.5), torch.full((4, 6), 0.5)],
    ],
)
def test_images_come_in_any_layout(images):
    assert np.array_equal(as_images(images), np.full((2, 4, 6, 3), 0.5))


def test_bytes_and_grids():
    images = as_images(np.full((6, 4, 4), 255, dtype=np.uint8))
    sheet = grid(images.reshape(2, 3, 4, 4, 3))
    assert sheet.shape == (2 * 4 + 1, 3 * 4 + 2, 4)
    assert sheet[..., 3].sum() == 6 * 16 and sheet[4].sum() == 0  # gaps are seen through
