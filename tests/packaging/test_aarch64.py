"""The CPU library's sources compile for aarch64 too, from the same files; its elementary functions and the loops of its ops
give there what they give here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from sanitizers import ON_THREADS, PROGRAMS, compiled, kept
from test_symbols import assert_loads_beside_glibc_2_28

from iin_fast.ops.registry import OPS

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
FLAGS = ["-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no cross compiler for aarch64 (g++-aarch64-linux-gnu)")

needs_emulator = pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64 (qemu-user)")


def assert_compiles(*arguments: str) -> None:
    done = subprocess.run([COMPILER, *FLAGS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compiled_there(source: Path) -> Path:
    """The object, which two tests need of the loops."""
    assert COMPILER
    options = ["-DIIN_FAST_ISA=baseline", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-pthread"]
    options += ["-O1" if source in ON_THREADS else "-O0"]  # the others don't run
    options += ["-isystem", str(Path(torch.__file__).parent / "include")]
    return kept(f"aarch64-{source.stem}", COMPILER, *FLAGS, *options, "-c", str(source))


@pytest.mark.parametrize(
    "source",
    sorted(p.relative_to(ROOT / "csrc") for p in (ROOT / "csrc").rglob("*.cpp") if p.parent.name != "cuda_driver"),
    ids=str,
)
def test_compiles(source: Path) -> None:
    assert compiled_there(ROOT / "csrc" / source).exists()


def test_newer_functions_of_glibc_are_left_alone(tmp_path: Path) -> None:
    """What the sources call that glibc has changed since 2.28, linked as CMake links the library."""
    library = tmp_path / "calls.so"
    (tmp_path / "calls.cpp").write_text(
        """
#include <cmath>
#include <dlfcn.h>
#include <memory>
#include <stdexcept>
double calls(double x, std::shared_ptr<std::runtime_error> error) {
  auto more = error;
  if (void *library = dlopen(more->what(), RTLD_LAZY)) return dlsym(library, "x") ? 1. : 0.;
  if (x < 0.) throw std::runtime_error(*more);
  return std::log(x);
}
"""
    )
    wrapped = re.search(r"-Wl,--wrap[^)]+", (ROOT / "CMakeLists.txt").read_text())
    assert wrapped
    sources = [str(tmp_path / "calls.cpp"), str(ROOT / "csrc/common/old_glibc.cpp")]
    assert_compiles("-O1", "-shared", "-fPIC", wrapped[0], *sources, "-o", str(library))
    assert_loads_beside_glibc_2_28("aarch64-linux-gnu-objdump", library)


@needs_emulator
def test_elementary_functions_run(tmp_path: Path) -> None:
    """exp, log, tanh and atan on an emulated aarch64, against this machine's libm."""
    program = tmp_path / "check"
    (tmp_path / "check.cpp").write_text(
        """
#include <cmath>
#include <cstdio>
#include "common/math.h"
template <class T> int bad(T tolerance) {
  int wrong = 0;
  for (int i = -4000; i <= 4000; ++i) {
    const T x = T(i) / T(100), positive = std::exp(x / T(4));
    const T got[] = {iin_fast::math::exp(x), iin_fast::math::log(positive), iin_fast::math::tanh(x), iin_fast::math::atan(x)};
    const T want[] = {std::exp(x), std::log(positive), std::tanh(x), std::atan(x)};
    for (int k = 0; k < 4; ++k)
      wrong += !(std::abs(got[k] - want[k]) <= tolerance * std::abs(want[k]) + T(1e-30));
  }
  return wrong;
}
int main() { std::printf("%d %d", bad<float>(5e-7f), bad<double>(1e-15)); }
"""
    )
    assert_compiles("-O3", "-static", str(tmp_path / "check.cpp"), "-o", str(program))
    out = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, check=True)
    assert out.stdout == "0 0"


@needs_emulator
def test_ops_give_there_what_they_give_here(tmp_path: Path) -> None:
    """Forward and backward of every op, on three threads and on one: sums over all outputs of each call."""
    there = tmp_path / "there"
    assert_compiles("-static", "-pthread", *(str(compiled_there(s)) for s in ON_THREADS), "-o", str(there))
    here = compiled("on_threads", *ON_THREADS, optimized="-O0")  # it runs for a second
    # as many rows as fill vectors and leave a rest, emulated for seconds
    programs = re.sub(r"^\d+", lambda rows: str(int(rows[0]) // 4 + 1), PROGRAMS, flags=re.M)
    for op in [op for op in OPS if op != "flow"]:
        told = [
            subprocess.run(
                [*words, op, "0"], input=programs, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            for words in ([EMULATOR, there], [here])
        ]
        assert told[0][0] == told[1][0] and len(told[0]) == len(told[1]) > 4, op
        for line, (got, want) in enumerate(zip(told[0][1:], told[1][1:], strict=True)):
            (a, size_a), (b, size_b) = (map(float, text.split()) for text in (got, want))
            assert abs(a - b) <= 1e-4 * size_b and abs(size_a - size_b) <= 1e-4 * size_b, (op, line, got, want)
