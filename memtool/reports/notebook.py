"""What a notebook shows of a record, a memory, its log and a retrieval: tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from memtool.errors import NotFoundError
from memtool.evaluation.record import Record
from memtool.evaluation.summary import summarise_rows
from memtool.reports.table import Grid, by_kind, methods_grid
from memtool_stores.printable import printable

if TYPE_CHECKING:
    from memtool.reports.figure import Figure

_STYLE = "text-align:right;padding:.2em .6em"


def table_html(grid: Grid, *, most: int = 60) -> str:
    """A table as HTML that stands on its own; of more than `most` rows the first, and a note."""
    grid = grid.printable
    head = "".join(f'<th style="{_STYLE}">{escape(name)}</th>' for name in grid.header)
    body = []
    for i, row in enumerate(grid.rows[:most]):
        cells = []
        for j, cell in enumerate(row):
            text = f"<b>{escape(cell)}</b>" if (i, j) in grid.bold else escape(cell)
            align = "left" if j == 0 else "right"
            cells.append(f'<td style="text-align:{align};padding:.2em .6em">{text}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    more = len(grid.rows) - most
    notes = [*([f"… and {more} more"] if more > 0 else []), *grid.notes]
    below = "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)
    return (
        f"<table><caption>{escape(grid.title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>{below}"
    )


def pairs_html(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, as HTML."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(printable(name))}</th>"
        f"<td style='text-align:left'>{escape(printable(value))}</td></tr>"
        for name, value in pairs
    )
    return f"<table><caption>{escape(printable(title))}</caption><tbody>{rows}</tbody></table>"


def record_html(record: Record) -> str:
    """The table of methods, and the first figure as a static picture."""
    figure = next(iter(figures_of([record]).values()), None)
    picture = "" if figure is None else figure.svg()
    return table_html(methods_grid([record])) + picture


def figures_of(records: Sequence[Record]) -> dict[str, Figure]:
    """All figures of one experiment by name, in the order of the report; those that it has."""
    from memtool.reports import charts
    from memtool.reports.html import leading_first, measure_of

    rows = by_kind(summarise_rows(records))
    measure, ordered = measure_of(records, rows), leading_first(rows, records)
    made = (
        charts.recall_map(records[0]),
        charts.methods_figure(ordered, records, measure),
        charts.curves_figure(ordered, records, measure),
        charts.matrix_figure(ordered, records, measure),
        charts.forgetting_figure(ordered, records, measure),
        charts.paired_figure(rows, records),
        charts.confusion_figure(ordered, records),
        charts.classes_figure(ordered, records),
        charts.learning_figure(records[0]),
        charts.keys_figure(records[0]),
        charts.recall_error_figure(rows),
    )
    return {figure.name: figure for figure in made if figure is not None}


def figure_of(record: Record, name: str | None) -> Figure:
    """The figure of a name, or the first. NotFoundError for one that the record does not have."""
    figures = figures_of([record])
    if name is None and figures:
        return next(iter(figures.values()))
    if name not in figures:
        raise NotFoundError(
            f"no figure {name!r} in the record", expected=", ".join(figures) or "a measured row"
        )
    return figures[name]
