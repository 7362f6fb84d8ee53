"""Writes requirements-dev.txt from pyproject.toml: python tests/packaging/requirements.py"""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD = """\
# What `make test` and `make demo` install into .venv; written by tests/packaging/requirements.py from pyproject.toml.
# torch is pinned to one release, so that a development machine gets what the measurements in docs/ were made with; the
# package itself asks for less.
"""


def expanded(requirements: list[str], extras: dict[str, list[str]]) -> Iterator[str]:
    """Requirements in which an extra of this package stands for what it lists."""
    for requirement in requirements:
        own = re.fullmatch(r"iin-fast\[(.+)\]", requirement)
        if own is None:
            yield requirement
        else:
            for extra in own[1].split(","):
                yield from expanded(extras[extra.strip()], extras)


def name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower()


def text() -> str:
    """The file as it should be: what builds the package, what it needs, and the extra ``dev``. The first of a name counts."""
    import tomllib  # of Python 3.11

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], "wheel", *project["project"]["dependencies"]]
    wanted += expanded(["iin-fast[dev]"], project["project"]["optional-dependencies"])
    lines: dict[str, str] = {}
    for requirement in wanted:
        lines.setdefault(name(requirement), requirement)
    return HEAD + "\n".join(lines.values()) + "\n"


if __name__ == "__main__":
    (ROOT / "requirements-dev.txt").write_text(text())
