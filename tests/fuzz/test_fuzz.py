"""Fuzzing: a short seeded set here, and with IIN_FAST_FUZZ_MINUTES=… (make fuzz) new cases for as long as that."""

import os
import time
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

pytest.importorskip("typer")
pytest.importorskip("lightning_fabric")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from fuzz import cases

MINUTES = float(os.environ.get("IIN_FAST_FUZZ_MINUTES", 0))
TARGETS = {"ops": 150, "modules": 60, "programs": 150, "files": 150, "commands": 25}  # cases of the short set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.made_run(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz(target: str, folder: Path) -> None:
    check, count = getattr(cases, target), 0

    def one(draw: Random) -> None:
        nonlocal count
        count += 1
        torch.manual_seed(draw.getrandbits(32))  # permutations and weights, too, are those of the case
        check(draw, folder)

    def some(number: int) -> None:
        options = settings(
            max_examples=TARGETS[target],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        seed(number)(options(given(st.randoms(use_true_random=False))(one)))()

    some(0)
    end = time.monotonic() + 60 * MINUTES / len(TARGETS)
    number = int(time.time()) if MINUTES else 0
    while time.monotonic() < end:
        number += 1
        some(number)
    print(f"{target}: {count} cases")
