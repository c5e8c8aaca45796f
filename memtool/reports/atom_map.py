"""A map of atoms as a plot or a page: atoms, grouped by task, × the tokens of an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from memtool.atomic import write_atomic
from memtool.errors import MismatchError
from memtool.reports import drawing
from memtool.reports.drawing import INK, SEQUENTIAL, style
from memtool.reports.explanation import check_suffix
from memtool.reports.page import Picture, templates
from memtool.reports.table import Grid

__all__ = ["AtomPicture", "check_suffix", "write_atom_picture"]

MOST_PANELS = 12  # tasks that get a map of the image's patches


@dataclass(frozen=True, eq=False)
class AtomPicture:
    """What is shown of the atoms of one adapted map.

    weights (atoms, tokens): the tokens are `prefix_tokens` that are no patch, then `side` x `side`
    patches; tasks: for every atom the name of its task, atoms of a task next to each other; parts:
    the weight of every task, as a table.
    """

    title: str
    about: str
    tasks: tuple[str, ...]
    weights: npt.NDArray[np.float64]
    prefix_tokens: int
    side: int
    parts: Grid

    def __post_init__(self) -> None:
        expected = (len(self.tasks), self.prefix_tokens + self.side**2)
        if self.weights.shape != expected:
            raise MismatchError(
                f"weights of shape {self.weights.shape}", expected=f"{expected}: atoms, tokens"
            )

    @property
    def groups(self) -> list[tuple[str, npt.NDArray[np.float64]]]:
        """The rows of every task: (its atoms, tokens), in order."""
        names = np.array(self.tasks)
        return [(name, self.weights[names == name]) for name in dict.fromkeys(self.tasks)]


def write_atom_picture(picture: AtomPicture, path: Path) -> Path:
    """Write the plot (.svg, .png) or the page (.html); returns `path`.

    The same bytes for the same numbers. ConfigError for another suffix, MemtoolError when the file
    cannot be written.
    """
    check_suffix(path)
    if path.suffix.lower() == ".html":
        return write_atomic(path, _page(picture))
    with style("atoms"):
        figure = _figure(picture)
        figure.suptitle(f"{picture.title}: {picture.about}", fontsize=9)
        return write_atomic(path, drawing.file_bytes(figure, path.suffix.lower()[1:]))


def _page(picture: AtomPicture) -> str:
    with style("atoms"):
        svg = drawing.inline_svg(_figure(picture), "atoms")
    caption = (
        "Above: the weight that every token (columns: the class token, then the patches row by "
        "row) gives to every atom (rows, grouped by task). Below: the weight on all atoms of a "
        "task, patch by patch."
    )
    shown = [Picture(Markup(svg), caption)]
    return templates().get_template("atoms.html.j2").render(picture=picture, pictures=shown)


def _figure(picture: AtomPicture) -> Figure:
    """Atoms × tokens, above one map of the patches for every task."""
    groups = picture.groups
    panels = groups[:MOST_PANELS]
    lines = -(-len(panels) // 6)
    tall = max(1.6, min(0.05 * len(picture.tasks) + 0.6, 5.0))
    figure = Figure(figsize=(drawing.WIDTH, tall + 1.5 * lines), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(tall, 1.5 * lines))
    above, below = parts
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
    axes.set_xlabel("tokens")
    axes.set_ylabel("atoms by task")
    drawing.colour_bar(above, mesh, axes, "weight", lambda value: f"{value:.2g}")
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
    return figure
