"""The notebooks of the documentation run from the first cell to the last, and show something."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))


def shown(notebook: Any) -> list[list[str]]:
    """The forms of every output of every cell of code."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[form for one in cell.outputs for form in one.get("data", {})] for cell in cells]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_says(path: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    make = runpy.run_path(str(DOCS / "make_notebooks.py"))
    ran = make["smaller"](make["executed"](path, tmp_path))
    assert shown(ran) == shown(nbformat.read(path, as_version=4))
    assert any("image/svg+xml" in forms for forms in shown(ran))
    assert path.stat().st_size < 400_000
