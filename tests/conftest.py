"""One torch thread for each process of the tests: most tensors are tiny, and several processes share the cores (make test).
Threads are tested where a test sets their number (tests/ops)."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # for torch, imported next, and for the processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)

# What hypothesis draws is the same in each run; make fuzz draws anew.
hypothesis.settings.register_profile("repeated", derandomize=True)
hypothesis.settings.load_profile("repeated")

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # of a shell's background job; trainings respect that, tests of Ctrl-C can't
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["conftest.py"]  # the search for doctests would import it a second time, under the name of another one

# What `make test-fast` leaves out: files that compile, start many processes or train for long. Together they take nine tenths
# of the time of `make test`, and are a tenth of its tests.
SLOW = """
    api/test_import_again backends/test_triton benchmarks/test_gpu_script cli/test_faults composition/test_compile
    composition/test_distributed composition/test_export composition/test_onnx cuda_emulator/test_emulator demo/test_demo
    docs/test_docs docs/test_examples docs/test_notebook docs/test_readme dropin/test_onnx dropin/test_sbi evaluate/test_evaluate
    explore/test_page flow/test_sanitized
    ops/test_affine_coupling_cuda ops/test_extremes ops/test_flow_cuda ops/test_sanitized_loops ops/test_spline_coupling_cuda
    ops/test_spline_extremes packaging/test_aarch64 packaging/test_compilers packaging/test_cuda_launches packaging/test_distribution
    packaging/test_gpu_report packaging/test_pure report/test_report
    train/test_allocator train/test_chosen train/test_commands train/test_kill train/test_lock train/test_two_nodes
"""
SLOW_FILES = {Path(__file__).parent / f"{name}.py" for name in SLOW.split()}
assert all(file.exists() for file in SLOW_FILES), "SLOW names a file that is no longer there"


# Files that take a process for a minute or more, the longest first, so that none runs alone at the end.
LONG = """cuda_emulator/test_emulator backends/test_triton train/test_commands packaging/test_aarch64
    packaging/test_distribution docs/test_examples flow/test_sanitized train/test_chosen packaging/test_vector_code
    composition/test_compile composition/test_onnx benchmarks/test_gpu_script composition/test_export""".split()
LONG_FILES = [Path(__file__).parent / f"{name}.py" for name in LONG]
assert all(file.exists() for file in LONG_FILES), "LONG names a file that is no longer there"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG_FILES.index(item.path) if item.path in LONG_FILES else len(LONG))
    for item in items:
        if item.path in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """One process that is its own group."""
    if torch.distributed.is_initialized():
        pytest.skip("this process has a group of its own")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, by playwright."""
    driver = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(names)} is on the path")
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()
