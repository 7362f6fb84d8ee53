"""Code compiled for one instruction set must not be able to serve another."""

import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = Path(__file__).parents[2] / "build" / "cmake" / "CMakeFiles"


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_mergeable_code_outside_the_namespace(isa: str) -> None:
    """A weak symbol outside the namespace of the instruction set could be merged by the linker with its namesake in code
    for older CPUs, and crash there."""
    if shutil.which("nm") is None or not OBJECTS.exists():
        pytest.skip("needs binutils and a build in build/cmake")
    objects = list((OBJECTS / f"loops_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip(f"this machine's build has no {isa} code")
    for path in objects:
        listing = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        shared = [
            line.split(maxsplit=2)[2]
            for line in listing.stdout.splitlines()
            if len(line.split(maxsplit=2)) == 3 and line.split()[1] in "WVuT"
        ]
        assert shared, f"{path.name} defines nothing"
        assert not [name for name in shared if f"iin_fast::{isa}::" not in name], path.name
