"""A training that is killed, again and again and at any moment, ends as one that never was: byte for byte."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from run_folder import metrics

# Forks a process for each try (imports are done once) and kills it with SIGKILL: by the child itself right before its
# k-th flush, rename or removal, so inside the writing of a checkpoint, or by the parent after a while, whatever it does.
DRIVER = """
import json, os, shutil, signal, sys, time
import torch
import iin_fast.train, lightning_fabric, torch.utils.tensorboard, safetensors.torch
from iin_fast.data import load_latents
from iin_fast.train import Settings, train

torch.set_num_threads(1)
latents = load_latents(sys.argv[1])
settings = Settings(**json.loads(sys.argv[2]))

def attempt(run, moment):
    kind, when = moment
    child = os.fork()
    if child == 0:
        left = [when]
        def armed(call):
            def first(*arguments, **named):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)
            return first
        if kind == "call":
            for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree"), (os, "unlink")):
                setattr(owner, name, armed(getattr(owner, name)))
        try:
            train(latents, run, settings, resume=True, accelerator="cpu")
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kind == "time":
        time.sleep(when)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

print("ready", flush=True)
for line in sys.stdin:
    run, moment = json.loads(line)
    print(json.dumps(attempt(run, moment)), flush=True)
"""


@pytest.fixture(scope="module")
def attempt(latents, tmp_path_factory):
    import json

    import numpy as np

    folder = tmp_path_factory.mktemp("kill")
    labels = latents.labels.numpy().copy()
    labels[::7, 0] = -1
    labels[::14] = -1
    np.savez(folder / "latents.npz", z=latents.z.numpy(), labels=labels, names=latents.names)
    settings = {"factors": {"digit": 3, "color": 2}, "steps": 50, "n_flows": 2, "hidden_dim": 16, "batch": 16}
    settings |= {
        "learning_rate": 3e-3,
        "log_every": 4,
        "held_out_every": 12,
        "save_every": 7,
        "seed": 5,
        "noise": 0.1,
        "keep": "best",
    }
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder / "latents.npz"), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert driver.stdout.readline() == "ready\n"

    def attempt(run, kind="never", when=0.0):
        driver.stdin.write(json.dumps([str(run), [kind, when]]) + "\n")
        driver.stdin.flush()
        return json.loads(driver.stdout.readline())

    yield attempt
    driver.stdin.close()
    assert driver.wait(60) == 0


@pytest.fixture(scope="module")
def whole(attempt, tmp_path_factory):
    """A run that never stopped, and the seconds it took."""
    run = tmp_path_factory.mktemp("whole") / "run"
    begin = time.perf_counter()
    assert attempt(run) == 0
    return run, time.perf_counter() - begin


def same(run, whole):
    for name in ("model.safetensors", "config.json", "split.npz", "run.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    (checkpoint,) = (run / "state").iterdir()
    for file in checkpoint.rglob("*.*"):
        assert file.read_bytes() == (whole / file.relative_to(run)).read_bytes(), file.name
    assert sorted(path.name for path in run.rglob("*") if "events" not in path.name) == sorted(
        path.name for path in whole.rglob("*") if "events" not in path.name
    )
    # All columns of the log but the one that is a clock's.
    assert [{**line, "samples_per_second": ""} for line in metrics(run)] == [
        {**line, "samples_per_second": ""} for line in metrics(whole)
    ]


def test_a_run_is_the_same_every_time(attempt, whole, tmp_path):
    assert attempt(tmp_path / "run") == 0
    same(tmp_path / "run", whole[0])


@pytest.mark.parametrize("seed", range(4))
def test_killed_inside_writes_and_at_random_moments(attempt, whole, tmp_path, seed):
    draw = random.Random(seed)
    run, outcomes = tmp_path / "run", []
    while outcomes[-1:] != [0] and len(outcomes) < 8:
        kind = draw.choice(["call", "time"]) if outcomes else "call"
        when = draw.randint(1, 40) if kind == "call" else draw.uniform(0.05, 0.6) * whole[1]
        outcomes.append(attempt(run, kind, when))
    assert set(outcomes) <= {"killed", 0} and outcomes.count("killed") >= 1
    assert attempt(run) == 0
    same(run, whole[0])


def test_killed_at_every_call_of_one_checkpoint(attempt, whole, tmp_path):
    """Calls in a row, over more than a whole checkpoint: none loses what the one before had."""
    run, reached = tmp_path / "run", []
    for call in range(20, 60):
        assert attempt(run, "call", call) == "killed"
        steps = [int(path.name[5:]) for path in (run / "state").glob("step-*")]
        reached.append(max(steps, default=0))
        if reached[-1] == 50:
            break
        if reached[-1]:
            from iin_fast.train import state

            assert state.load(state.latest(run))[1].step == reached[-1]
    assert reached == sorted(reached) and reached[-1] > 7
    assert attempt(run) == 0
    same(run, whole[0])
    assert torch.isfinite(torch.tensor(float(metrics(run)[-1]["loss"])))
