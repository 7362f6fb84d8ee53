"""What the compiled libraries need of the system: no more than torch's own wheels do (glibc 2.28)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from iin_fast._library import libraries

objdump = shutil.which("objdump")


def assert_loads_beside_glibc_2_28(objdump: str, library: Path) -> None:
    text = subprocess.run([objdump, "-T", str(library)], capture_output=True, text=True, check=True).stdout
    needed: dict[str, set[tuple[int, ...]]] = {}
    for name, version in re.findall(r"\((GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\)", text):
        needed.setdefault(name, set()).add(tuple(map(int, version.split("."))))
    assert needed["GLIBC"] and max(needed["GLIBC"]) <= (2, 28)
    assert max(needed["GLIBCXX"]) <= (3, 4, 25)  # of GCC 8
    assert max(needed["CXXABI"]) <= (1, 3, 11)
    assert max(needed.get("GCC", {(0,)})) < (8,)


@pytest.mark.skipif(objdump is None, reason="no objdump")
@pytest.mark.parametrize("name", libraries)
def test_a_library_loads_beside_glibc_2_28(name: str) -> None:
    assert_loads_beside_glibc_2_28(str(objdump), libraries[name])
