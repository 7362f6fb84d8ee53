"""Tests of what the Triton kernels alone have, in Triton's interpreter. It must be chosen before Triton is imported, and would
change the rest of the suite, so tests/backends/test_triton.py runs this folder in a process of its own, together with the
tests of all backends that are marked "triton"."""

import inspect
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.triton)


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    # At each call of a function of a kernel the interpreter looks through all of triton.language for what it has to replace,
    # which takes a third of the time of the tests. Here it keeps the names.

    @cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
