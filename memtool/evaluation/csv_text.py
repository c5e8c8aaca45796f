"""Rows as CSV, in which no text is a formula to a spreadsheet or breaks its row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from memtool_stores.printable import as_cell, from_cell


def to_csv(rows: Iterable[Sequence[str | int]]) -> str:
    """The rows as CSV, text as `as_cell`. `from_csv` gives them back."""
    cells = [[as_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    # The writer quotes what holds a comma, a quote or a line feed, but no carriage return.
    returns = any("\r" in cell for row in cells for cell in row if isinstance(cell, str))
    buffer = io.StringIO()
    writer = csv.writer(
        buffer, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    )
    writer.writerows(cells)
    return buffer.getvalue()


def from_csv(text: str) -> list[list[str]]:
    """The cells of rows that `to_csv` made, as text. Raises ValueError for what is no CSV."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"not CSV: {error}") from error
    return [[from_cell(cell) for cell in row] for row in rows]
