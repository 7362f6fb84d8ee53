"""What the examples share: their options, and the files they write."""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import iin_fast


def arguments(name: str, description: str) -> argparse.Namespace:
    """--out, --quick and --seed."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder for results and pictures")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that only shows that everything works")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_results(out: Path, results: Mapping[str, Any], started: float) -> None:
    """``results.json`` in the folder ``out``, with what it was measured on."""
    out.mkdir(parents=True, exist_ok=True)
    made_by = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "iin_fast": iin_fast.__version__,
    }
    text = json.dumps({**results, "run": made_by}, indent=1)
    (out / "results.json").write_text(text + "\n")
    print(text)
