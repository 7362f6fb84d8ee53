"""Programs of C++ that tests compile with the sanitizers of g++."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from iin_fast.ops.flow.program import flow_as_program
from iin_fast.ops.registry import OPS

__all__ = ["ISAS", "LIBRARIES", "ON_THREADS", "PROGRAMS", "ROOT", "compiled", "run"]

ROOT = Path(__file__).parents[1]
ISAS = os.environ.get("IIN_FAST_TEST_ISAS", "baseline").split()
"""Instruction sets for the CPU loops; make sanitize asks for all."""

ON_THREADS = (
    ROOT / "tests/ops/on_threads.cpp",
    *(ROOT / f"csrc/{op}/{op}_loops.cpp" for op in OPS if op != "flow"),
    *(ROOT / f"csrc/flow_program/{name}.cpp" for name in ("wide_net_loops", "flow_program_plan")),
)
"""The sources of the program that runs the CPU loops of all ops on threads."""

PROGRAMS = "\n".join(
    f"{rows} {flow_as_program(*sizes, 0.1, 1.0, False).text}"
    for rows, sizes in ((50, (24, 1, 150, 2, 3, 1)), (140, (9, 2, 36, 1, 2, 2)))
)
"""What it reads, with the rows of a batch: a program whose steps a team shares, and one whose rows are shared."""

LIBRARIES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}


def compiled(program: Path, *sources: Path, sanitizer: str = "", isa: str = "baseline", optimized: str = "-O1") -> Path:
    """The program, compiled of its sources, or the test is skipped where g++ can't."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if sanitizer:
        library = LIBRARIES[sanitizer]
        found = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        if not Path(found.stdout.strip()).is_absolute():
            pytest.skip(f"g++ has no {library}")
    known = re.search(rf"^  set\(ISA_FLAGS_{isa} (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.M)
    assert known, f"CMakeLists.txt has no flags of {isa}"
    flags = ["-std=c++17", optimized, "-g1", "-w", "-pthread", "-fopenmp-simd", f"-I{ROOT / 'csrc'}"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include"), f"-DIIN_FAST_ISA={isa}"]
    flags += known[1].replace('"', "").split()
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


def run(program: Path, *words: str, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the program answers to its words and its input."""
    done = subprocess.run(
        [program, *words], input=text, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is not one that ThreadSanitizer knows")
    return done
