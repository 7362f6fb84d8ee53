"""The commands: each does what its Python function does, and fails in one line with exit code 2."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folder import metrics, record

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import typer
from typer.testing import CliRunner

from iin_fast import IIN, concept_pairs
from iin_fast.cli import app
from iin_fast.cli.settings import docstring_entries, settings_options
from iin_fast.data import Latents, load_latents, save_arrays
from iin_fast.evaluate import evaluate
from iin_fast.train import Settings, run_folder, split_rows, train

COMMANDS = ("train", "dims", "encode", "decode", "swap", "interpolate", "axis", "sample", "score", "evaluate", "report")
SMALL = "--n-flows 2 --hidden-dim 16 --batch 16 --learning-rate 3e-3 --accelerator cpu".split()


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    sizes = {"n_flows": 2, "hidden_dim": 16, "batch": 16}
    settings = Settings({"digit": 3, "color": 2}, preset="paper", steps=60, learning_rate=3e-3, **sizes)
    train(file, folder, settings, accelerator="cpu")
    return folder


def test_every_command_has_a_help():
    code, output = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in output
        code, text = run(command, "--help")
        assert code == 0 and "Usage" in text


def test_train_tells_a_logger(file, tmp_path):
    code = "from lightning_fabric.loggers import CSVLogger\n"
    code += f"def make(): return CSVLogger({str(tmp_path)!r}, name='mine', flush_logs_every_n_steps=1)\n"
    (tmp_path / "loggers.py").write_text(code)
    options = ["--factors", "digit=3, color=2", "--steps", 4, *SMALL, "--logger", f"{tmp_path / 'loggers.py'}:make"]
    code, output = run("train", file, "--out", tmp_path / "run", *options)
    assert code == 0, output
    assert "loss" in (tmp_path / "mine" / "version_0" / "metrics.csv").read_text()
    code, output = run("train", file, "--out", tmp_path / "other", "--logger", "nowhere", *SMALL)
    assert code == 2 and "nowhere" in output and not (tmp_path / "other").exists()


def test_train(file, tmp_path):
    code, output = run("train", file, "--out", tmp_path / "run", "--factors", "digit=3, color=2", "--steps", 20, *SMALL)
    assert code == 0, output
    assert "digit" in output and "residual" in output and "iin-fast evaluate" in output
    assert IIN.load(tmp_path / "run").sizes == {"digit": 3, "color": 2, "residual": 3}
    assert record(tmp_path / "run")["latents"]["path"] == str(file)
    again = ("train", file, "--out", tmp_path / "run", "--factors", "digit=3,color=2", "--steps", 20, *SMALL)
    code, output = run(*again)
    assert code == 2 and "holds a run already" in output
    assert run(*again, "--resume")[0] == 0


def test_a_training_says_what_it_is_before_its_first_step(file, tmp_path):
    words = ("--factors", "digit=3", "--steps", 20, "--n-flows", 2, "--hidden-dim", 16, "--lr", 1e-3, "--device", "cpu")
    code, output = run("train", file, "--out", tmp_path / "run", *words)
    assert code == 0, output
    lines = output.splitlines()
    assert lines[0].split() == "latents 600 rows × 8 features: 540 to train on, 60 held out".split()
    assert lines[1].split()[:3] == ["digit", "4", "classes:"] and lines[2].split()[:3] == ["color", "3", "classes:"]
    color = record(tmp_path / "run")["factors"]["color"]
    assert lines[3].split() == f"factors digit 3 (given), color {color} (linear), residual {5 - color}".split()
    parameters = sum(p.numel() for p in IIN.load(tmp_path / "run").parameters())
    assert lines[4].split() == f"network 2 blocks of width 16, {parameters:,} parameters".split()
    assert lines[5].startswith("device      cpu") and lines[6] == f"run folder  {tmp_path / 'run'}"
    assert record(tmp_path / "run")["settings"]["learning_rate"] == 1e-3


def test_resume_alone_goes_on_and_takes_more_steps(file, tmp_path):
    folder = tmp_path / "run"
    words = ("--factors", "digit=3,color=2", "--preset", "paper", "--seed", 3, *SMALL)
    assert run("train", file, "--out", folder, "--steps", 20, *words)[0] == 0
    before = record(folder)
    code, output = run("train", "--out", folder, "--resume", "--device", "cpu")
    assert code == 0 and record(folder)["settings"] == before["settings"], output
    assert run("train", "--out", folder, "--resume", "--steps", 40, "--device", "cpu")[0] == 0
    found = record(folder)
    assert found["steps"] == 40 and {**found["settings"], "steps": 20} == before["settings"]
    assert metrics(folder)[-1]["step"] == "40"
    code, output = run("train", "--out", folder, "--resume", "--rho", 0.5)
    assert code == 2 and "rho is 0.5, but the run in" in output
    code, output = run("train", "--out", tmp_path / "new", "--resume")
    assert code == 2 and "latents are missing" in output
    code, output = run("train", "--out", tmp_path / "new")
    assert code == 2 and "LATENTS is missing" in output


def test_force_trains_anew_and_epochs_count_rows(file, tmp_path):
    folder = tmp_path / "run"
    words = ("--factors", "digit=3,color=2", *SMALL)
    assert run("train", file, "--out", folder, "--steps", 8, *words)[0] == 0
    (folder / "mine.txt").write_text("stays")
    code, output = run("train", file, "--out", folder, "--epochs", 2, "--force", *words)
    assert code == 0, output
    assert record(folder)["steps"] == round(2 * 540 / 32) and (folder / "mine.txt").read_text() == "stays"
    assert [path.name for path in (folder / "state").iterdir()] == ["step-000000034"]
    code, output = run("train", file, "--out", folder, "--epochs", 2, "--steps", 3, "--force", *words)
    assert code == 2 and "epochs is 2.0 and steps is 3, expected one of them" in output
    code, output = run("train", file, "--out", folder, "--device", "abacus", "--force")
    assert code == 2 and "device is 'abacus', expected 'cpu', 'cuda' or 'cuda:1'" in output
    assert (folder / "model.safetensors").exists()


def test_a_sample_to_train_on_and_shards_to_go_through(latents, tmp_path):
    place, folder = tmp_path / "large", tmp_path / "run"
    place.mkdir()
    for name, array in {"z": latents.z, "digit": latents.labels[:, 0], "color": latents.labels[:, 1]}.items():
        np.save(place / f"{name}.npy", array)
    code, output = run("train", place, "--out", folder, "--steps", 20, "--rows", 300, *SMALL)
    assert code == 0 and "300 rows × 8 features" in output and "at random from 600 rows" in output, output
    found = record(folder)["latents"]
    assert (found["rows"], found["of"], found["path"]) == (300, 600, str(place))
    assert run("train", "--out", folder, "--resume", "--steps", 30, "--device", "cpu")[0] == 0
    assert record(folder)["latents"] == found
    code, output = run("evaluate", folder, "--max-samples", 100)
    assert code == 0 and json.loads((folder / "evaluation.json").read_text())["samples"]["scored"] == 30, output
    for command in ("encode", "score"):
        parts = []
        for i in range(3):
            assert run(command, folder, place, "--shard", f"{i}/3", "--out", tmp_path / f"{i}.npz")[0] == 0
            parts.append(np.load(tmp_path / f"{i}.npz"))
        assert run(command, folder, place, "--out", tmp_path / "all.npz")[0] == 0
        for name, whole in np.load(tmp_path / "all.npz").items():
            np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), whole, rtol=1e-4, atol=1e-4)
    code, output = run("encode", folder, place, "--shard", "3", "--out", tmp_path / "x.npz")
    assert code == 2 and "--shard is '3', expected a part and their number like 0/8" in output


def test_every_setting_is_an_option():
    """A field of Settings needs no more than its line and its entry in the docstring."""

    @dataclass(frozen=True)
    class More(Settings):
        """More settings.

        Args:
            ENTRIES
            tempo: steps with :attr:`a.rate` that rises from ``"none"``, to
                all of it, in [0, 1].
            careful: a flag.
            sure: another.
        """

        tempo: float | None = 0.5
        careful: bool = False
        sure: bool = True

    own = "\n            ".join(f"{field.name}: of {field.name}." for field in fields(Settings))
    More.__doc__ = More.__doc__.replace("ENTRIES", own)
    asked = []

    def show(settings):
        """Show."""
        asked.append(settings)

    app = typer.Typer()
    app.command()(settings_options(show, More))

    def ask(*words):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return result.output

    ask()
    words = "--tempo 0.2 --careful --no-sure --factors a=1,b=2 --rho 0.9 --context c --standardise".split()
    ask(*words)
    given = {"factors": {"a": 1, "b": 2}, "rho": 0.9, "context": "c", "standardise": True}
    assert asked == [More(), More(**given, tempo=0.2, careful=True, sure=False)]
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ask("--help")).split())
    assert "steps with a.rate that rises from none, to all of it, in [0, 1] [default: 0.5]" in text
    assert "of seed [default: 0]" in text


def test_the_settings_say_what_each_option_is():
    assert list(docstring_entries(Settings.__doc__)) == [field.name for field in fields(Settings)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "nope"), "context is 'nope', expected a concept of the latents: digit, color"),
        (("--held-out", "-0.5"), "held_out is -0.5, expected 0 to below 1"),
        (("--held-out", "5"), "held_out is 5.0, expected 0 to below 1"),
        (("--method", "foo"), "method is 'foo', expected 'linear', 'published' or 'paper'"),
    ],
)
def test_dims_refuses_what_is_out_of_range(file, words, message):
    code, output = run("dims", file, *words)
    assert code == 2 and message in output, output


def test_dims(file, latents):
    code, output = run("dims", file)
    assert code == 0
    for method in ("linear", "published", "paper"):
        sizes = run_folder.dims(latents, method=method)
        assert sum(sizes.values()) == 8
        assert method in output and f"{method} is recommended" in output or method != "linear"
        for name, size in sizes.items():
            assert re.search(rf"{name}.*\b{size}\b", output)


def test_dims_of_several_layers_side_by_side(file, latents, tmp_path):
    """A layer that mirrors color alone gives it more of its dimensions."""
    color = latents.labels[:, 1]
    z = torch.nn.functional.one_hot(color, 3).float() @ torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    z = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    layer = save_arrays(tmp_path / "layer.npz", {"z": z, "labels": latents.labels, "names": np.array(latents.names)})
    code, output = run("dims", file, layer, "--compare", "--plot", tmp_path / "new" / "dims.png")
    assert code == 0, output
    found = run_folder.compare_dims([file, layer])
    assert list(found) == ["latents", "layer"] and found["latents"] == run_folder.dims(latents)
    assert found["layer"]["color"] == 2 and found["layer"]["color"] / 6 > found["layer"]["digit"] / 6
    assert f"{found['layer']['color']} (33%)" in output and "latents" in output and "layer" in output
    assert (tmp_path / "new" / "dims.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "b").mkdir()
    other = save_arrays(tmp_path / "b" / "layer.npz", {"z": latents.z, "labels": latents.labels})
    assert list(run_folder.compare_dims([layer, other])) == [str(layer)[:-4], str(other)[:-4]]
    for words in ((file, layer), (file, "--plot", tmp_path / "x.png")):
        code, output = run("dims", *words)
        assert code == 2 and "need --compare" in output


@pytest.mark.parametrize("method", ["linear", "published"])
@pytest.mark.parametrize("kind", ["labels", "missing", "pairs"])
def test_dims_are_the_sizes_that_train_takes(kind, method, settings, tmp_path):
    """What is held out has no say in either: here it alone has anything in common."""
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(200, 20, generator=generator), torch.randint(0, 4, (200, 2), generator=generator)
    if kind == "missing":
        labels[::3] = -1

    def made():
        if kind == "pairs":
            return Latents.of_pairs(z[:100], z[100:], torch.arange(100) % 2)
        return Latents.of(z, labels)

    held = split_rows(made(), 0.5, seed=3)[1]
    same = torch.arange(50).repeat(2) if kind == "pairs" else labels[held, 0]
    z[held] = 9 * torch.randn(50, 20, generator=generator)[same]
    options = {"others": "any", "seed": 3}
    data = made()
    settings = settings(factors=None, steps=1, held_out=0.5, dims_method=method, **options)
    model = train(data, tmp_path / "run", settings, accelerator="cpu")
    options["method"] = method
    assert (
        run_folder.dims(data, held_out=0.5, **options) == model.sizes != run_folder.dims(data, held_out=0.0, **options)
    )


def test_encode_and_decode(trained, file, latents, tmp_path):
    for ending in (".npz", ".safetensors"):
        factors, back = tmp_path / f"factors{ending}", tmp_path / f"back{ending}"
        code, output = run("encode", trained, file, "--out", factors)
        assert code == 0 and "600 samples in digit 3, color 2, residual 3" in output
        assert run("decode", trained, factors, "--out", back)[0] == 0
        assert torch.allclose(load_latents(back).z, latents.z, atol=1e-4)
    with torch.no_grad():
        expected = IIN.load(trained).encode(latents.z)
    found = np.load(tmp_path / "factors.npz")
    assert set(found) == {"digit", "color", "residual"}
    for name, part in expected.items():
        assert np.allclose(found[name], part, atol=1e-5)
    assert torch.allclose(run_folder.decode(trained, run_folder.encode(trained, latents)), latents.z, atol=1e-4)


def test_swap(trained, file, latents, tmp_path):
    out = tmp_path / "out.npz"
    code, output = run("swap", trained, file, "--factor", "digit", "--out", out, "--seed", 4)
    assert code == 0 and "600 latents with another's digit" in output
    z, donor = (torch.from_numpy(np.load(out)[key]) for key in ("z", "donor"))
    assert sorted(donor.tolist()) == list(range(600)) and (donor != torch.arange(600)).all()
    factors, before = run_folder.encode(trained, out), run_folder.encode(trained, latents)
    assert torch.allclose(factors["digit"], before["digit"][donor], atol=1e-3)
    assert torch.allclose(factors["color"], before["color"], atol=1e-3)
    assert torch.allclose(factors["residual"], before["residual"], atol=1e-3)
    given = save_arrays(tmp_path / "donors.npz", {"z": latents.z.flip(0)})
    code, _ = run("swap", trained, file, "--factor", "digit", "--factor", "color", "--donors", given, "--out", out)
    assert code == 0
    with torch.no_grad():
        expected = IIN.load(trained).swap(latents.z, latents.z.flip(0), ["digit", "color"])
    assert np.allclose(np.load(out)["z"], expected, atol=1e-5)


def test_interpolate_and_sample(trained, file, latents, tmp_path):
    out = tmp_path / "way.npz"
    rows = ("--start", 0, "--end", 5, "--start", 1, "--end", 9)
    assert run("interpolate", trained, file, *rows, "--factor", "color", "--steps", 5, "--out", out)[0] == 0
    model = IIN.load(trained)
    with torch.no_grad():
        expected = model.interpolate(latents.z[[0, 1]], latents.z[[5, 9]], 5, "color")
    found = np.load(out)
    assert np.allclose(found["z"].reshape(2, 5, 8), expected.transpose(0, 1), atol=1e-5)
    assert found["position"].tolist() == [0, 0.25, 0.5, 0.75, 1] * 2
    assert np.allclose(found["z"][0], latents.z[0], atol=1e-4)
    assert run("interpolate", trained, file, *rows, "--out", out)[0] == 0
    assert np.allclose(np.load(out)["z"][8], latents.z[5], atol=1e-4)

    assert run("sample", trained, "--n", 7, "--seed", 3, "--out", out)[0] == 0
    expected = model.sample(7, torch.Generator().manual_seed(3))
    assert np.array_equal(np.load(out)["z"], expected)


def test_axis(trained, latents, tmp_path):
    """From one digit to another: in the factor digit, and not in color."""
    digit = latents.labels[:, 0]
    groups = {k: save_arrays(tmp_path / f"{k}.npz", {"z": latents.z[digit == k]}) for k in (0, 1)}
    some = save_arrays(tmp_path / "some.npz", {"z": latents.z[digit == 0][:5]})
    words = ("--with", groups[1], "--without", groups[0], "--factor", "digit", "--position", 0, "--position", 2)
    code, output = run("axis", trained, some, *words, "--out", tmp_path / "way.npz")
    assert code == 0 and "10 latents, 2 for each of 5" in output, output
    way = np.load(tmp_path / "way.npz")
    assert way["position"].tolist() == [0, 2] * 5
    model = IIN.load(trained)
    with torch.no_grad():
        direction = model.axis(latents.z[digit == 1], latents.z[digit == 0], "digit")
        start, end = model.encode(latents.z[digit == 0][:5]), model.encode(torch.from_numpy(way["z"][1::2]))
    assert direction.norm() > 0.1
    torch.testing.assert_close(end.tensor, start.tensor + 2 * direction, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(way["z"][::2]), latents.z[digit == 0][:5], rtol=0, atol=1e-4)


def test_evaluate_and_report(trained, file, latents, tmp_path):
    code, output = run("evaluate", trained, "--max-samples", 100)
    assert code == 0, output
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["samples"] == {"scored": 60, "learned_on": 540, "source": "training samples", "most": 100}
    assert f"nats per dimension: {found['likelihood']['iin']:.3f}" in output
    assert f"{found['swap']['iin']['digit']['both']:.2f}" in output and "leak of color" in output

    code, output = run("report", trained)
    assert code == 0 and "report.html" in output
    text = (trained / "report.html").read_text()
    assert "Swapping one factor" in text and "There is no decoder" in text and "60 held-out latents" in text
    (tmp_path / "mine.py").write_text("def decode(z):\n    return z.abs().reshape(-1, 2, 4)\n")
    assert run("report", trained, "--decoder", f"{tmp_path / 'mine.py'}:decode")[0] == 0
    assert "There is no decoder" not in (trained / "report.html").read_text()

    # Latents that the training has not seen are all held out, and all may be shown.
    labels = torch.full((600, 1), 7)
    labels[np.load(trained / "split.npz")["train"][:2], 0] = torch.tensor([8, 9])
    shown = save_arrays(tmp_path / "shown.npz", {"z": latents.z + 0.01, "labels": labels, "names": ["digit"]})
    assert run("report", trained, "--latents", shown)[0] == 0
    assert {"digit 8", "digit 9"} <= set(re.findall(r"digit \d", (trained / "report.html").read_text()))
    other = save_arrays(tmp_path / "other.npz", {"z": latents.z[:99] + 0.01, "labels": latents.labels[:99, :1]})
    code, output = run("evaluate", trained, other, "--max-samples", 60)
    assert code == 0, output
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["samples"]["source"] == "half of the held-out samples" and found["concepts"] == ["0"]


def test_evaluate_learns_on_latents_that_are_named(trained, latents, tmp_path):
    def saved(name, rows, names):
        z, labels = latents.z[rows] + 0.01, latents.labels[rows]
        return save_arrays(tmp_path / name, {"z": z, "labels": labels, "names": np.array(names)})

    held = saved("held.npz", slice(0, 99), ["digit", "color"])
    learn = saved("learn.npz", slice(99, 400), ["digit", "color"])
    code, output = run("evaluate", trained, held, "--learn-on", learn, "--max-samples", 60)
    assert code == 0, output
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["samples"]["scored"] == 99 and found["samples"]["learned_on"] == 301
    judged = evaluate(
        IIN.load(trained),
        *(load_latents(held).z, latents.labels[:99], ["digit", "color"]),
        train_z=load_latents(learn).z,
        train_labels=latents.labels[99:400],
        max_samples=60,
    )
    assert json.loads(json.dumps(judged)) == found
    others = saved("others.npz", slice(99, 400), ["digit", "hue"])
    code, output = run("evaluate", trained, held, "--learn-on", others)
    assert code == 2 and "learn_on has labels of ['digit', 'hue'], expected those of ['digit', 'color']" in output


def test_evaluate_with_a_judge_of_what_a_decoder_makes(trained, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import torch\n"
        "def decode(z):\n    return z.reshape(-1, 2, 4)\n"
        "def judge(images):\n"
        "    assert images.shape[1:] == (2, 4)\n"
        "    always = torch.eye(4)[0].repeat(len(images), 1)\n"
        "    return {'digit': always, 'color': always[:, :3]}\n"
    )
    places = ("--decoder", f"{mine}:decode", "--judge", f"{mine}:judge")
    code, output = run("evaluate", trained, *places, "--max-samples", 60)
    assert code == 0, output
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["swap"]["judge"] == pytest.approx({"digit": 1 / 4, "color": 1 / 3})  # it always says 0
    decode, judge = (run_folder.load_function(f"{mine}:{name}") for name in ("decode", "judge"))
    assert found == run_folder.evaluate(trained, decoder=decode, judge=judge, max_samples=60)


@pytest.mark.parametrize("kind", ["pairs", "alone"])
def test_without_labels(kind, latents, tmp_path):
    pairs = {"za": latents.z[:300], "zb": latents.z[300:], "factor": np.arange(300) % 2, "names": np.array(["a", "b"])}
    file = save_arrays(tmp_path / "z.npz", pairs if kind == "pairs" else {"z": latents.z})
    folder = tmp_path / "run"
    code, output = run("train", file, "--out", folder, "--steps", 10, *SMALL)
    assert code == 0, output
    code, output = run("evaluate", folder)
    assert code == 0 and "nats per dimension" in output and "swap" not in output
    assert ("pairs that do not share a" in output) == (kind == "pairs")
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["samples"]["scored"] == 60 and found["samples"]["learned_on"] == 540
    z, held = load_latents(file).z, np.load(folder / "split.npz")["held_out"]
    with torch.no_grad():
        nats = -IIN.load(folder).log_prob(z[held]).mean().item() / 8
    assert found["likelihood"]["iin"] == pytest.approx(nats, rel=1e-4)
    distance = found["frechet"]
    assert distance["n"] == 60 and distance["in"] == "latents" and distance["iin"] > 0
    assert "Fréchet distance from 60 held-out ones, in latents" in output
    (tmp_path / "mine.py").write_text("def decode(z):\n    return z[:, :3]\ndef read(x):\n    return x * 2\n")
    mine = ("--decoder", f"{tmp_path / 'mine.py'}:decode", "--features", f"{tmp_path / 'mine.py'}:read")
    assert "in features" in run("evaluate", folder, *mine)[1]
    assert 0 < json.loads((folder / "evaluation.json").read_text())["frechet"]["train"] < 4 * distance["train"]
    assert run("evaluate", folder)[0] == 0
    assert run("report", folder)[0] == 0
    text = (folder / "report.html").read_text()
    assert "mean shift" not in text.lower() and "nearest sample" not in text
    assert ("There is nothing to show a swap with" in text) == (kind == "pairs")  # the other has no factors
    if kind == "alone":
        assert "no labels that could say more" in text
        return
    assert "Pairs that share a" in text and "What pairs have in common" in text
    own = found["pairs"]["iin"]["shared"]["a"]["a"]
    assert '<td style="background' in text and f">{own:.2f}</td>" in text
    # Pairs that the training has not seen: one half learns, the other is scored, and both samples go to one side.
    other = save_arrays(tmp_path / "other.npz", {**pairs, "za": latents.z[:300] + 0.01})
    code, output = run("evaluate", folder, other)
    assert code == 0, output
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["pairs"]["n"] == 150 and found["samples"]["source"] == "half of the held-out samples"


def test_from_a_table_to_numbers_of_a_continuous_concept(latents, tmp_path):
    """A CSV with texts and a number per sample, and other rows in which a text is missing."""
    pytest.importorskip("pyarrow")
    size = latents.z @ torch.linspace(-1, 1, 8)
    head = ",".join([*(f"z{k}" for k in range(8)), "animal", "size"])
    lines = [
        ",".join([*(f"{x:.9g}" for x in z), ["ant", "bee", "cat", "dog"][digit], f"{value:.9g}"])
        for z, digit, value in zip(latents.z.tolist(), latents.labels[:, 0].tolist(), size.tolist(), strict=True)
    ]
    (tmp_path / "all.csv").write_text("\n".join([head, *lines]))
    (tmp_path / "some.csv").write_text("\n".join([head, *(line for line in lines if "ant" not in line)]))
    folder = tmp_path / "run"
    code, output = run("train", tmp_path / "all.csv", "--out", folder, "--steps", 60, "--accelerator", "cpu")
    assert code == 0 and "'size' is continuous" in output and "latents are the 8 columns z0 … z7" in output, output
    assert record(folder)["classes"] == {"animal": ["ant", "bee", "cat", "dog"]}
    code, output = run("evaluate", folder, "--max-samples", 200)
    assert code == 0 and "size from size" in output, output
    found = json.loads((folder / "evaluation.json").read_text())["values"]["iin"]
    assert found["size"]["size"] > 0.8 and found["size"]["size"] > found["residual"]["size"]
    code, output = run("evaluate", folder, tmp_path / "some.csv", "--max-samples", 200)
    assert code == 0, output
    assert run_folder._latents(tmp_path / "some.csv", folder).labels[:, 0].unique().tolist() == [1, 2, 3]


def test_a_run_knows_the_columns_of_its_table(latents, tmp_path):
    """Columns in another order, a few rows and shards, labels of another kind: what is a feature says the run."""
    frames = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    names = ["ash", "acid", "proline", "hue", "malic", "phenols", "tint", "tannin"]
    table = frames.DataFrame(latents.z.numpy().astype(float), columns=names)
    table["proline"] = (100 * table["proline"]).round().astype(int)
    table["cultivar"] = np.array(["ant", "bee", "cat", "dog"])[latents.labels[:, 0]]
    table.to_csv(tmp_path / "all.csv", index=False)
    table[[*names[::-1], "cultivar"]].to_csv(tmp_path / "turned.csv", index=False)
    table[:5].assign(cultivar=range(5)).to_csv(tmp_path / "few.csv", index=False)
    table.drop(columns="hue").to_csv(tmp_path / "less.csv", index=False)
    small = ("--steps", 4, "--n-flows", 1, "--hidden-dim", 8)
    code, output = run("train", tmp_path / "all.csv", "--out", tmp_path / "run", *small)
    assert code == 0 and record(tmp_path / "run")["columns"] == names, output
    whole = run_folder.encode(tmp_path / "run", tmp_path / "all.csv").tensor
    for source, rows in (("turned.csv", 600), ("few.csv", 5)):
        assert torch.equal(run_folder.encode(tmp_path / "run", tmp_path / source).tensor, whole[:rows])
    turned = Latents.of(table[[*names[::-1], "cultivar"]])
    assert torch.allclose(run_folder.encode(tmp_path / "run", turned).tensor, whole, atol=1e-5)
    for words in (("encode",), ("score",)):
        code, output = run(
            *words, tmp_path / "run", tmp_path / "all.csv", "--shard", "3/100", "--out", tmp_path / "x.npz"
        )
        assert code == 0 and "6 " in output, output
    code, output = run("encode", tmp_path / "run", tmp_path / "less.csv", "--out", tmp_path / "x.npz")
    assert code == 2 and "less.csv: has no column of numbers 'hue', expected the 8 columns" in output
    code, output = run("evaluate", tmp_path / "run", "--max-samples", 50)
    assert code == 0, output
    code, output = run("train", "--out", tmp_path / "run", "--resume", "--steps", 6)
    assert code == 0, output


def test_a_resume_refuses_what_it_would_pass_over(file, tmp_path):
    run_ = ("train", file, "--out", tmp_path / "run")
    small = ("--steps", 10, "--n-flows", 1, "--hidden-dim", 8, "--seed", 3, "--held-out", 0.2)
    code, output = run(*run_, *small)
    assert code == 0, output
    before = record(tmp_path / "run")
    for words, message in (
        (("--seed", 0), "seed is 0, but the run in"),
        (("--held-out", 0.1), "held_out is 0.1, but the run in"),
        (("--steps", 3), "steps is 3, but the run in"),
        (("--epochs", 0.01), "steps is 1, but the run in"),
        (("--rows", 20), "rows is 20, but the run in"),
    ):
        code, output = run(*run_, "--resume", *words)
        assert code == 2 and message in output, output
    assert record(tmp_path / "run") == before


def test_paths_with_brackets_are_printed_as_they_are(file, tmp_path):
    folder = tmp_path / "a [" / "b]"
    code, output = run("train", file, "--out", folder, "--steps", 2, "--n-flows", 1, "--hidden-dim", 8)
    assert code == 0 and f"written to {folder}; next: iin-fast evaluate {folder}" in output, output


def test_the_note_on_outliers_says_what_the_preset_does(latents, tmp_path):
    z = latents.z.clone()
    z[0, 0] = 1e4
    np.savez(tmp_path / "z.npz", z=z)
    for preset, taken in (("paper", "they are taken as they are"), ("auto", "the farthest usual value is taken")):
        small = ("--preset", preset, "--steps", 2, "--n-flows", 1, "--hidden-dim", 8)
        assert taken in run("train", tmp_path / "z.npz", "--out", tmp_path / preset, *small)[1]


def test_a_concept_from_two_groups_of_examples(tmp_path):
    """The pairs of a dozen latents with a concept and a dozen without, as a file: swapping swaps what the groups differ in."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]

    def world(n):
        z, concept = torch.randn(n, 6, generator=generator), torch.randint(2, (n,), generator=generator)
        z[:, 0] = 4 * concept - 2 + 0.5 * z[:, 0]
        return z @ turn, concept

    def read(z):
        return ((z @ turn.T)[:, 0] > 0).long()

    z, concept = world(64)
    pairs = concept_pairs(z[concept == 1][:12], z[concept == 0][:12], world(2000)[0], name="tall", noise=0.3, seed=1)
    file = tmp_path / "tall.npz"
    np.savez(file, za=pairs.za, zb=pairs.zb, shared=pairs.shared, names=pairs.names)
    words = "--factors tall=1 --rho 0.99 --steps 300 --n-flows 4 --hidden-dim 32 --batch 128 --learning-rate 3e-3"
    code, output = run("train", file, "--out", tmp_path / "run", *words.split(), "--accelerator", "cpu")
    assert code == 0, output
    test, truth = world(500)
    fresh = save_arrays(tmp_path / "fresh.npz", {"z": test})
    for factor, expected in (("tall", truth.flip(0)), ("residual", truth)):
        donors = save_arrays(tmp_path / "donors.npz", {"z": test.flip(0)})
        out = ("--donors", donors, "--out", tmp_path / "out.npz")
        assert run("swap", tmp_path / "run", fresh, "--factor", factor, *out)[0] == 0
        swapped = load_latents(tmp_path / "out.npz").z
        assert (read(swapped) == expected).double().mean() > 0.8  # 0.5 is chance
    code, output = run("evaluate", tmp_path / "run")
    assert code == 0 and "pairs that share tall" in output


def test_errors_are_one_line_with_code_2(trained, file, latents, tmp_path):
    narrow = save_arrays(tmp_path / "narrow.npz", {"z": latents.z[:, :5]})
    alone = save_arrays(tmp_path / "alone.npz", {"z": latents.z})
    fixed = {"z": latents.z, "labels": np.full((600, 1), 3), "names": np.array(["fixed"])}
    constant = save_arrays(tmp_path / "constant.npz", fixed)
    out = ("--out", tmp_path / "out.npz")
    new = ("--out", tmp_path / "new")
    for arguments, message in (
        (("train", tmp_path / "none.npz", *new), "none.npz: no such file"),
        (("train", file, *new, "--factors", "digit"), "--factors has 'digit', expected sizes like digit=22,color=11"),
        (("train", file, *new, "--factors", "digit=1,digit=2"), "--factors names 'digit' twice"),
        (("train", file, *new, "--factors", "shape=2"), "factors names 'shape'"),
        (("train", file, *new, "--rho", 2), "rho is 2.0, expected between 0 and 1"),
        (("train", file, *new, "--accelerator", "abacus"), "accelerator"),
        (("train", constant, *new), "concept 'fixed' has only the class 3 in all samples to train on, expected two"),
        (("dims", alone), "has neither labels nor pairs"),
        (("dims", file, "--method", "guess"), "method is 'guess', expected 'linear', 'published' or 'paper'"),
        (("encode", tmp_path, file, *out), "config.json: no such file"),
        (("encode", trained, narrow, *out), "narrow.npz: z has 5 features, expected 8 like the model in"),
        (("encode", trained, file, "--out", tmp_path / "out.pt"), "ends in '.pt', expected .npz, .safetensors or .csv"),
        (("decode", trained, file, *out), "labels is int64 of shape [600, 2], expected real numbers"),
        (("decode", trained, alone, *out), "factors has the names ['z'], expected ['digit', 'color', 'residual']"),
        (("swap", trained, file, "--factor", "shape", *out), "factor names 'shape', expected one of"),
        (("swap", trained, file, "--factor", "digit", "--donors", narrow, *out), "z has 5 features"),
        (("interpolate", trained, file, "--start", 0, "--end", 600, *out), "row 600 is not there, expected 0 to 599"),
        (("interpolate", trained, file, "--start", 0, "--start", 1, "--end", 2, *out), "2 rows to start and 1 to end"),
        (("sample", trained, "--n", 0, *out), "n is 0, expected a positive integer"),
        (("evaluate", trained, "--concept", "shape"), "concepts is ['shape'], expected some of ['digit', 'color']"),
        (("evaluate", trained, alone, "--concept", "digit"), "has no labels"),
        (("evaluate", trained, alone, "--judge", "json:dumps"), "judge is given, but"),
        (("evaluate", trained, alone, "--learn-on", file), "learn_on is given, but"),
        (("evaluate", trained, "--decoder", "json:dumps"), "decoder is given without judge, expected both"),
        (("evaluate", trained, "--judge", "json:nothing"), "json has no function 'nothing'"),
        (("evaluate", trained, "--device", "abacus"), "abacus"),
        (("report", trained, "--decoder", "nowhere"), "'nowhere' is no place of a function"),
        (("report", trained, "--decoder", "json:nothing"), "json has no function 'nothing'"),
    ):
        code, output = run(*arguments)
        assert code == 2 and output.startswith("error: ") and message in output, (arguments, output)
        assert output.count("\n") == 1 and "Traceback" not in output
    assert not (tmp_path / "out.npz").exists() and not (tmp_path / "new").exists()
    assert run("swap", trained, file)[0] == 2  # an option that is missing


def test_options_in_the_docs_are_those_of_the_commands():
    page = (Path(__file__).parents[2] / "docs" / "howto" / "train.md").read_text()
    text = page.replace("\\\n", " ")
    lines = re.findall(r"^(?:iin-fast|torchrun .* iin_fast\.cli) (.*)$", text, re.MULTILINE)
    assert len(lines) > 10
    for line in lines:
        name, *_ = line.split()
        help_text = run(name, "--help")[1]
        for option in re.findall(r"--[a-z-]+", line.split("#")[0]):
            assert option in help_text, line
    every_help = "".join(run(name, "--help")[1] for name in COMMANDS)
    for option in re.findall(r"`(--[a-z-]+)", page):
        assert option in every_help


def command(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    words = [sys.executable, "-m", "iin_fast.cli", *map(str, arguments)]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_from_latents_to_report_in_processes(file, tmp_path):
    """train, killed and resumed; evaluate; swap; report: as a person would, against one that was not killed."""
    folder = tmp_path / "run"
    words = ("train", file, "--out", folder, "--steps", 2000, "--save-every", 5, "--log-every", 5, *SMALL)
    process = command(*words)
    while not (folder / "state").is_dir() or not list((folder / "state").glob("step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    before = len(metrics(folder))

    process = command(*words, "--resume")
    while len(metrics(folder)) < before + 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130 and f"iin-fast train --out {folder} --resume goes on" in out and "Traceback" not in err
    step = max(int(path.name[5:]) for path in (folder / "state").iterdir())
    assert 0 < step < 2000 and [int(line["step"]) for line in metrics(folder)][-1] in range(step - 4, step + 1)

    code, out, err = finish(command("evaluate", folder, "--max-samples", 80))
    assert code == 0 and "swap digit" in out, err
    code, out, err = finish(command("swap", folder, file, "--factor", "digit", "--out", tmp_path / "swapped.npz"))
    assert code == 0 and load_latents(tmp_path / "swapped.npz").z.shape == (600, 8), err
    code, out, err = finish(command("report", folder))
    assert code == 0 and (folder / "report.html").stat().st_size > 10_000, err
    code, out, err = finish(command("encode", tmp_path / "nowhere", file, "--out", tmp_path / "x.npz"))
    assert code == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err


def torchrun(*words, processes=2):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return subprocess.Popen(
        [*launch, "iin_fast.cli", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Three processes with the environment that torchrun gives them, forked, so that one of them imports for all.
RANKS = """
import os, socket, sys
import lightning_fabric, safetensors.torch, torch._dynamo, torch.utils.tensorboard
import iin_fast.train
from iin_fast.cli import main

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
os.environ.update(TORCHELASTIC_RUN_ID="forked", GROUP_RANK="0")
children = []
for rank in range(3):
    if not (child := os.fork()):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        main()
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_three_processes_resume_bit_for_bit(file, tmp_path):
    """A sum of three numbers depends on their order; one of two does not."""
    steps = "--steps 200 --log-every 20 --save-every 100 --noise 0.1 --batch 18".split()
    words = ("train", file, "--factors", "digit=3,color=2", *SMALL, *steps)

    def ranks(*more):
        code = [sys.executable, "-c", RANKS, *map(str, (*words, *more))]
        done = subprocess.run(code, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    ranks("--out", tmp_path / "whole")
    process = torchrun(*words, "--out", tmp_path / "cut", processes=3)
    while not list(tmp_path.glob("cut/state/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.terminate()
    assert finish(process)[0] != 0
    (checkpoint,) = (tmp_path / "cut" / "state").glob("step-*")
    assert "step-000000000" < checkpoint.name < "step-000000200"
    ranks("--out", tmp_path / "cut", "--resume")
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert models[0] == models[1]
    lines = [[{**line, "samples_per_second": ""} for line in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("how", "coupling", "factors"),
    [("devices", "affine", "digit=3 --context color"), ("torchrun", "spline", "digit=3,color=2")],
)
def test_two_processes_give_the_same_result(how, coupling, factors, file, tmp_path):
    words = ["train", str(file), "--factors", *factors.split(), "--steps", "30", "--log-every", "7", *SMALL]
    words += ["--held-out-every", "10", "--save-every", "12", "--precision", "64-true", "--coupling", coupling]
    words += ["--noise", "0.2", "--keep", "best"]
    assert run(*words, "--out", tmp_path / "one")[0] == 0
    if how == "devices":
        process = command(*words, "--out", tmp_path / "two", "--devices", 2)
    else:
        process = torchrun(*words, "--out", tmp_path / "two")
    code, out, err = finish(process)
    assert code == 0, err
    assert out.count("written to") == 1  # one of them speaks
    assert record(tmp_path / "two")["device"]["processes"] == 2
    one, two = (IIN.load(tmp_path / name).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-9, msg=name)
    for mine, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in mine:
            if mine[name] and name != "samples_per_second":
                assert float(theirs[name]) == pytest.approx(
                    float(mine[name]), rel=1e-6, abs=1e-6
                )  # Fabric hands on float32


@pytest.mark.parametrize("grouped", [False, True])
def test_a_process_leaves_its_group_before_it_ends(grouped, tmp_path):
    from iin_fast.cli.method import _leave_group

    if grouped:  # with the group's threads alive the exit is aborted now and then
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    assert _leave_group()
    assert not torch.distributed.is_initialized()


def test_a_folder_of_somebody_else_is_never_written_over(file, tmp_path):
    theirs = tmp_path / "model"
    theirs.mkdir()
    (theirs / "model.safetensors").write_text("weights of another model")
    (theirs / "config.json").write_text("{}")
    for words in ((), ("--force",), ("--resume",)):
        code, output = run("train", file, "--out", theirs, "--steps", 2, *SMALL, *words)
        assert code == 2 and "no run of iin-fast; take another folder" in output, output
    assert {path.name for path in theirs.iterdir()} == {"model.safetensors", "config.json"}
    assert (theirs / "model.safetensors").read_text() == "weights of another model"


def test_force_leaves_the_old_run_until_the_new_one_can_begin(file, tmp_path):
    folder = tmp_path / "run"
    assert run("train", file, "--out", folder, "--steps", 2, "--factors", "digit=3,color=2", *SMALL)[0] == 0
    before = (folder / "model.safetensors").read_bytes()
    code, output = run("train", file, "--out", folder, "--steps", 2, "--factors", "digit=99", *SMALL, "--force")
    assert code == 2, output
    assert (folder / "model.safetensors").read_bytes() == before and list((folder / "state").iterdir())


def test_epochs_and_minutes_in_a_resume(file, tmp_path):
    folder, words = tmp_path / "run", ("--factors", "digit=3,color=2", *SMALL)
    assert run("train", file, "--out", folder, "--epochs", 1, *words)[0] == 0
    code, output = run("train", file, "--out", folder, "--epochs", 2, *words, "--resume")
    assert code == 0 and record(folder)["steps"] == round(2 * 540 / 32), output
    code, output = run("train", file, "--out", folder, "--minutes", 20, *words, "--resume")
    assert code == 2 and "minutes is 20" in output and "resume takes the same" in output


def test_an_option_that_is_wrong_is_named(file, tmp_path):
    code, output = run("train", file, "--out", tmp_path / "run", "--steps", "abc")
    assert code == 2 and "'--steps'" in output and "integer" in output and "TRACEBACK" not in output
    code, output = run("train", file)
    assert code == 2 and "--out" in output and "TRACEBACK" not in output


def test_a_sample_is_evaluated_on_what_it_held_out(latents, tmp_path):
    place, folder = tmp_path / "latents.npz", tmp_path / "run"
    save_arrays(place, {"z": latents.z, "labels": latents.labels, "names": list(latents.names)})
    assert run("train", place, "--out", folder, "--steps", 5, "--rows", 300, *SMALL)[0] == 0
    _, own, held = run_folder._held_out(folder, None)
    _, again, rows = run_folder._held_out(folder, place)
    assert np.array_equal(own, again) and np.array_equal(held, rows) and len(rows) < 100


@pytest.mark.parametrize("words", [("--plot", "shares.txt"), ("--plot", "shares")])
def test_a_picture_of_no_kind_is_refused(file, tmp_path, words):
    code, output = run("dims", file, file, "--compare", words[0], tmp_path / words[1])
    assert code == 2 and "expected one of ." in output
