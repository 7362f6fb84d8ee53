"""The CPU loops of the ops, on one thread and on several, under ThreadSanitizer: the same numbers, and no race. More programs
are in tests/flow/test_sanitized.py."""

from pathlib import Path

import pytest
from sanitizers import ISAS, ON_THREADS, PROGRAMS, compiled, run

from iin_fast.ops import registry

# Each with how many calls are compared: squashes or forms, types, directions; of two programs what is kept.
OPS = {"affine_coupling": 7 * 4 * 2, "spline_coupling": 6 * 4 * 2, "pair_nll": 4, "flow_program": 2 * 2 * 2 * 4}


def test_every_op_is_here() -> None:
    assert set(OPS) == set(registry.OPS) - {"flow"}  # an op of GPUs alone


@pytest.fixture(scope="module", params=ISAS)
def program(request: pytest.FixtureRequest) -> Path:
    return compiled("on_threads", *ON_THREADS, sanitizer="thread", isa=request.param)


@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_race(program: Path, op: str) -> None:
    done = run(program, op, "0", text=PROGRAMS)
    assert done.returncode == 0, done.stderr[-3000:]
    same, different, by_team, by_rows = map(int, done.stdout.splitlines()[0].split())
    assert (same, different) == (OPS[op], 0)
    assert (by_team == OPS[op] and by_rows > 0) or op != "flow_program"  # forward and backward of half of the calls


@pytest.mark.parametrize("op", OPS)
def test_a_race_is_found(program: Path, op: str) -> None:
    done = run(program, op, "1", text=PROGRAMS, TSAN_OPTIONS="halt_on_error=1")
    assert done.returncode != 0 and "data race" in done.stderr and "_loops.cpp" in done.stderr
