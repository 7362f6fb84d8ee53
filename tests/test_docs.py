"""The documentation: its code runs, and the site builds without a warning."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import iin_fast

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = [
    "index.md",
    "tutorial.md",
    "composition.md",
    *sorted(f"howto/{page.name}" for page in (DOCS / "howto").glob("*.md")),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", RUN)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after the other, in one namespace; a failure names the page and its line."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), namespace)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{module} is not installed: pip install 'iin-fast[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_site_has_every_page(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("")
        assert (site / (name.parent if name.name == "index" else name) / "index.html").is_file(), name


@pytest.mark.parametrize(
    "module", ["iin_fast", "iin_fast.nn", "iin_fast.functional", "iin_fast.evaluate", "iin_fast.train", "iin_fast.runs"]
)
def test_reference_is_complete(site: Path, module: str) -> None:
    """Every public name has its entry, but modules and the version."""
    pages = "".join(page.read_text() for page in (site / "api").rglob("index.html"))
    namespace = importlib.import_module(module)
    for name in namespace.__all__:
        if not name.startswith("_") and not isinstance(getattr(namespace, name), type(iin_fast)):
            assert re.search(rf'id="{re.escape(module)}(\.\w+)*\.{name}"', pages), f"{module}.{name}"


def test_docstrings_are_readable(site: Path) -> None:
    """Formulas and roles of our docstrings came through: no raw directive is left."""
    for page in (site / "api").rglob("index.html"):
        text = page.read_text()
        assert ".. math::" not in text and ":math:`" not in text and ":class:`" not in text, page
        assert "<blockquote>" not in text, page  # what an example becomes that was not taken for one


def test_formulas_are_mathml(site: Path) -> None:
    """Every formula became MathML, whole: a command that latex2mathml does not know would stay in it with its backslash."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        formulas = re.findall(r"<math .*?</math>", text, re.DOTALL)
        assert text.count('class="arithmatex"') == text.count('class="arithmatex"><math ') == len(formulas), page
        assert not any("\\" in formula for formula in formulas), page
    reference = (site / "api/iin/index.html").read_text()
    assert 'display="block"' in reference and 'display="inline"' in reference
    assert "<mi>softmax</mi>" in reference  # a name, not seven letters side by side


def test_site_needs_no_network(site: Path) -> None:
    """No page loads a script, style, font or picture of another server."""
    pages, sheets = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert pages and sheets
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|source|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(?:src|href)\w*=["']?(?:https?:)?//""", tag), (page, tag)
    for sheet in sheets:
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", sheet.read_text()), sheet
