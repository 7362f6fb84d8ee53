"""Tests of a machine with a GPU. IIN_FAST_TEST_DEVICE=cpu runs what of them a CPU can run, to test the tests."""

import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("IIN_FAST_TEST_DEVICE", "cuda")


@pytest.fixture
def device() -> str:
    return DEVICE


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_cuda: a test of graphs, streams or devices, which a CPU does not have")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        if DEVICE == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        elif DEVICE != "cuda" and item.get_closest_marker("needs_cuda"):
            item.add_marker(pytest.mark.skip(reason="a matter of GPUs alone"))
