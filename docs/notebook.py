"""Writes docs/tutorial.ipynb, the tutorial as a notebook with what its cells print: python docs/notebook.py (half a minute)."""

import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
NOTEBOOK = DOCS / "tutorial.ipynb"


def made(page: Path = DOCS / "tutorial.md") -> Any:
    """The notebook of a page: its blocks of Python are cells. Nothing has run yet."""
    notebook = jupytext.read(page)
    notebook.metadata = {
        "kernelspec": {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same for the same page
    return notebook


def run(notebook: Any) -> Any:
    """All cells, one after the other, in a folder that goes away; an error in one of them is raised."""
    with tempfile.TemporaryDirectory() as folder:
        return NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": folder}}
        ).execute()


def main() -> None:
    notebook = run(made())
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
