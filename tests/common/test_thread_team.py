"""csrc/common/thread_team.h: every part of every step is done once, without a data race, whoever joins when."""

from pathlib import Path

import pytest
from sanitizers import compiled, run


@pytest.mark.parametrize("sanitizer", ["", "thread"], ids=["plain", "thread sanitizer"])
def test_steps_are_shared_without_races(sanitizer: str) -> None:
    program = compiled("thread_team", Path(__file__).with_name("thread_team.cpp"), sanitizer=sanitizer)
    done = run(program)
    assert (done.returncode, done.stdout) == (0, "right"), done.stderr[-3000:]
