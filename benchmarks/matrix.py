"""Which Pythons and torches the package works with: make matrix

Makes an environment for each pair, installs the wheel and the CPU build of that torch from the index, and runs
`iin-fast check`. Writes the table between the marks in docs/install.md. A torch that the index does not serve for a Python,
or serves only with CUDA's gigabytes, is "not tried".
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "install.md"
MARKS = ("<!-- matrix: written by benchmarks/matrix.py -->\n", "<!-- end of matrix -->")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def find_python(version: str) -> str | None:
    """The interpreter behind ``python3.x`` on PATH, which may be a shim of pyenv's that wants a version named."""
    command = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYENV_VERSION": version})
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def tried(python: str, torch: str, wheel: Path, folder: Path) -> str:
    """What came of one pair, in a few words."""

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run(python, "-m", "venv", folder / "venv")
    inside = folder / "venv" / "bin" / "python"
    if run(
        inside, "-m", "pip", "install", "--only-binary=:all:", f"torch=={torch}+cpu", "typer", "rich", "numpy"
    ).returncode:
        return "not tried"
    installed = run(inside, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    if installed.returncode:
        return f"does not install: {installed.stderr.strip().splitlines()[-1]}"
    check = run(folder / "venv" / "bin" / "iin-fast", "check")
    compared = re.search(r"(\d+) tensors compared, (\d+) differ", check.stdout)
    return f"{compared[1]} tensors compared, {compared[2]} differ" if compared else "does not run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"])
    options = parser.parse_args()
    rows = ["| torch | " + " | ".join(f"Python {version}" for version in PYTHONS) + " |"]
    rows.append("|---|" + "---|" * len(PYTHONS))
    for torch in options.torch:
        row = []
        for version in PYTHONS:
            python = find_python(version)
            folder = ROOT / "build" / "matrix" / f"{version}-{torch}"
            row.append(tried(python, torch, options.wheel.resolve(), folder) if python else "no such Python here")
            print(f"Python {version}, torch {torch}: {row[-1]}", flush=True)
        rows.append(f"| {torch} | " + " | ".join(row) + " |")
    before, rest = PAGE.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(before + MARKS[0] + "\n".join(rows) + "\n" + MARKS[1] + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
