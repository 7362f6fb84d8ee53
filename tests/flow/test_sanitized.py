"""Random texts, right and wrong, through the parser and the walks under sanitizers: refused, or nothing out of bounds, no race."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flow.test_op import example
from iin_fast.nn import MaskedAutoregressiveFlow, NeuralSplineFlow, RealNVP

ROOT = Path(__file__).parents[2]
SOURCES = [
    Path(__file__).with_name("sanitized.cpp"),
    *(ROOT / "csrc" / "flow_program" / f"flow_program_{part}.cpp" for part in ("plan", "loops")),
]
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fopenmp-simd", "-DIIN_FAST_ISA=baseline", f"-I{ROOT / 'csrc'}"),
    *("-isystem", str(Path(torch.__file__).parent / "include"), "-w", "-pthread", "-fno-sanitize-recover=all"),
]
# Each with how many changed texts of each program: ThreadSanitizer takes ten times as long, and races don't hide in the texts.
SANITIZERS = {"address,undefined": ("libasan.so", 500), "thread": ("libtsan.so", 10)}


def texts(changes: int) -> list[str]:
    """Programs, and each many times with some tokens changed, dropped or doubled."""
    flows = [
        NeuralSplineFlow(3, 2, n_flows=1, bins=3, hidden_dim=5, hidden_depth=1, mixing="lu"),
        MaskedAutoregressiveFlow(3, 1, n_flows=2, hidden_dim=5, hidden_depth=1),
        RealNVP(4, 0, n_flows=2, hidden_dim=3, hidden_depth=0),
    ]
    right = [example().program.text, *(flow.program().text for flow in flows)]
    draw = random.Random(0)
    words = sorted({word for text in right for word in text.split()}) + ["-1", "0", "1", "2", "16777216", "99999999999"]
    found = list(right)
    for text in right:
        for _ in range(changes):
            tokens = text.split()
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                at = draw.randrange(len(tokens))
                tokens[at : at + 1] = draw.choice(([draw.choice(words)], [draw.choice(words)], [], [tokens[at]] * 2))
            found.append(" ".join(tokens))
    return found


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_nothing_is_out_of_bounds_and_no_thread_races(tmp_path: Path, sanitizer: str) -> None:
    runtime, changes = SANITIZERS[sanitizer]
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the parser with sanitizers")
    place = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True).stdout
    if not Path(place.strip()).is_absolute():
        pytest.skip(f"g++ has no {runtime}")
    program = tmp_path / "sanitized"
    subprocess.run(["g++", *FLAGS, f"-fsanitize={sanitizer}", *map(str, SOURCES), "-o", str(program)], check=True)
    found = texts(changes)
    done = subprocess.run([program], input="\n".join(found), capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is not one that ThreadSanitizer knows")
    assert done.returncode == 0, done.stderr[-3000:]
    refused, walked = map(int, done.stdout.split())
    assert 0 < refused < len(found) and walked > (400 if changes > 100 else 20)
