"""Tests of what the Triton kernels alone have, in Triton's interpreter. It must be chosen before Triton is imported, and would
change the rest of the suite, so tests/backends/test_triton.py runs this folder in a process of its own, together with the
tests of all backends that are marked "triton"."""

import os
from pathlib import Path

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.triton)
