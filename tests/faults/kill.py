"""Trainings that are killed, stopped, starved of disk, or lose a process: python -m tests.faults.kill (make kill).

Whatever happens, the run folder must open at once (its model loads, its checkpoint too), a resume must lead to the model of a
training that nothing happened to, byte for byte, and nothing may be left over.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from iin_fast import IIN
from iin_fast.data import save_arrays
from iin_fast.train import state

OPTIONS = (
    "--factors digit=2 --n-flows 2 --hidden-dim 16 --batch 16 --preset paper --learning-rate 1e-3 --accelerator cpu"
)
OPTIONS += " --steps 400 --save-every 10 --log-every 7 --held-out-every 30 --noise 0.1 --keep best"
FULL = ("File too large", "No space left", "can't write")


def command(file: Path, run: Path, processes: int = 1) -> list[str]:
    words = ["train", str(file), "--out", str(run), *OPTIONS.split(), "--resume"]
    if processes == 1:
        return [sys.executable, "-m", "iin_fast.cli", *words]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "iin_fast.cli"]
    return [sys.executable, *launch, *words]


def start(words: list[str], most_bytes: int | None = None) -> subprocess.Popen[str]:
    """A process in a group of its own; ``most_bytes``: the largest file that it may write, as on a disk that is full there."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    return subprocess.Popen(
        words,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
        start_new_session=True,
    )


def opens(run: Path) -> None:
    """What is there is whole."""
    if (run / "model.safetensors").exists():
        IIN.load(run)
    found = state.latest(run)
    if found is not None:
        state.load(found)


def same(run: Path, whole: Path) -> None:
    """As a training that nothing happened to."""
    for name in ("model.safetensors", "config.json", "split.npz"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    lines = [
        [line.split(",") for line in (folder / "logs" / "metrics.csv").read_text().splitlines()]
        for folder in (run, whole)
    ]
    mine, theirs = ([line[:4] + line[5:] for line in part] for part in lines)  # without samples per second
    assert mine == theirs, "metrics.csv"
    left = {path.name for path in run.rglob("*") if "events" not in path.name} ^ {
        path.name for path in whole.rglob("*") if "events" not in path.name
    }
    assert not left, left


def ended(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


def children(process: subprocess.Popen[str]) -> list[int]:
    """Python processes that torchrun has started."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def at_random_moments(file: Path, folder: Path, draw: random.Random, seconds: float, processes: int) -> Counter[str]:
    """One run: trouble after trouble until it is done."""
    run, counts = folder / "run", Counter[str]()
    shutil.rmtree(run, ignore_errors=True)
    troubles = ["kill", "SIGTERM", "SIGINT", "SIGHUP", "disk"] if processes == 1 else ["rank"]
    for _ in range(3):
        trouble = draw.choice(troubles)
        most = draw.randrange(100, 40_000) if trouble == "disk" else None
        process = start(command(file, run, processes), most)
        if trouble != "disk":
            begin = time.monotonic()
            while not (run / "run.json").exists() and process.poll() is None and time.monotonic() - begin < 60:
                time.sleep(0.01)  # imports are not what is tested here
            time.sleep(draw.uniform(0, seconds))
            if process.poll() is None:
                if trouble == "kill":
                    process.kill()
                elif trouble == "rank":
                    ranks = children(process)
                    if ranks:
                        os.kill(draw.choice(ranks), signal.SIGKILL)
                else:
                    process.send_signal(getattr(signal, trouble))
        code, text = ended(process)
        if trouble == "disk" and code:
            assert code == 2 and "Traceback" not in text and any(part in text for part in FULL), text[-1500:]
        elif trouble.startswith("SIG"):
            # Before the first step and after the last one a signal acts as usual.
            assert code in (0, 130, -signal.SIGTERM, -signal.SIGHUP) and "Traceback" not in text, (
                trouble,
                code,
                text[-1500:],
            )
        opens(run)
        counts[f"{trouble}, {'through' if code == 0 else 'ended'}"] += 1
    code, text = ended(start(command(file, run, processes)))
    assert code == 0, text[-2000:]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[1, 1, 1, 1, 2, 4], help="processes of one run after the other"
    )
    given = parser.parse_args()
    draw, counts = random.Random(given.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        z = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(300)[:, None] % 3
        file = save_arrays(folder / "z.npz", {"z": z + labels, "labels": labels, "names": np.array(["digit"])})
        whole: dict[int, tuple[Path, float]] = {}
        while counts.total() < given.kills:
            for processes in given.ranks:
                if processes not in whole:
                    begin = time.monotonic()
                    code, text = ended(start(command(file, folder / f"whole-{processes}", processes)))
                    assert code == 0, text[-2000:]
                    whole[processes] = folder / f"whole-{processes}", (time.monotonic() - begin) / 2
                found = at_random_moments(file, folder, draw, whole[processes][1], processes)
                same(folder / "run", whole[processes][0])
                counts += found
                print(f"kill: seed {given.seed}, {counts.total()} of {given.kills}: {dict(counts)}", flush=True)
                if counts.total() >= given.kills:
                    break


if __name__ == "__main__":
    main()
