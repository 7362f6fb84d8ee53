"""One training at a time in a folder; what the parent ignores stays ignored; a hangup is a stop like any other."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from run_folder import metrics

from iin_fast.train import state, train
from iin_fast.train.lock import lock

HOLDER = """
import sys
from pathlib import Path
from iin_fast.train.lock import lock
with lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path / "run"``."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_in_a_folder_is_refused(holder, latents, settings, tmp_path, resume):
    run = tmp_path / "run"
    with pytest.raises(
        RuntimeError, match=rf"run is in use by another training \(process {holder.pid} on .*\); wait for it"
    ):
        train(latents, run, settings(steps=2), accelerator="cpu", resume=resume)
    assert [file.name for file in run.iterdir()] == ["lock"]
    holder.stdin.close()
    assert holder.wait(30) == 0
    train(latents, run, settings(steps=2), accelerator="cpu", resume=resume)
    assert not (run / "lock").exists() and (run / "model.safetensors").exists()


def test_the_lock_of_a_killed_process_locks_nothing(holder, latents, settings, tmp_path):
    run = tmp_path / "run"
    holder.kill()
    holder.wait()
    assert (run / "lock").read_text().startswith(f"{holder.pid} on ")
    train(latents, run, settings(steps=2), accelerator="cpu")
    assert not (run / "lock").exists()


def test_of_many_at_once_one_gets_the_lock(tmp_path):
    """Each takes it, counts, and lets go; nobody counts while another does, and the file never stays."""
    (tmp_path / "count").write_text("0")
    (tmp_path / "run").mkdir()
    program = """
import sys, time
from pathlib import Path
from iin_fast.train.lock import lock
run, count = Path(sys.argv[1]), Path(sys.argv[2])
done = 0
while done < 40:
    try:
        with lock(run):
            n = int(count.read_text())
            count.write_text(str(n + 1))
        done += 1
    except RuntimeError:
        time.sleep(0.001)
"""
    words = [sys.executable, "-c", program, str(tmp_path / "run"), str(tmp_path / "count")]
    processes = [subprocess.Popen(words) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "120" and not list((tmp_path / "run").iterdir())


def test_a_folder_that_was_there_stays_and_one_that_was_made_goes(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with lock(tmp_path / name):
            assert (tmp_path / name / "lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_is_no_folder(latents, settings, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(NotADirectoryError, match="run is a file, expected a folder"):
        train(latents, tmp_path / "run", settings(steps=2), accelerator="cpu")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_parent_ignores_stays_ignored(latents, settings, tmp_path, monkeypatch, number):
    from iin_fast.train.logs import Log

    write = Log.write
    monkeypatch.setattr(Log, "write", lambda *line: (write(*line), os.kill(os.getpid(), number)))
    before = signal.signal(number, signal.SIG_IGN)
    try:
        train(latents, tmp_path / "run", settings(steps=8, log_every=2), accelerator="cpu")
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert [line["step"] for line in metrics(tmp_path / "run")] == ["2", "4", "6", "8"]


def test_a_hangup_writes_a_checkpoint_and_ends_with_130(file, tmp_path):
    run = tmp_path / "run"
    words = ["train", file, "--out", run, "--steps", "9000", "--n-flows", "2", "--hidden-dim", "16", "--log-every", "5"]
    command = [sys.executable, "-m", "iin_fast.cli", *map(str, words), "--accelerator", "cpu"]
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # nohup make test would have it ignored
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not (run / "logs" / "metrics.csv").exists() or len(metrics(run)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in out and "Traceback" not in err
    assert state.load(state.latest(run))[1].step > 0
