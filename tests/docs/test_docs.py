"""The documentation: its code runs, and the site builds without a warning."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import iin_fast

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if BLOCK.search(page.read_text()))
NEED_NAMES = {"metrics.md", "dropin.md"}  # their blocks begin with a model that the reader has
NEED_PACKAGES = {"howto/adapters.md": ["transformers"]}


def run_blocks(page: str, **names: Any) -> dict[str, Any]:
    """All blocks of a page, one after the other, in one namespace; a failure names the page and its line."""
    text = (DOCS / page).read_text()
    torch.manual_seed(0)
    namespace = {"__name__": "__main__", **names}
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NEED_NAMES])
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEED_PACKAGES.get(page, []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    assert run_blocks(page).keys() > {"__name__", "__builtins__"}, f"{page} has no code"


def test_code_of_metrics_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained model in runs/digits, latents of both halves, and a decoder: what the page takes as given."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (240, 2), generator=random)
    z = torch.randn(240, 8, generator=random)
    z[:, :2] += 3 * labels
    iin_fast.IIN(8, {"digit": 2, "color": 2}, n_flows=1, hidden_dim=8, generator=random).save("runs/digits")
    train_z, z, train_labels, labels = *z.split(120), *labels.split(120)
    names = run_blocks(
        "metrics.md",
        z=z,
        labels=labels,
        train_z=train_z,
        train_labels=train_labels,
        decode=lambda z: z.sigmoid().reshape(-1, 2, 4),
    )
    assert set(names["found"]["swap"]["iin"]) >= {"digit", "color"}
    written = json.loads(Path("runs/digits/evaluation.json").read_text())
    assert written["swap"]["iin"]["digit"] == names["found"]["swap"]["iin"]["digit"]  # both blocks say the same
    assert "data:image" in Path("runs/digits/report.html").read_text()


def test_code_of_dropin_runs() -> None:
    """A flow of nflows: sped up, then as it was, to the bit."""
    transforms = pytest.importorskip("nflows.transforms")
    pytest.importorskip("zuko")
    from nflows.nn.nets import ResidualNet

    model = transforms.PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor([1, 0, 1, 0]), lambda inputs, outputs: ResidualNet(inputs, outputs, 8), tails="linear"
    ).eval()
    x = torch.randn(5, 4)
    before = model(x)
    optimizer = torch.optim.Adam(model.parameters())
    made = []
    inference = SimpleNamespace(
        train=lambda: made.append(torch.optim.Adam(model.parameters())),
        build_posterior=lambda: SimpleNamespace(posterior_estimator=model),
    )
    try:
        names = run_blocks("dropin.md", model=model, optimizer=optimizer, inference=inference)
        assert optimizer.defaults["fused"] and made[0].defaults["fused"]
        assert iin_fast.accelerate(model).replaced[0].why == "by patch"  # the last line holds until unpatch
    finally:
        iin_fast.unpatch()
    assert len(names["report"].replaced) == 1 and "PiecewiseRationalQuadraticCouplingTransform" in str(names["report"])
    for value, after in zip(before, model(x), strict=True):
        assert torch.equal(value, after)


def test_weight_decay_groups_hold_weights_alone() -> None:
    """Names, since dimensions mislead: those of the page's function, for each kind of model."""
    groups_of = run_blocks("composition.md")["weight_decay_groups"]
    for model, least in (
        (iin_fast.nn.Flow(4, 2, 8, 1), 3),
        (iin_fast.IIN(6, {"color": 2}, n_flows=2, hidden_dim=8), 3),
        (iin_fast.nn.NeuralSplineFlow(4, n_flows=2, hidden_dim=8), 3),
        (iin_fast.nn.RealNVP(4, hidden_dim=8), 3),
        (iin_fast.nn.MaskedAutoregressiveFlow(4, hidden_dim=8), 3),
    ):
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = groups_of(model, 0.1)
        decayed, others = ({names[parameter] for parameter in group["params"]} for group in groups)
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert decayed | others == set(names.values()) and not decayed & others
        linear = {name for name in names.values() if name.rpartition(".")[2].startswith("weight")}
        matrices = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, iin_fast.nn.LULinear)}
        assert decayed == linear - matrices and len(decayed) >= least
        assert any(
            parameter.dim() > 1 for parameter, name in names.items() if name in others
        )  # what the rule gets wrong


def test_extras_in_the_text_exist() -> None:
    """Every ``iin-fast[...]`` and ``.[...]`` that a person is told to install names extras of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].keys()
    files = [ROOT / "README.md", ROOT / "pyproject.toml", *DOCS.rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    files += (ROOT / "iin_fast").rglob("*.py")
    named = set()
    for file in files:
        for found in re.findall(r"(?:iin-fast|install '?\.)\[([a-z, ]+)\]", file.read_text()):
            names = {name.strip() for name in found.split(",")}
            assert names <= extras, (file, found)
            named |= names
    assert named >= {"evaluate", "train", "demo", "io", "cli", "docs", "sentences", "sbi"}


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
    "module",
    [
        "iin_fast",
        "iin_fast.nn",
        "iin_fast.flow",
        "iin_fast.functional",
        "iin_fast.evaluate",
        "iin_fast.explore",
        "iin_fast.train",
        "iin_fast.train.run_folder",
    ],
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


BROKEN_NAMES = """() => [...document.querySelectorAll('.md-content td code, .md-content th code')].filter(code => {
    const range = document.createRange()
    range.selectNodeContents(code)
    const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)))
    return lines.size > 1 && !/\\s/.test(code.innerText.trim())
}).map(code => code.innerText)"""
WIDE_TABLES = """() => [...document.querySelectorAll('.md-typeset__scrollwrap')]
    .filter(box => box.scrollWidth > box.clientWidth).map(box => box.innerText.slice(0, 40))"""


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_a_desk_and_a_phone(site: Path, browser: Any, width: int) -> None:
    """No page scrolls sideways, no name in a table is broken in the middle, and on a desk no table scrolls, either."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    for file in sorted(site.rglob("index.html")):
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width, file
        assert page.evaluate(BROKEN_NAMES) == [], file
        assert width < 1280 or page.evaluate(WIDE_TABLES) == [], file
    page.close()
