"""Run the notebooks of this folder, or those named, and keep what they show, small.

    python docs/make_notebooks.py [NAME ...]

Live figures are left out of what is kept: who reads a notebook without running it sees static ones.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT = ("text/html", "image/svg+xml", "text/plain")
"""What is kept of an output, the first of these that it has; texts of cells beside it."""


def executed(path: Path, folder: Path) -> Any:
    """The notebook at a path, run in a folder. Raises nbclient's CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def smaller(notebook: Any) -> Any:
    """The notebook with one form of every output, without times, versions and standard error."""
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type != "code":
            continue
        outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for one in outputs:
            if "data" in one:
                form = next(form for form in KEPT if form in one.data)
                one.data = {form: one.data[form]}
                one.metadata.clear()
        cell.outputs = outputs
    return notebook


def kept(path: Path) -> str:
    """The text of the file of a notebook, run in a folder of its own, whose name is left out."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        text: str = nbformat.writes(smaller(executed(path, Path(folder))))
    return text.replace(f"{folder}/", "") + "\n"


def main() -> None:
    """Run and write those that are named, as `adapters`, or all."""
    for path in [HERE / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        path.write_text(kept(path), encoding="utf-8")


if __name__ == "__main__":
    main()
