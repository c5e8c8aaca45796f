"""One explained input as a plot or a page: blocks × adapters, and what every adapter adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from memtool.atomic import write_atomic
from memtool.reports import drawing
from memtool.reports.atom_map import any_script, draw_lines, height_of_line, lines_of
from memtool.reports.drawing import DIVERGING, INK, MOST_NUMBERED, RULE, minus, style
from memtool.reports.page import Picture, templates
from memtool.reports.shown import Explained, coefficient_grid, format_of


def write_explained(explained: Explained, path: Path) -> Path:
    """Write the plot (.svg, .png) or the page (.html); returns `path`.

    The same bytes for the same numbers. ConfigError for another suffix, MemtoolError when the file
    cannot be written.
    """
    kind = format_of(path)
    if kind == "html":
        return write_atomic(path, _page(explained))
    with style("explain"), any_script():
        plot = _figure(explained)
        plot.suptitle(drawing.short(f"{explained.title}: {explained.facts[0][1]}", 110), fontsize=9)
        return write_atomic(path, drawing.file_bytes(plot, kind))


def _page(explained: Explained) -> str:
    with style("explain"), any_script():
        svg = drawing.inline_svg(_figure(explained), "explain")
    caption = (
        "Above: the coefficient of every adapter in every block; negative ones are subtracted. "
        "Below: how much of the winning class's probability goes when the adapter is left out and "
        "all others stay."
    )
    if explained.columns:
        caption += " Last: the weight of every adapter at every token of the prompt, in lines."
    return (
        templates()
        .get_template("explanation.html.j2")
        .render(
            explained=explained,
            pictures=[Picture(Markup(svg), caption)],
            coefficients=coefficient_grid(explained),
        )
    )


def _figure(explained: Explained) -> Figure:
    """Coefficients as a map around zero, above the contributions in percentage points."""
    values, count = explained.values, len(explained.adapters)
    largest = float(np.abs(values).max()) or 1.0
    tall = drawing.map_height(len(values)) - 0.6
    last = lines_of(explained.columns) * height_of_line(count)
    figure = Figure(figsize=(drawing.WIDTH, tall + 1.9 + last), layout="constrained")
    top: Any = figure
    if explained.columns:
        parts: Any = figure.subfigures(2, 1, height_ratios=(tall + 1.9, last))
        top, lines = parts
        draw_lines(lines, explained.adapters, explained.by_token, explained.columns)
    above, below = top.subplots(2, 1, sharex=True, height_ratios=(tall, 1.2))
    numbered = count <= MOST_NUMBERED and len(values) <= 2 * MOST_NUMBERED
    mesh = drawing.heat_map(
        above,
        values,
        Normalize(-largest, largest),
        DIVERGING,
        (lambda value: minus(f"{round(value, 2) + 0.0:.2f}")) if numbered else None,
    )
    above.set_yticks(*drawing.ticks(explained.rows, 26))
    drawing.colour_bar(top, mesh, above, "coefficient", lambda value: minus(f"{value + 0.0:.2g}"))
    points = 100 * explained.contributions
    ends = mesh.cmap(0.9), mesh.cmap(0.1)
    colours = [ends[0] if point >= 0 else ends[1] for point in points]
    below.bar(np.arange(count) + 0.5, points, width=0.7, color=colours, linewidth=0)
    below.axhline(0, color=INK, linewidth=0.8)
    below.grid(axis="y", color=RULE, linewidth=0.6)
    below.set_axisbelow(True)
    for side in below.spines.values():
        side.set_visible(False)
    low, high = min(points.min(), 0.0), max(points.max(), 0.0)
    room = 0.18 * max(high - low, 1.0)
    below.set_ylim(low - room * bool(low), high + room)
    below.yaxis.set_major_locator(MaxNLocator(4))
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: minus(f"{value:g}")))
    if numbered:
        for place, point in enumerate(points.tolist()):
            below.annotate(
                minus(f"{round(point, 1) + 0.0:.1f}"),
                (place + 0.5, point),
                xytext=(0, 2 if point >= 0 else -2),
                textcoords="offset points",
                ha="center",
                va="bottom" if point >= 0 else "top",
                fontsize=8,
            )
    of_class = f" of {drawing.short(explained.winner, 14)}" if explained.winner else ""
    below.set_ylabel(f"adds to the\nprobability{of_class}\n(points)")
    positions, names = drawing.ticks(explained.adapters, 26)
    slanted = max(map(len, names)) * len(names) > 64
    below.set_xticks(
        positions, names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
    )
    return figure
