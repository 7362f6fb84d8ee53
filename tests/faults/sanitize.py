"""The compiled ops under sanitizers: python -m tests.faults.sanitize (make sanitize).

1. The CPU library is built anew with AddressSanitizer and UBSan, and the tests of the ops run on it, in every instruction set.
2. The emulated CUDA kernels run under AddressSanitizer and under the race checker (tests/cuda_emulator/races.cpp).
3. The loops of all ops and the thread team run under ThreadSanitizer in every instruction set, on threads that it sees: torch's
   own pool is not compiled for it, so that tests through torch would report its barriers as races.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from iin_fast.ops import registry

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
OPS = "affine_coupling pair_nll spline_coupling flow extremes not_finite threads long_sums spline_extremes".split()


def library(build: Path, flags: str, isas: str = "all") -> Path:
    """A tree with the package, and with its CPU library compiled with other flags."""
    tree = build / "tree"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DIIN_FAST_CUDA=off"]
    configure += [f"-DIIN_FAST_ISAS={isas}", f"-DIIN_FAST_OUTPUT={tree / 'iin_fast' / 'lib'}"]
    # CMakeLists.txt sets the flags of a release itself
    configure += ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(build), "-j", str(os.cpu_count())], check=True)
    shutil.copytree(ROOT / "iin_fast", tree / "iin_fast", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    return tree


def run_tests(tree: Path, words: list[str], **environment: str) -> None:
    """pytest with the package of the tree."""
    environment = os.environ | environment | {"PYTHONPATH": str(tree)}
    loaded = "import iin_fast._library as l; print(l.libraries['cpu'], l.cpu_isa())"
    told = subprocess.run(
        [sys.executable, "-c", loaded], env=environment, cwd=tree.parent, capture_output=True, text=True, check=True
    ).stdout
    assert str(tree) in told, told  # not the library of the source tree
    print(f"== tests with {told.split()[1]}", flush=True)
    pytest = str(Path(sys.executable).parent / "pytest")  # not python -m, which would put the source tree first
    subprocess.run([pytest, "-n", "0", "-q", "-p", "no:cacheprovider", *words], env=environment, cwd=ROOT, check=True)


def runtime(name: str) -> str:
    """Where the sanitizer's library is that has to be loaded before Python's own allocations."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"sanitize: g++ has no {name}")
    return found


def tests(tree: Path, sets: list[str]) -> None:
    preload = f"{runtime('libasan.so')} {runtime('libubsan.so')}"
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "LD_PRELOAD": preload}
    files = [f"tests/ops/test_{name}.py" for name in OPS] + ["tests/flow/test_op.py", "tests/flow/test_engine.py"]
    symbols = subprocess.run(
        ["nm", "-D", *(tree / "iin_fast" / "lib").glob("*.so")], capture_output=True, text=True, check=True
    )
    assert "__asan_report_load" in symbols.stdout and "__ubsan_handle" in symbols.stdout, "the library has no checks"
    for isa in sets:
        run_tests(tree, files, **options, IIN_FAST_CPU=isa)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", nargs="*", default=["avx512", "avx2", "baseline"], help="instruction sets")
    given = parser.parse_args()
    print("== AddressSanitizer, UBSan", flush=True)
    tests(library(BUILD, FLAGS), given.isa)
    print("== ThreadSanitizer, emulated CUDA kernels", flush=True)
    rest = ["tests/flow/test_sanitized.py", "tests/ops/test_sanitized_loops.py", "tests/common/test_thread_team.py"]
    environment = os.environ | {"IIN_FAST_TEST_ISAS": " ".join(given.isa), "IIN_FAST_TEXTS": "500"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", *rest, "tests/cuda_emulator"],
        env=environment,
        cwd=ROOT,
        check=True,
    )
    print("== races and bounds of emulated CUDA kernels, all tests", flush=True)
    rest = [f"tests/ops/test_{op}_cuda.py" for op in registry.OPS]
    bounds = {"IIN_FAST_TEST_SANITIZE": "1", "LD_PRELOAD": runtime("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    for chosen in ({"IIN_FAST_TEST_RACES": "1"}, bounds):
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *rest]
        subprocess.run(command, cwd=ROOT, env=os.environ | chosen, check=True)
    print("sanitize: nothing found")


if __name__ == "__main__":
    main()
