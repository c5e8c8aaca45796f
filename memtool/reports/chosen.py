"""What was tried for every row of a table, where settings were chosen on validation samples."""

from __future__ import annotations

from collections.abc import Sequence

from memtool.evaluation.record import Record
from memtool.reports.table import MISSING, Grid, percent


def selection_grid(records: Sequence[Record]) -> Grid | None:
    """Rows by what was tried, each with its figure on validation samples; None without a choice."""
    selection = records[0].run.selection
    if selection is None:
        return None

    def text(figure: float | None) -> str:
        if figure is None:
            return MISSING
        return percent(figure) if selection.measure == "accuracy" else f"{figure:.3f}"

    rows = [
        (row.label, choice)
        for row in records[0].metrics.rows
        if (choice := selection.rows.get(row.id)) is not None
    ]
    unit = "accuracy in %" if selection.measure == "accuracy" else "loss, nats per answer token"
    return Grid(
        title=f"What was tried: {unit} on {selection.on}",
        header=("", *(cell.text for cell in selection.cells), "chosen"),
        rows=tuple(
            (label, *map(text, choice.figures), selection.cells[choice.chosen].text)
            for label, choice in rows
        ),
    )
