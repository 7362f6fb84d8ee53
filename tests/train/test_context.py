"""Runs whose flow is told a class, and scores of latents: the commands do what the model in the run folder does."""

import json
import math

import numpy as np
import pytest
import torch
from run_folder import metrics, record

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from torch.nn.functional import one_hot
from typer.testing import CliRunner

from iin_fast import IIN
from iin_fast.cli import app
from iin_fast.data import Latents, save_arrays
from iin_fast.train import Settings, run_folder, train


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory):
    """A run that was told the digit, of the command line."""
    folder = tmp_path_factory.mktemp("run") / "run"
    small = "--n-flows 2 --hidden-dim 16 --batch 16 --learning-rate 3e-3 --accelerator cpu --steps 60".split()
    code, output = run("train", file, "--out", folder, "--context", "digit", *small)
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def told(latents):
    """The context of all latents."""
    return one_hot(latents.labels[:, 0], 4).float()


def test_the_model_is_conditional_and_the_context_is_no_factor(trained, file):
    model = IIN.load(trained)
    assert model.context_dim == 4 and model.concepts == ("color",)
    assert model.sizes == run_folder.dims(file, context="digit")
    assert record(trained)["settings"]["context"] == "digit"


@torch.no_grad()
def test_commands_tell_the_model_what_the_labels_say(trained, file, latents, told, tmp_path):
    model, out = IIN.load(trained), tmp_path / "out.npz"
    code, output = run("encode", trained, file, "--out", out)
    assert code == 0, output
    factors = model.encode(latents.z, told)
    assert np.allclose(np.load(out)["color"], factors["color"], atol=1e-5)

    assert run("decode", trained, out, "--context", file, "--out", tmp_path / "z.npz")[0] == 0
    assert np.allclose(np.load(tmp_path / "z.npz")["z"], latents.z, atol=1e-4)
    assert run("decode", trained, out, "--context", 2, "--out", tmp_path / "z.npz")[0] == 0
    twos = torch.eye(4)[2].repeat(600, 1)
    assert np.allclose(np.load(tmp_path / "z.npz")["z"], model.decode(factors, twos), atol=1e-4)

    code, output = run("swap", trained, file, "--factor", "color", "--out", out)
    assert code == 0, output
    donor = torch.from_numpy(np.load(out)["donor"])
    expected = model.swap(latents.z, latents.z[donor], "color", context=told, donor_context=told[donor])
    assert np.allclose(np.load(out)["z"], expected, atol=1e-5)

    assert run("interpolate", trained, file, "--start", 0, "--end", 5, "--steps", 3, "--out", out)[0] == 0
    line = model.interpolate(latents.z[[0]], latents.z[[5]], 3, context=told[[0]], context_b=told[[5]])
    assert np.allclose(np.load(out)["z"], line[:, 0], atol=1e-5)

    assert run("sample", trained, "--n", 7, "--seed", 3, "--context", 1, "--out", out)[0] == 0
    expected = model.sample(7, torch.Generator().manual_seed(3), context=torch.eye(4)[1].repeat(7, 1))
    assert np.array_equal(np.load(out)["z"], expected)


def test_evaluation_and_report(trained, latents, told):
    code, output = run("evaluate", trained, "--max-samples", 60)
    assert code == 0, output
    found = json.loads((trained / "evaluation.json").read_text())
    held = np.load(trained / "split.npz")["held_out"]
    with torch.no_grad():
        nats = -IIN.load(trained).log_prob(latents.z[held], told[held]).mean().item() / 8
    assert found["concepts"] == ["color"] and found["likelihood"]["iin"] == pytest.approx(nats, rel=1e-5)
    assert f"nats per dimension: {nats:.3f}" in output
    assert float(metrics(trained)[-1]["held_out_nats_per_dim"]) == pytest.approx(nats, abs=0.3)  # pairs, not rows
    assert run("evaluate", trained, "--concept", "digit", "--max-samples", 60)[0] == 0
    assert json.loads((trained / "evaluation.json").read_text())["concepts"] == ["digit"]
    code, output = run("report", trained)
    assert code == 0, output
    text = (trained / "report.html").read_text()
    assert "gives color" in text and "gives digit" not in text


def test_a_class_alone_makes_a_conditional_density(settings, tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2000, 1), generator=generator)
    z = 0.3 * torch.randn(2000, 2, generator=generator) + 1.5 * labels
    data = Latents.of(z, labels, ["digit"])
    run = tmp_path / "run"
    options = settings(factors=None, context="digit", steps=200, batch=64, learning_rate=1e-2)
    model = train(data, run, options, accelerator="cpu")
    assert model.sizes == {"residual": 2} and model.context_dim == 4
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(0.3)  # of a class; that of all is 0.6 higher
    found = run_folder.evaluate(run, data)
    assert found["likelihood"]["iin"] == pytest.approx(entropy, abs=0.15)
    assert float(metrics(run)[-1]["held_out_nats_per_dim"]) == pytest.approx(entropy, abs=0.15)


@torch.no_grad()
def test_scores_are_those_of_the_model(trained, file, latents, told, tmp_path):
    model, out = IIN.load(trained), tmp_path / "scores.npz"
    held = np.load(trained / "split.npz")["held_out"]
    far = save_arrays(tmp_path / "far.npz", {"z": 9 * latents.z, "labels": latents.labels, "names": ["digit", "color"]})
    usual = model.log_prob(latents.z[held], told[held])
    code, output = run("score", trained, far, "--out", out)
    assert code == 0 and "600 latents" in output, output
    found = np.load(out)
    expected = model.log_prob(9 * latents.z, told)
    assert np.allclose(found["log_prob"], expected, rtol=1e-4)
    assert np.allclose(found["outlier_score"], model.outlier_score(9 * latents.z, usual, context=told), atol=0.02)
    assert (found["outlier_score"] >= 0.95).mean() > 0.9
    assert f"{(found['outlier_score'] >= 0.95).mean():.1%} of them score 0.95 or more" in output
    # Among latents like itself half are likelier, on average.
    assert run("score", trained, file, "--held-in", file, "--out", out)[0] == 0
    assert np.load(out)["outlier_score"].mean() == pytest.approx(0.5, abs=0.01)


def test_errors_are_one_line_with_code_2(trained, file, latents, settings, tmp_path):
    alone = save_arrays(tmp_path / "alone.npz", {"z": latents.z})
    other = save_arrays(
        tmp_path / "other.npz", {"z": latents.z, "labels": latents.labels + 1, "names": ["digit", "color"]}
    )
    labels = latents.labels.clone()
    labels[3, 0] = -1
    partly = save_arrays(tmp_path / "partly.npz", {"z": latents.z, "labels": labels, "names": ["digit", "color"]})
    plain = tmp_path / "plain"
    train(file, plain, settings(steps=1), accelerator="cpu")
    factors = tmp_path / "factors.npz"
    assert run("encode", trained, file, "--out", factors)[0] == 0
    out = ("--out", tmp_path / "out.npz")
    for arguments, message in (
        (("train", alone, "--out", tmp_path / "new", "--context", "digit"), "class of 'digit', expected labels of it"),
        (("train", file, "--out", tmp_path / "new", "--context", "shape"), "there are: digit, color"),
        (("train", partly, "--out", tmp_path / "new", "--context", "digit"), "'digit', the context, have -1 (unknown)"),
        (("train", file, "--out", tmp_path / "new", "--context", "digit", "--factors", "digit=2"), "is the context"),
        (("encode", trained, alone, *out), "expected labels of it; there are: none"),
        (("encode", trained, other, *out), "have the class 4, expected below 4"),
        (("decode", trained, factors, *out), "context is missing, expected a class of 'digit'"),
        (("decode", trained, factors, "--context", 4, *out), "context is 4, expected a class from 0 to 3"),
        (("decode", plain, factors, "--context", 1, *out), "factors has the names"),
        (("sample", plain, "--context", 1, *out), "context is given, expected none"),
        (("sample", trained, "--n", 9, "--context", file, *out), "context has 600 rows, expected 9"),
        (("score", trained, file, "--held-in", alone, *out), "expected labels of it"),
    ):
        code, output = run(*arguments)
        assert code == 2 and output.startswith("error: ") and message in output, (arguments, output)
        assert output.count("\n") == 1
    assert not (tmp_path / "out.npz").exists() and not (tmp_path / "new").exists()


def test_classes_that_are_texts(tmp_path):
    random = np.random.default_rng(0)
    kinds = np.array(["1", "2", "cat"])[random.integers(3, size=120)]
    arrays = {"z": random.normal(size=(120, 4)), "kind": kinds, "color": random.integers(2, size=120)}
    np.savez(tmp_path / "z.npz", **arrays)
    settings = Settings({"color": 2}, context="kind", n_flows=1, hidden_dim=8, steps=2)
    train(tmp_path / "z.npz", tmp_path / "run", settings, accelerator="cpu")
    for given in ("1", 1, 2, "cat"):
        rows = Latents.of(torch.zeros(4, 4), {"kind": np.full(4, str(given))})
        found, same = (run_folder.sample(tmp_path / "run", 4, context=context) for context in (given, rows))
        assert torch.equal(found, same)
    with pytest.raises(ValueError, match="context is 3, expected a class of 'kind': 1, 2, cat"):
        run_folder.sample(tmp_path / "run", 4, context=3)
    few = {
        name: array[kinds == "cat"][:3] for name, array in arrays.items()
    }  # one class, each row a part of what it was
    np.savez(tmp_path / "few.npz", **few)
    factors = run_folder.encode(tmp_path / "run", tmp_path / "few.npz")
    assert len(factors["color"]) == 3


def test_a_class_is_known_before_a_number_or_a_file(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for name, classes in (("text", np.array(["01", "02", "10"])), ("far", np.array([7, 20_007, 8_000_007]))):
        np.savez(tmp_path / f"{name}.npz", z=random.normal(size=(120, 4)), kind=classes[np.arange(120) % 3])
        settings = Settings(context="kind", n_flows=1, hidden_dim=8, steps=2)
        assert train(tmp_path / f"{name}.npz", tmp_path / name, settings, accelerator="cpu").context_dim == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "02").mkdir()
    for name, given in (("text", "01"), ("text", "02"), ("far", "20007")):
        code, output = run("sample", tmp_path / name, "--context", given, "--out", tmp_path / "x.npz", "--n", 3)
        assert code == 0, output
        place = {"01": 0, "02": 1, "20007": 1}[given]
        context = torch.eye(3)[place].repeat(3, 1)
        drawn = IIN.load(tmp_path / name).sample(3, torch.Generator().manual_seed(0), context=context)
        assert np.array_equal(np.load(tmp_path / "x.npz")["z"], drawn.detach())
    code, output = run("sample", tmp_path / "far", "--context", "8", "--out", tmp_path / "x.npz")
    assert code == 2 and "expected a class of 'kind': 7, 20007, 8000007" in output
    np.savez(tmp_path / "other.npz", z=random.normal(size=(6, 4)), kind=np.arange(6))
    with pytest.raises(ValueError, match="the context, have the class '5', expected one of the training: 7, 20007"):
        run_folder.encode(tmp_path / "far", tmp_path / "other.npz")
    np.savez(tmp_path / "gap.npz", z=random.normal(size=(120, 4)), kind=np.array([0, 1, 3])[np.arange(120) % 3])
    train(tmp_path / "gap.npz", tmp_path / "gap", settings, accelerator="cpu")
    with pytest.raises(ValueError, match="context is 2, expected a class of the training: 0, 1, 3"):
        run_folder.sample(tmp_path / "gap", 3, context=2)


def test_factors_in_a_table_come_back(tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "z.npz", z=random.normal(size=(60, 4)), color=random.integers(2, size=60))
    train(
        tmp_path / "z.npz",
        tmp_path / "run",
        Settings({"color": 2}, n_flows=1, hidden_dim=8, steps=2),
        accelerator="cpu",
    )
    factors = run_folder.encode(tmp_path / "run", tmp_path / "z.npz")
    save_arrays(tmp_path / "factors.csv", factors)
    wanted = run_folder.decode(tmp_path / "run", factors)
    found = run_folder.decode(tmp_path / "run", tmp_path / "factors.csv")
    assert torch.allclose(found, wanted, atol=1e-6)
    settings = Settings({"color": 2}, n_flows=1, hidden_dim=8, steps=2, precision="64-true")
    train(tmp_path / "z.npz", tmp_path / "double", settings, accelerator="cpu")
    save_arrays(tmp_path / "factors.csv", run_folder.encode(tmp_path / "double", tmp_path / "z.npz"))
    found = run_folder.decode(tmp_path / "double", tmp_path / "factors.csv")
    assert torch.allclose(found, torch.from_numpy(np.load(tmp_path / "z.npz")["z"]), rtol=0, atol=1e-12)
    (tmp_path / "cut.csv").write_text("color0\n1.0\n")
    with pytest.raises(ValueError, match="has no column 'color1', expected 2 of the factor 'color'"):
        run_folder.decode(tmp_path / "run", tmp_path / "cut.csv")
    assert run_folder.decode(tmp_path / "run", {name: part[:0] for name, part in factors.items()}).shape == (0, 4)
    np.savez(tmp_path / "z.npz", z=random.normal(size=(50, 4)))
    with pytest.warns(UserWarning, match="changed since the training"):
        assert run_folder.latents_of_run(tmp_path / "run") is None
