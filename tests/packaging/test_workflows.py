"""Workflows run elsewhere: here their files are held against the schema that GitHub's editor uses, and what they call exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
if not WORKFLOWS:
    pytest.skip("an sdist has no workflows", allow_module_level=True)


def checked(*files: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("check_jsonschema")
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        *map(str, files),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_files_follow_the_schema() -> None:
    done = checked(*WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("wrong", ["runs-on", "steps", "timeout-minutes"])
def test_a_misspelt_key_is_found(tmp_path: Path, wrong: str) -> None:
    text = WORKFLOWS[0].read_text()
    assert f" {wrong}:" in text
    (tmp_path / "wrong.yml").write_text(text.replace(f" {wrong}:", f" {wrong}s:", 1))
    assert checked(tmp_path / "wrong.yml").returncode != 0


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda path: path.stem)
def test_what_they_name_exists(file: Path) -> None:
    jobs = yaml.safe_load(file.read_text())["jobs"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name, job in jobs.items():
        assert set(job.get("needs", [])) <= set(jobs), name
        for step in job["steps"]:
            for words in re.findall(r"\bmake ([\w -]+)", step.get("run", "")):
                assert set(words.split()) <= targets, (name, words)
        used = set(re.findall(r"matrix\.(\w+)", str(job)))
        matrix = job.get("strategy", {}).get("matrix", {})
        assert used <= set(matrix), (name, used)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_a_commit(file: Path) -> None:
    """A tag can be moved to other code. The index's own action is meant to be used by its branch of releases."""
    for action in re.findall(r"uses: (\S+)", file.read_text()):
        assert re.search(r"@[0-9a-f]{40}$", action) or action == "pypa/gh-action-pypi-publish@release/v1"
