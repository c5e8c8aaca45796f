"""A map of atoms as a plot or a page: atoms, grouped by task, × the tokens of an input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from memtool.atomic import write_atomic
from memtool.reports import drawing
from memtool.reports.drawing import INK, SEQUENTIAL, style
from memtool.reports.page import Picture, templates
from memtool.reports.shown import AtomPicture, format_of

MOST_PANELS = 12  # tasks that get a map of the image's patches
LINE = 48  # tokens of a text that stand beside each other with their names


def write_atom_picture(picture: AtomPicture, path: Path) -> Path:
    """Write the plot (.svg, .png) or the page (.html); returns `path`.

    The same bytes for the same numbers. ConfigError for another suffix, MemtoolError when the file
    cannot be written.
    """
    kind = format_of(path)
    if kind == "html":
        return write_atomic(path, _page(picture))
    with style("atoms"), any_script():
        figure = _figure(picture)
        title = f"{drawing.short(picture.title, 60)}: {drawing.short(picture.about, 90)}"
        figure.suptitle(_visible(title), fontsize=9, parse_math=False)
        return write_atomic(path, drawing.file_bytes(figure, kind))


def _page(picture: AtomPicture) -> str:
    with style("atoms"), any_script():
        svg = drawing.inline_svg(_figure(picture), "atoms")
    columns, parts = "the class token, then the patches row by row", "patch by patch"
    if picture.columns:
        columns = "the tokens of a prompt, or the means over those of a text"
        parts = "column by column, in lines"
    caption = (
        f"Above: the weight that the columns ({columns}) give to every atom (rows, grouped by "
        f"task). Below: the weight on all atoms of a task, {parts}."
    )
    shown = [Picture(Markup(svg), caption)]
    return templates().get_template("atoms.html.j2").render(picture=picture, pictures=shown)


def _figure(picture: AtomPicture) -> Figure:
    """Atoms × tokens, above the weights of every task: on the patches, or token by token."""
    groups = picture.groups
    if picture.columns:
        lines, each = lines_of(picture.columns), height_of_line(len(groups))
    else:
        lines, each = -(-len(groups[:MOST_PANELS]) // 6), 1.5
    tall = max(1.6, min(0.05 * len(picture.tasks) + 0.6, 5.0))
    figure = Figure(figsize=(drawing.WIDTH, tall + each * lines), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(tall, each * lines))
    above, below = parts
    _draw_atoms(above, picture)
    if picture.columns:
        sums = np.stack([rows.sum(axis=0) for _, rows in groups])
        draw_lines(below, [name for name, _ in groups], sums, picture.columns)
    else:
        _draw_patches(below, picture, lines)
    return figure


def _draw_atoms(above: Any, picture: AtomPicture) -> None:
    """Every atom on every token."""
    groups = picture.groups
    axes = above.subplots()
    largest = float(picture.weights.max()) or 1.0
    mesh = drawing.heat_map(axes, picture.weights, Normalize(0, largest), SEQUENTIAL, None)
    ends = np.cumsum([len(rows) for _, rows in groups])
    for end in ends[:-1]:
        axes.axhline(end, color=INK, linewidth=0.8)
    centres = ends - np.diff(ends, prepend=0) / 2
    step = -(-len(groups) // 26)
    axes.set_yticks(
        centres[::step], [drawing.short(name) for name, _ in groups[::step]], fontsize=8
    )
    if picture.prefix_tokens:
        axes.axvline(picture.prefix_tokens, color=INK, linewidth=0.8)
    axes.set_xticks([])
    if not picture.columns:
        axes.set_xlabel("tokens")
    axes.set_ylabel("atoms by task")
    drawing.colour_bar(above, mesh, axes, "weight", lambda value: f"{value:.2g}")


def draw_lines(
    below: Any, names: Sequence[str], weights: npt.NDArray[np.float64], columns: Sequence[str]
) -> None:
    """Weights (names, tokens) on the tokens of a text, in lines, with what the tokens say."""
    most, lines = float(weights.max()) or 1.0, lines_of(columns)
    for line, axes in enumerate(below.subplots(lines, 1, squeeze=False).flat):
        shown = weights[:, line * LINE : (line + 1) * LINE]
        width = LINE if lines > 1 else shown.shape[1]  # tokens are as wide in every line
        padded = np.full((len(names), width), np.nan)
        padded[:, : shown.shape[1]] = shown
        drawing.heat_map(axes, padded, Normalize(0, most), SEQUENTIAL, None)
        words = [drawing.short(_visible(word), 12) for word in columns[line * LINE :][:LINE]]
        places = np.arange(len(words)) + 0.5
        axes.set_xticks(places, words, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(*drawing.ticks(names, 26), fontsize=7)


def lines_of(columns: Sequence[str]) -> int:
    """Lines that the tokens of a text take."""
    return -(-len(columns) // LINE)


def height_of_line(names: int) -> float:
    """Inches of a line of tokens for so many rows."""
    return 0.9 + 0.17 * names


def _visible(text: str) -> str:
    """Text with a sign for every character that would not be seen in a plot."""
    signs = {"\n": "⏎", "\t": "⇥"}
    seen = "".join(signs.get(c, c if c.isprintable() else "�") for c in text)
    return seen if seen.strip() else "␣"  # a tokenizer may drop a space that stands alone


@contextmanager
def any_script() -> Iterator[None]:
    """Draw letters that the font of the plot lacks as boxes; a browser has its own fonts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _draw_patches(below: Any, picture: AtomPicture, lines: int) -> None:
    """A map of the image for every task."""
    panels = picture.groups[:MOST_PANELS]
    maps = [
        rows[:, picture.prefix_tokens :].sum(axis=0).reshape(picture.side, picture.side)
        for _, rows in panels
    ]
    most = max((float(values.max()) for values in maps), default=0.0) or 1.0
    grid = below.subplots(lines, min(6, len(panels)), squeeze=False)
    for panel in grid.flat:
        panel.set_visible(False)
    for panel, (name, _), values in zip(grid.flat, panels, maps, strict=False):
        panel.set_visible(True)
        drawing.heat_map(panel, values, Normalize(0, most), SEQUENTIAL, None)
        panel.set_aspect("equal")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(drawing.short(name, 12), fontsize=8)
