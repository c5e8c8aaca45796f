"""How every plot is drawn: one style, heat maps and their labels, and the way to SVG and files.

Text and lines are drawn in two marker colours. On a page these become CSS (`currentColor`,
`var(--rule)`), so that one picture reads well on a light page, on a dark one and on paper.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from memtool_stores.printable import printable

INK = "#0b0c0e"
RULE = "#c3c4c7"

# Okabe and Ito's colours without black and yellow, which one of the two pages would swallow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SEQUENTIAL = "cividis"
DIVERGING = "PuOr"

MOST_NUMBERED = 12  # numbers stand in the cells of a map up to this many columns
MOST_DRAWN = 900  # beyond this many cells a map is one image: shapes would fill megabytes
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 7.2  # inches: the width of the text column


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Text stays text in the SVG: the reader's browser has the glyphs that our font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                # A salt of its own for every figure: ids must not meet on the page.
                "svg.hashsalt": f"memtool {salt}",
                "svg.fonttype": "none",
                "text.parse_math": False,  # a "$" in a task's name is a dollar
                "font.family": "sans-serif",
                "font.sans-serif": ["DejaVu Sans"],
                "font.size": 8.5,
                "text.color": INK,
                "axes.labelcolor": INK,
                "axes.edgecolor": RULE,
                "axes.linewidth": 0.8,
                "xtick.color": INK,
                "ytick.color": INK,
                "xtick.major.size": 0,
                "ytick.major.size": 0,
                "legend.frameon": False,
                "figure.facecolor": "none",
                "axes.facecolor": "none",
                "savefig.facecolor": "none",
            }
        )
        yield


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element whose ids begin with `name`."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.04, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    # Axes and groups are numbered from 1 in every figure; ids are one name space on a page.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    return svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")


def file_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a file of its own, "svg" or "png", on white."""
    buffer = io.BytesIO()
    # Without dates and versions: the same bytes for the same numbers.
    metadata = {"svg": ("Date", "Creator"), "png": ("Software",)}[kind]
    figure.savefig(
        buffer,
        format=kind,
        bbox_inches="tight",
        pad_inches=0.1,
        dpi=200,
        facecolor="white",
        metadata=dict.fromkeys(metadata),
    )
    return buffer.getvalue()


def short(name: str, length: int = 18) -> str:
    """A name cut to so many letters, as it can be drawn."""
    name = printable(name[: length + 1])
    return name if len(name) <= length else name[: length - 1] + "…"


def legend_name(name: str) -> str:
    """A name for a legend, which leaves out what is empty or begins with a low line."""
    return short(f" {name}" if not name or name.startswith("_") else name, 40)


def ticks(names: Sequence[str], most: int, length: int = 18) -> tuple[list[float], list[str]]:
    """Centres and names of the cells that get a tick: all, or every k-th of many."""
    step = -(-len(names) // most)
    chosen = range(0, len(names), step)
    return [i + 0.5 for i in chosen], [short(names[i], length) for i in chosen]


def heat_map(
    axes: Any,
    values: npt.NDArray[np.float64],
    norm: Normalize,
    colours: str,
    text: Callable[[float], str] | None,
    size: float = 8.0,
) -> Any:
    """A heat map of values (rows, columns), first row on top; NaN stays blank."""
    cells = np.ma.masked_invalid(values)
    rows, columns = values.shape
    if values.size <= MOST_DRAWN:
        mesh = axes.pcolormesh(cells, cmap=colours, norm=norm, edgecolors="face", linewidth=0.3)
    else:
        mesh = axes.imshow(
            cells, cmap=colours, norm=norm, interpolation="none", extent=(0, columns, rows, 0)
        )
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_aspect("auto")
    for side in axes.spines.values():
        side.set_visible(False)
    if text is not None:
        for (row, column), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            red, green, blue, _ = mesh.cmap(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                column + 0.5,
                row + 0.5,
                text(value),
                ha="center",
                va="center",
                fontsize=size,
                color="#ffffff" if dark else "#111111",
            )
    return mesh


def label_map(
    axes: Any, rows: Sequence[str], columns: Sequence[str], most: int = 26, length: int = 18
) -> None:
    """Names at the rows and columns of a map, slanted where they would meet; not all of many.

    Names of rows are cut to `length` letters.
    """
    positions, names = ticks(columns, most)
    slanted = max(map(len, names)) * len(names) > 64
    axes.set_xticks(
        positions, names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
    )
    axes.set_yticks(*ticks(rows, most, length))


def colour_bar(
    figure: Figure, mesh: Any, axes: Any, title: str, text: Callable[[float], str]
) -> None:
    """The scale of a map beside its axes."""
    bar = figure.colorbar(mesh, ax=axes, fraction=0.045, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label(title)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def map_height(rows: int) -> float:
    """Inches for a map of so many rows: comfortable for few, never taller than a page."""
    return float(min(0.9 + 0.3 * rows, 7.0))


def minus(text: str) -> str:
    """With a minus sign in place of the hyphen."""
    return text.replace("-", "−")


def coefficient_scale(values: npt.NDArray[np.float64]) -> tuple[Normalize, str]:
    """Zero in the middle of a diverging map when a coefficient is negative, else from zero up."""
    largest = float(np.abs(values).max()) or 1.0
    if (values < 0).any():
        return Normalize(-largest, largest), DIVERGING
    return Normalize(0.0, largest), SEQUENTIAL
