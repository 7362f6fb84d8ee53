"""Memory of a training on latents that are larger than memory: 100 million rows × 64 float32, 25.6 GB, and labels of a byte each.

The file is sparse. Real values stand in the rows that the training draws; all others are holes, which read as zeros. That
keeps the disk small and shows the same reads. Prints and writes what each command takes.

    python benchmarks/large_latents.py --folder /tmp/large
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from iin_fast.data.rows import chosen_rows, training_rows

# VmHWM is of this program alone; getrusage would count the parent, too.
COMMAND = """
import sys
from iin_fast.cli import app
try:
    app(sys.argv[1:])
finally:
    with open("/proc/self/status") as status:
        print("peak", next(line for line in status if line.startswith("VmHWM")).split()[1], file=sys.stderr)
"""


def sparse(folder: Path, n: int, dim: int) -> int:
    """Latents of ten classes; the rows that a training will draw."""
    with open(folder / "z.npy", "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (n, dim)})
        stream.truncate(stream.tell() + 4 * n * dim)
    random = np.random.default_rng(0)
    digit = np.lib.format.open_memmap(folder / "digit.npy", "w+", np.uint8, (n,))
    for start in range(0, n, 10**7):
        digit[start : start + 10**7] = random.integers(10, size=len(digit[start : start + 10**7]))
    centres = 2 * random.standard_normal((10, dim))
    rows = chosen_rows(n, training_rows(folder), None)
    z = np.load(folder / "z.npy", mmap_mode="r+")
    for start in range(0, len(rows), 10_000):
        own = rows[start : start + 10_000]
        z[own] = centres[digit[own]] + random.standard_normal((len(own), dim))
    return len(rows)


def measured(*words: object) -> dict[str, object]:
    """A command in a process of its own: seconds, peak of resident memory, its output."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, words)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{words[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    peak = int(done.stderr.rpartition("peak ")[2]) / 1024
    print(f"{' '.join(map(str, words[:1]))}: {seconds:.0f} s, at most {peak:.0f} MiB resident", flush=True)
    return {
        "command": str(words[0]),
        "seconds": round(seconds, 1),
        "peak_mib": round(peak),
        "output": done.stdout[-1500:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/iin-fast-large"))
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "large_latents.json")
    options = parser.parse_args()
    place = options.folder / "latents"
    place.mkdir(parents=True)
    try:
        drawn = sparse(place, options.rows, options.dim)
        size, disk = (
            sum(count(file) for file in place.iterdir())
            for count in (lambda f: f.stat().st_size, lambda f: 512 * f.stat().st_blocks)
        )
        print(
            f"{options.rows:,} × {options.dim}: {size / 1e9:.1f} GB, {disk / 1e9:.1f} GB of them on disk; {drawn:,} rows are drawn",
            flush=True,
        )
        run, out = options.folder / "run", options.folder / "out.npz"
        results = [
            measured("train", place, "--out", run, "--steps", options.steps, "--device", "cpu"),
            measured("evaluate", run),
            measured("encode", run, place, "--shard", "7/1000", "--out", out),
            measured("score", run, place, "--shard", "7/1000", "--out", out),
        ]
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    found = {
        "rows": options.rows,
        "dim": options.dim,
        "bytes": size,
        "drawn": drawn,
        "steps": options.steps,
        "commands": results,
    }
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
