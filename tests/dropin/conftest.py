"""What the tests of programs share."""

import pytest

from iin_fast.ops.flow_program import engine


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each program that ran, without an error."""
    found: list[int] = []
    call = engine.call
    monkeypatch.setattr(engine, "call", lambda *args: (call(*args), found.append(len(args[3].layers)))[0])
    return found
