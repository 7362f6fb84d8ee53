"""Repositories that no package index has in full: published IIN code and FrEIA. One folder holds clones of any of them:

    mkdir peers && cd peers
    git clone https://github.com/CompVis/iin
    git clone https://github.com/CompVis/net2net
    git clone https://github.com/CompVis/invariances
    git clone https://github.com/vislearn/FrEIA

``python benchmarks/dropin.py --peers peers``, ``make peers PEERS=peers`` put them on the path.
"""

import importlib.util
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["MODULES", "commit", "commits", "paths", "versions"]

# folder, and a module that must then come from it
MODULES = {
    "iin": "iin.models.iin",
    "net2net": "net2net.modules.flow.flatflow",
    "invariances": "invariances.model.blocks",
    "FrEIA": "FrEIA.modules.splines",
}

EDFLOW = """
def retrieve(*arguments, **options):
    raise NotImplementedError("edflow is not installed")

get_obj_from_str = retrieve
"""


def clones(folder: Path) -> dict[str, Path]:
    """The clones that are there."""
    found = {name: folder.resolve() / name for name in MODULES if (folder / name / ".git").exists()}
    if not found:
        raise SystemExit(f"{folder} holds no clone of {', '.join(MODULES)}; see benchmarks/peers.py")
    return found


def paths(folder: Path, scratch: Path) -> list[str]:
    """What the clones in ``folder`` need on the path. Models of iin import edflow's config reader and don't call it."""
    found = [str(clone) for clone in clones(folder).values()]
    if importlib.util.find_spec("edflow") is None:
        (scratch / "edflow").mkdir()
        (scratch / "edflow" / "__init__.py").touch()
        (scratch / "edflow" / "util.py").write_text(EDFLOW)
        found.append(str(scratch))
    return found


def commit(clone: Path) -> str:
    """The commit of a clone, ``-dirty`` where its files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True).stdout.strip()


def commits(folder: Path | None) -> dict[str, str]:
    return {} if folder is None else {name: commit(clone) for name, clone in clones(folder).items()}


def versions(*names: str) -> dict[str, str]:
    """Of the distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found
