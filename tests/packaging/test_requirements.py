"""requirements-dev.txt says what pyproject.toml does."""

import pytest
import requirements

pytest.importorskip("tomllib", reason="Python 3.11 has it")


def test_the_file_is_what_the_extra_says() -> None:
    written = (requirements.ROOT / "requirements-dev.txt").read_text()
    assert written == requirements.text(), "run python tests/packaging/requirements.py"


def test_extras_stand_for_what_they_list() -> None:
    extras = {"a": ["iin-fast[b,c]", "x>=1"], "b": ["y"], "c": ["iin-fast[b]", "z[q]"]}
    assert list(requirements.expanded(["iin-fast[a]"], extras)) == ["y", "y", "z[q]", "x>=1"]


def test_peers_are_pinned() -> None:
    lines = (requirements.ROOT / "requirements-peers.txt").read_text().splitlines()
    peers = [line for line in lines if not line.startswith("#")]
    assert peers and all("==" in line for line in peers)
