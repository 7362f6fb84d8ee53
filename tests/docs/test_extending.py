"""docs/extending.md and CONTRIBUTING.md tell the truth: the diffs fit the files of today, and no list of squashes is left out."""

import re
from pathlib import Path

from iin_fast.ops.affine_coupling import SQUASHES

ROOT = Path(__file__).parents[2]


def test_the_diffs_fit_the_files() -> None:
    page = (ROOT / "docs/extending.md").read_text()
    hunks = 0
    for diff in re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for file, changes in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.MULTILINE | re.DOTALL):
            text = (ROOT / file).read_text()
            for hunk in changes.split("@@\n")[1:]:
                lines = hunk.splitlines()
                assert all(line[:1] in " +-" for line in lines), (file, hunk)
                before = "\n".join(line[1:] for line in lines if line[:1] != "+")
                after = "\n".join(line[1:] for line in lines if line[:1] != "-")
                assert before in text, f"docs/extending.md: {file} has no longer\n{before}\nMake the diff anew."
                assert after not in text, f"docs/extending.md: {file} has this change already:\n{hunk}"
                hunks += 1
    assert hunks > 10


def test_nothing_else_lists_the_squashes() -> None:
    rows = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding a squash")[2].partition("\n## ")[0]
    places = set(re.findall(r"^\| `(\S+)` \|", rows, re.MULTILINE))
    names = [
        re.compile(rf"\b_?{name}\b", re.IGNORECASE) for name in ("softplus", "softclip")
    ]  # no activation has these names
    sources = [
        p
        for folder in ("iin_fast", "csrc")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
    ]
    found = {
        str(p.relative_to(ROOT))
        for p in [*sources, ROOT / "CHANGELOG.md"]
        if all(n.search(p.read_text()) for n in names)
    }
    assert {"softplus", "softclip"} <= SQUASHES.keys()
    assert found == places and len(places) <= 6
