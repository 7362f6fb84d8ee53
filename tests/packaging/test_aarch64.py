"""The CPU library's sources compile for aarch64 too, from the same files; its elementary functions run there."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
FLAGS = ["-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no cross compiler for aarch64 (g++-aarch64-linux-gnu)")


def assert_compiles(*arguments: str) -> None:
    done = subprocess.run([COMPILER, *FLAGS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "source", sorted(p.relative_to(ROOT / "csrc") for p in (ROOT / "csrc").rglob("*.cpp")), ids=str
)
def test_compiles(source: Path, tmp_path: Path) -> None:
    includes = Path(torch.__file__).parent / "include"
    options = ["-DIIN_FAST_ISA=baseline", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(includes)]
    assert_compiles("-O1", *options, "-c", str(ROOT / "csrc" / source), "-o", str(tmp_path / "object.o"))


def test_elementary_functions_run(tmp_path: Path) -> None:
    """exp, log, tanh and atan on an emulated aarch64, against this machine's libm."""
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no qemu-aarch64")
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
    out = subprocess.run([emulator, str(program)], capture_output=True, text=True, check=True)
    assert out.stdout == "0 0"
