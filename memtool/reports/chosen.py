"""What was tried for every row of a table, and what the order of the tasks does to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from memtool.evaluation.record import Record
from memtool.evaluation.selection import Choice, Selection
from memtool.reports.table import MISSING, Grid, percent


def selection_grid(records: Sequence[Record]) -> Grid | None:
    """Rows by what was tried, each with its figure on validation samples; None without a choice."""
    selection = records[0].run.selection
    if selection is None:
        return None

    def text(choice: Choice, number: int) -> str:
        figure = choice.figures[number]
        if figure is None:
            return "failed" if number in choice.failed else MISSING
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
            (
                label,
                *(text(choice, number) for number in range(len(selection.cells))),
                selection.cells[choice.chosen].text,
            )
            for label, choice in rows
        ),
        notes=tuple(_failures(selection, rows)),
    )


def _failures(selection: Selection, rows: Sequence[tuple[str, Choice]]) -> Iterator[str]:
    """A sentence for every cell and reason, with the rows that it failed for."""
    failed: dict[tuple[int, str], list[str]] = {}
    for label, choice in rows:
        for number, reason in choice.failed.items():
            failed.setdefault((number, reason), []).append(label)
    for (number, reason), labels in sorted(failed.items()):
        yield f"Failed with {selection.cells[number].text} ({'; '.join(labels)}): {reason}."


def bounds_grid(records: Sequence[Record]) -> Grid | None:
    """Rows by order: the final average at the hardest, the median and the easiest; None without.

    Means over the seeds of each order; the last column is the most less the least of the three.
    """
    known = [record.run.bound for record in records if record.run.bound is not None]
    if len(known) < len(records):
        return None
    names = list(dict.fromkeys(bound.name for bound in known))
    similar = {bound.name: bound.similarity for bound in known}
    body = []
    for row in records[0].metrics.rows:
        means = []
        for name in names:
            of = [
                r.row(row.id) for r, bound in zip(records, known, strict=True) if bound.name == name
            ]
            means.append(sum(one.metrics.get("faa", math.nan) for one in of) / len(of))
        cells = (*map(percent, means), percent(max(means) - min(means)))
        body.append((row.label, *cells))
    return Grid(
        title="Final average in % by the order of classes or tasks",
        header=("", *(f"{name} ({similar[name]:.3f})" for name in names), "between them"),
        rows=tuple(body),
        notes=(
            "In brackets the similarity of the order: of classes in different tasks, which makes "
            "learning easier; of whole domains that of neighbours, which makes it harder.",
        ),
    )
