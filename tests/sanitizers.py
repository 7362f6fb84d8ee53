"""Programs of C++ that tests compile, with the sanitizers of g++ and without, and keep in build/programs."""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from iin_fast.ops.flow.program import flow_as_program
from iin_fast.ops.registry import OPS

__all__ = ["ISAS", "LIBRARIES", "ON_THREADS", "PROGRAMS", "ROOT", "WITHOUT_SCOPES", "compiled", "kept", "run"]

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "programs"
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

WITHOUT_SCOPES = "-fno-sanitize-address-use-after-scope"
"""Nobody looks for the use of a variable after its block has ended: that makes g++ five times as slow. ``make sanitize`` does."""


@functools.cache
def _sources() -> bytes:
    """All C++ that a program may be made of, digested."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in (ROOT / "csrc", ROOT / "tests"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cpp"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.digest()


def kept(name: str, compiler: str, *words: str) -> Path:
    """What the compiler makes under that name, and beside it as .txt what it says: anew if a word or a source has changed."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(_sources() + version + repr((compiler, words)).encode()).hexdigest()[:16]
    KEPT.mkdir(parents=True, exist_ok=True)
    made = KEPT / f"{name}-{key}"
    with open(KEPT / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        if not made.exists():
            for old in KEPT.glob(f"{name}-{'[0-9a-f]' * 16}*"):
                old.unlink()
            unfinished = KEPT / f"{name}.tmp"
            done = subprocess.run([compiler, *words, "-o", str(unfinished)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            made.with_suffix(".txt").write_text(done.stderr)
            unfinished.rename(made)
    return made


def compiled(name: str, *sources: Path, sanitizer: str = "", isa: str = "baseline", optimized: str = "-O1") -> Path:
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
    flags += [WITHOUT_SCOPES] if "address" in sanitizer else []
    return kept("-".join(filter(None, [name, sanitizer.partition(",")[0], isa])), "g++", *flags, *map(str, sources))


def run(program: Path, *words: str, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the program answers to its words and its input."""
    done = subprocess.run(
        [program, *words], input=text, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is not one that ThreadSanitizer knows")
    return done
