"""The notebooks of the documentation run from the first cell to the last, and show something."""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.shown import shown_file

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = [DOCS / f"{name}.ipynb" for name in ("five-minutes", "adapters", "own-method")]
OF_THIS_MACHINE = [str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()]


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: Any) -> list[list[str]]:
    """The forms of every output of every cell of code."""
    return [
        [form for one in cell.outputs for form in one.get("data", {})] for cell in code(notebook)
    ]


def require_fit_to_keep(text: str) -> Any:
    """The notebook, which is small, ran without an error, and names no place of this machine."""
    assert len(text.encode()) < 200_000
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == [
        number for number, _ in enumerate(code(notebook), start=1)
    ]
    outputs = [one for cell in code(notebook) for one in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error" or one.get("name") == "stderr"]
    assert not [place for place in OF_THIS_MACHINE if place in str(outputs)]
    assert any(
        "image/svg+xml" in form or "<svg" in str(one)
        for one in outputs
        for form in one.get("data", {})
    )
    return notebook


def test_all_notebooks_are_known() -> None:
    assert sorted(NOTEBOOKS) == sorted(DOCS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_notebook(path: Path) -> None:
    require_fit_to_keep(path.read_text(encoding="utf-8"))


def test_the_method_of_the_notebook_is_that_of_its_page() -> None:
    cells = code(nbformat.read(DOCS / "own-method.ipynb", as_version=4))
    assert (
        cells[0].source == f"%%writefile nearest_mean.py\n{shown_file('nearest_mean.py')}".rstrip()
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_says(path: Path) -> None:
    ran = require_fit_to_keep(runpy.run_path(str(DOCS / "make_notebooks.py"))["kept"](path))
    assert shown(ran) == shown(nbformat.read(path, as_version=4))
