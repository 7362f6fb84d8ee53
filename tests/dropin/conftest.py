"""What the tests of programs share."""

import pytest

from iin_fast.ops.flow_program import engine


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each program that ran."""
    found: list[int] = []
    call = engine.call
    monkeypatch.setattr(engine, "call", lambda *args: (found.append(len(args[3].layers)), call(*args))[1])
    return found
