"""What the page of a published memory says: tables as Markdown, and a figure as PNG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from memtool.evaluation.record import Record
from memtool.evaluation.summary import summarise_rows
from memtool.reports.drawing import (
    SEQUENTIAL,
    WIDTH,
    colour_bar,
    file_bytes,
    heat_map,
    label_map,
    map_height,
    style,
)
from memtool.reports.table import Grid, methods_grid, percent
from memtool_stores.printable import printable

MOST_NUMBERED = 12


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown whose cells say what they hold, whatever that is."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def code(text: str) -> str:
    """Text as code: no markup in it is read."""
    text = printable(text).replace("`", "'")
    return f"`{text}`"


def _cell(text: str) -> str:
    if text == "---":
        return text
    text = printable(text).replace("|", "\\|")
    return text if text.startswith("`") else text.replace("<", "&lt;").replace("[", "\\[")


def measured(records: Sequence[Record]) -> str:
    """The table of an experiment, with its title above and its notes below."""
    grid = methods_grid(records)
    return "\n\n".join((_plain(grid.title), _bold(grid), *map(_plain, grid.notes)))


def _bold(grid: Grid) -> str:
    rows = [
        [f"**{cell}**" if (i, j) in grid.bold else cell for j, cell in enumerate(row)]
        for i, row in enumerate(grid.rows)
    ]
    return markdown_table(grid.header, rows)


def _plain(text: str) -> str:
    return printable(text).replace("<", "&lt;").replace("[", "\\[")


def accuracy_png(records: Sequence[Record]) -> bytes:
    """The accuracy of the method on every task after each task, mean over the seeds."""
    rows = summarise_rows(records)
    row = next((one for one in rows if one.kind == "method"), rows[0])
    values: npt.NDArray[np.float64] = row.mean[1:]
    tasks = list(records[0].run.task_names)
    known = values[~np.isnan(values)]
    low = float(np.floor(10 * known.min()) / 10) if known.size else 0.0
    high = float(np.ceil(10 * known.max()) / 10) if known.size else 1.0
    with style("card"):
        figure = Figure(figsize=(WIDTH, map_height(len(values))))
        axes = figure.subplots()
        text = percent if len(tasks) <= MOST_NUMBERED else None
        norm = Normalize(low, max(high, low + 0.1))
        mesh = heat_map(axes, values, norm, SEQUENTIAL, text)
        label_map(axes, [str(i) for i in range(1, len(values) + 1)], tasks)
        axes.set_xlabel("accuracy on task")
        axes.set_ylabel("after task")
        colour_bar(figure, mesh, axes, "accuracy (%)", lambda value: f"{100 * value:.0f}")
        return file_bytes(figure, "png")
