"""Repositories that no package index has in full: published IIN code and FrEIA. One folder holds clones of any of them:

    mkdir peers && cd peers
    git clone https://github.com/CompVis/iin
    git clone https://github.com/CompVis/net2net
    git clone https://github.com/CompVis/invariances
    git clone https://github.com/vislearn/FrEIA

``python benchmarks/dropin.py --peers peers``, ``make peers PEERS=peers`` put them on the path.
"""

import importlib.util
from pathlib import Path

from iin_fast.info import commit_of

__all__ = ["MODULES", "commits", "paths"]

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


def commits(folder: Path | None) -> dict[str, str]:
    return {} if folder is None else {name: commit_of(clone, 40) or "unknown" for name, clone in clones(folder).items()}
