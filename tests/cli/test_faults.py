"""Damaged runs, wrong options and Ctrl-C: the commands say one line and end with 2, or 130; nothing leaves a traceback."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("lightning_fabric")

from typer.testing import CliRunner

from iin_fast.cli import app
from iin_fast.cli.console import Commands
from iin_fast.data import Latents, save_arrays
from iin_fast.train import Settings, train


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output, result.exception


def refused(*words):
    """The line that a command says, which must be its only one."""
    code, output, error = run(*words)
    assert code == 2 and isinstance(error, SystemExit), (words, output, repr(error))
    assert output.startswith("error: ") and output.count("\n") == 1 and "Traceback" not in output, (words, output)
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its latents and its evaluation."""
    folder = tmp_path_factory.mktemp("made")
    z = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(120)[:, None] % 3
    file = save_arrays(folder / "z.npz", {"z": z + labels, "labels": labels, "names": np.array(["digit"])})
    settings = Settings({"digit": 2}, preset="paper", steps=8, n_flows=1, hidden_dim=8, batch=8, save_every=4)
    train(file, folder / "run", settings, accelerator="cpu")
    code, output, _ = run("evaluate", folder / "run", "--max-samples", 60)
    assert code == 0, output
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


FILES = ("config.json", "model.safetensors", "run.json", "split.npz", "evaluation.json", "logs/metrics.csv")
USES = {"evaluate": ("--max-samples", 40), "report": (), "encode": None}


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_run_cut_short_emptied_or_of_another_kind(made, copy, name, tmp_path):
    whole = (copy / name).read_bytes()
    if name != "logs/metrics.csv":
        shutil.rmtree(copy / "logs")  # no plots, which take most of the time
    for content in (b"", whole[: len(whole) // 2], b"\xff" * 40, b"[]", b'{"a": [1]}'):
        (copy / name).write_bytes(content)
        for command, options in USES.items():
            words = (made / "z.npz", "--out", tmp_path / "out.npz") if options is None else options
            code, output, error = run(command, copy, *words)
            assert code in (0, 2) and (error is None or isinstance(error, SystemExit)), (command, content, output)
            if code == 2:
                assert output.startswith("error: ") and output.count("\n") == 1, output
            elif name == "evaluation.json" and command == "evaluate":
                (copy / name).write_bytes(content)  # it was written anew
            elif name in ("config.json", "model.safetensors"):
                raise AssertionError(f"{command} took {name} with {content!r}")


def places(found, place=()):
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        yield (*place, key)
        if isinstance(value, dict | list):
            yield from places(value, (*place, key))


@pytest.mark.parametrize("name", ["evaluation.json", "run.json"])
def test_entries_of_another_type_or_missing(copy, name):
    """Each of many entries is replaced by what it is not, renamed, or taken away: the report is written or refused in a line."""
    draw, whole = random.Random(0), json.loads((copy / name).read_text())
    shutil.rmtree(copy / "logs")  # no plots, which take most of the time
    every, refusals = list(places(whole)), 0
    for number in range(60):
        found = json.loads(json.dumps(whole))
        *way, last = draw.choice(every)
        inner = found
        for key in way:
            inner = inner[key]
        value = draw.choice([None, "text", -1, 1e308, [], {}, [[1]], {"shape": {"both": 1}}, True])
        if number % 3 or isinstance(inner, list):
            inner[last] = value
        else:
            inner["unknown"] = inner.pop(last)
        (copy / name).write_text(json.dumps(found))
        code, output, error = run("report", copy)
        assert code == 0 or (code == 2 and isinstance(error, SystemExit)), (way, last, value, output, repr(error))
        if code == 2:
            assert output.startswith("error: ") and output.count("\n") == 1, output
        refusals += code == 2
    assert refusals


def test_what_is_not_there_or_of_another_kind(made, copy, tmp_path):
    file, out = made / "z.npz", tmp_path / "out.npz"
    if not torch.cuda.is_available():
        assert "device is 'cuda'" in refused("encode", copy, file, "--out", out, "--device", "cuda")
        refused("check", "--device", "cuda")
    refused("encode", copy, file, "--out", out, "--device", "meta")
    single = tmp_path / "single.npz"
    with open(single, "wb") as stream:
        np.save(stream, np.ones((4, 6)))
    assert "damaged or no .npz file" in refused("encode", copy, single, "--out", out)
    assert "damaged or no .npz file" in refused("decode", copy, single, "--out", out)
    assert "is a file, expected a folder" in refused("train", file, "--out", single)
    (tmp_path / "folder.npz").mkdir()
    refused("encode", copy, file, "--out", tmp_path / "folder.npz")
    refused("encode", copy, tmp_path / "folder.npz", "--out", out)
    refused("encode", copy, file, "--out", single / "below.npz")
    refused("report", copy / "config.json")
    assert not out.exists()


@pytest.mark.parametrize(("error", "line"), [(MemoryError(), "MemoryError"), (AssertionError("no GPU"), "no GPU")])
def test_any_error_is_one_line(monkeypatch, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr("iin_fast.info.collect", fail)
    assert line in refused("info")
    monkeypatch.setenv("IIN_FAST_TRACEBACK", "1")
    assert run("info")[2] is error


def test_ctrl_c_inside_any_command_ends_with_130(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("iin_fast.info.collect", interrupted)
    code, output, _ = run("info")
    assert code == 130 and output == ""
    assert issubclass(app.info.cls, Commands)


# Says when torch, which takes the most time, begins to be imported.
WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.write(1, b"x")

sys.meta_path.insert(0, Watch())
"""


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5, 1.0])
def test_ctrl_c_during_imports_leaves_no_traceback(seconds, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "iin_fast.cli", "info"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode in (-signal.SIGINT, 130, 0) and b"Traceback" not in err, err


def test_ctrl_c_that_the_parent_ignores_is_ignored():
    """As under nohup, or behind an ampersand."""
    program = (
        "import signal, os, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    words = [sys.executable, "-c", program, sys.executable, "-m", "iin_fast.cli", "info"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(20):
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "torch" in out, err


def test_latents_that_are_hard_to_learn_from_end_in_a_model_or_a_line(tmp_path):
    """A constant feature, one constant but for a row, scales of 1e7 and 1e-7, copies, classes of one row."""
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(200, 8, generator=generator), torch.arange(200)[:, None] % 3
    z[:, 1], z[:, 2], z[0, 2] = 3.0, 0.0, 1.0
    z[:, 4], z[:, 5], z[:, 6] = 1e7 * z[:, 4], 1e-7 * z[:, 5], z[:, 0]
    file = save_arrays(tmp_path / "z.npz", {"z": z, "labels": labels, "names": np.array(["digit"])})
    options = "--n-flows 2 --hidden-dim 16 --batch 16 --steps 60 --accelerator cpu".split()
    code, output, _ = run("train", file, "--out", tmp_path / "run", *options)
    assert code == 0 and output.count("note: ") >= 4, output
    with open(tmp_path / "run" / "logs" / "metrics.csv") as stream:
        head, *lines = (line.split(",") for line in stream.read().splitlines())
    losses = [float(line[1]) for line in lines if line[1]]
    assert max(losses) < 1000  # nats per pair of 16 numbers
    assert Latents.of(z).n == 200 and head[1] == "loss"


@pytest.mark.parametrize("lines", [0, 1])
def test_a_training_goes_on_when_nobody_reads_its_lines(lines, made, tmp_path):
    """As in ``iin-fast train … | head``."""
    words = ["train", made / "z.npz", "--out", tmp_path / "run", "--steps", 40, "--hidden-dim", 8, "--n-flows", 1]
    command = [sys.executable, "-m", "iin_fast.cli", *map(str, words)]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert all(training.stdout.readline() for _ in range(lines))
    training.stdout.close()
    assert (training.wait(120), training.stderr.read()) == (0, "")
    assert run("encode", tmp_path / "run", made / "z.npz", "--out", tmp_path / "codes.npz")[0] == 0


def test_help_that_nobody_reads_says_nothing_else():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "iin_fast.cli", "train", "--help"]
    said = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (said.returncode, said.stderr) == (1, "")


def test_an_evaluation_that_cannot_be_written_is_not_begun(copy, monkeypatch):
    def denied(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp1")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    monkeypatch.setattr("iin_fast.evaluate.write_evaluation", lambda *_, **__: pytest.fail("it was begun"))
    assert refused("evaluate", copy) == f"error: [Errno 13] Permission denied: '{copy}'\n"


@pytest.mark.parametrize("command", ["train", "swap", "sample", "evaluate"])
def test_seeds_beyond_the_range_of_generators(made, copy, command, tmp_path):
    z, out = made / "z.npz", ("--out", tmp_path / "out")
    words = {
        "train": (z, *out),
        "swap": (copy, z, "--factor", "digit", *out),
        "sample": (copy, *out),
        "evaluate": (copy,),
    }
    for seed in (2**64, 10**23, -1):
        assert f"seed is {seed}, expected an integer " in refused(command, *words[command], "--seed", seed)


def test_seeds_beyond_the_range_of_scikit_learn(copy):
    assert run("evaluate", copy, "--max-samples", 60, "--seed", 2**63)[0] == 0


@pytest.mark.parametrize("out", ["link", "link/run", "z.npz/run", "pipe"])
def test_a_run_folder_that_can_t_be_one(out, made, tmp_path):
    """A link to nothing kept the training looking for ever."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "z.npz").write_bytes((made / "z.npz").read_bytes())
    code, output, _ = run("train", made / "z.npz", "--out", tmp_path / out, "--steps", 2, "--accelerator", "cpu")
    assert code == 2 and "expected a folder for the run" in output and out.split("/")[0] in output


def test_no_command_writes_over_what_it_reads_or_over_the_run(made, tmp_path):
    run_folder, file = tmp_path / "run", tmp_path / "z.npz"
    shutil.copytree(made / "run", run_folder)
    shutil.copy(made / "z.npz", file)
    other = tmp_path / "other.npz"
    shutil.copy(file, other)
    before = {path: path.read_bytes() for path in (*run_folder.rglob("*"), file, other) if path.is_file()}
    rows = ["--start", 0, "--end", 1]
    for words in (
        ["encode", run_folder, file, "--out", file],
        ["encode", run_folder, file, "--out", tmp_path / "run" / ".." / "z.npz"],
        ["encode", run_folder, file, "--out", run_folder / "model.safetensors"],
        ["encode", run_folder, file, "--out", run_folder / "state" / "x.npz"],
        ["swap", run_folder, file, "--factor", "digit", "--out", file],
        ["swap", run_folder, file, "--factor", "digit", "--donors", other, "--out", other],
        ["interpolate", run_folder, file, *rows, "--out", file],
        ["axis", run_folder, file, "--with", other, "--without", file, "--out", other],
        ["score", run_folder, file, "--out", file],
        ["score", run_folder, file, "--held-in", other, "--out", other],
        ["sample", run_folder, "--out", run_folder / "split.npz"],
    ):
        code, output, _ = run(*words)
        assert code == 2 and "take another file" in output, (words, output)
        assert {path: path.read_bytes() for path in before} == before
    assert run("encode", run_folder, file, "--out", run_folder / "codes.npz")[0] == 0
    assert run("decode", run_folder, run_folder / "codes.npz", "--out", run_folder / "codes.npz")[0] == 2


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("names", 5, "names is 5, expected a list of texts"),
        ("names", None, "names is None, expected a list of texts"),
        ("columns", [[1]], r"columns is [[1]], expected a list of texts"),
        ("classes", {"digit": 5}, "classes.digit is 5, expected a list"),
        ("edges", {"digit": "x"}, "edges.digit is 'x', expected a list"),
        ("latents", {"path": 5}, "latents.path is 5, expected a text"),
    ],
)
def test_a_run_json_with_a_value_of_another_kind(key, value, text, made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made / "run", folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {key: value}))
    for words in (["report", folder], ["train", "--out", folder, "--resume", "--steps", 99]):
        code, output, _ = run(*words)
        assert code == 2 and "run.json" in output and text in " ".join(output.split()), output


@pytest.mark.parametrize("name", ["state", "logs", "split.npz"])
def test_a_resume_of_a_damaged_folder_changes_nothing(name, made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made / "run", folder)
    if name == "split.npz":
        (folder / name).unlink()
        (folder / name).mkdir()
    else:
        shutil.rmtree(folder / name)
        (folder / name).symlink_to(tmp_path / "nowhere")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, output, _ = run("train", "--out", folder, "--resume", "--steps", 99)
    assert code == 2 and name in output and "is no" in output, output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
