"""The tutorial as a notebook: what is committed is the page, it ran, and it runs again."""

import importlib.util
from pathlib import Path

import pytest

for package in ("ipykernel", "jupytext", "matplotlib", "sklearn"):
    pytest.importorskip(package)
nbformat = pytest.importorskip("nbformat")
client = pytest.importorskip("nbclient")

SCRIPT = Path(__file__).parents[2] / "docs" / "notebook.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("notebook", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_notebook_is_the_page_and_ran(script):
    stored = nbformat.read(script.NOTEBOOK, 4)
    nbformat.validate(stored)
    cells = [(cell.cell_type, cell.source) for cell in stored.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in script.made().cells], "python docs/notebook.py"
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("the donor's digit is read in" in output.get("text", "") for cell in code for output in cell.outputs)


def test_the_notebook_runs(script):
    done = script.run(script.made())
    assert not any(output.output_type == "error" for cell in done.cells for output in cell.get("outputs", ()))


def test_an_error_in_a_cell_is_raised(script, tmp_path):
    (tmp_path / "page.md").write_text("# Page\n\n```python\nassert False\n```\n")
    with pytest.raises(client.exceptions.CellExecutionError):
        script.run(script.made(tmp_path / "page.md"))
