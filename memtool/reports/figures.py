"""The plots of a report as inline SVG: the same bytes for the same numbers, at home on any page.

Text and lines are drawn in two marker colours that become CSS (`currentColor`, `var(--rule)`), so
that one picture reads well on a light page, on a dark one and on paper.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from memtool.errors import MismatchError
from memtool.evaluation.metrics import seen_accuracy
from memtool.evaluation.summary import RowSummary
from memtool.reports.table import label, percent

INK = "#0b0c0e"
RULE = "#c3c4c7"

# Okabe and Ito's colours without black and yellow, which one of the two pages would swallow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SEQUENTIAL = "cividis"
DIVERGING = "PuOr"

MOST_NUMBERED = 12  # numbers stand in the cells of a map up to this many columns
MOST_DRAWN = 900  # beyond this many cells a map is one image: shapes would fill megabytes
WIDTH = 7.2  # inches: the width of the text column


@dataclass(frozen=True, eq=False)
class CoefficientMap:
    """Mean coefficient of each adapter for the samples of each true task.

    values: (tasks, adapters), or (blocks, tasks, adapters) with the numbers of the blocks.
    """

    values: npt.NDArray[np.float64]
    tasks: tuple[str, ...]
    adapters: tuple[str, ...]
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        expected: tuple[int, ...] = (len(self.tasks), len(self.adapters))
        if self.blocks:
            expected = (len(self.blocks), *expected)
        _check(self.values, expected, "a coefficient map")

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean over the blocks: (tasks, adapters)."""
        return np.asarray(self.values.mean(axis=0) if self.blocks else self.values)


@dataclass(frozen=True, eq=False)
class KeyMap:
    """Cosine similarity of the keys of every two adapters: (adapters, adapters)."""

    similarity: npt.NDArray[np.float64]
    adapters: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self.similarity, (len(self.adapters), len(self.adapters)), "a key map")

    @classmethod
    def of_keys(cls, keys: npt.ArrayLike, adapters: Sequence[str]) -> KeyMap:
        """The map of keys (adapters, d), or (blocks, adapters, d): the mean over the blocks."""
        vectors = np.asarray(keys, dtype=np.float64)
        if vectors.ndim not in (2, 3):
            raise MismatchError(
                f"keys of shape {vectors.shape}", expected="(adapters, d) or (blocks, adapters, d)"
            )
        norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
        if (norms == 0).any():
            raise MismatchError("a key of all zeros", expected="keys with a direction")
        units = vectors / norms
        cosine = units @ units.swapaxes(-1, -2)
        return cls(cosine.mean(axis=0) if cosine.ndim == 3 else cosine, tuple(adapters))


def _check(values: npt.NDArray[np.float64], expected: tuple[int, ...], what: str) -> None:
    if values.shape != expected or 0 in expected:
        raise MismatchError(f"{what} of shape {values.shape}", expected=f"{expected}, not empty")
    if not np.isfinite(values).all():
        raise MismatchError(f"{what} with NaN or infinity", expected="finite numbers")


@contextmanager
def _style(salt: str) -> Iterator[None]:
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


def _svg(figure: Figure, name: str) -> str:
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


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _ticks(names: Sequence[str], most: int) -> tuple[list[float], list[str]]:
    """Centres and names of the cells that get a tick: all, or every k-th of many."""
    step = -(-len(names) // most)
    chosen = range(0, len(names), step)
    return [i + 0.5 for i in chosen], [_short(names[i]) for i in chosen]


def _steps(tasks: Sequence[str]) -> list[str]:
    """`1 photo`, `2 art`, …; of many tasks the numbers alone."""
    if len(tasks) > MOST_NUMBERED:
        return [str(i) for i in range(1, len(tasks) + 1)]
    return [f"{i} {task}" for i, task in enumerate(tasks, start=1)]


def _map(
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


def _label_map(axes: Any, rows: Sequence[str], columns: Sequence[str], most: int = 26) -> None:
    positions, names = _ticks(columns, most)
    slanted = max(map(len, names)) * len(names) > 64
    axes.set_xticks(
        positions, names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
    )
    axes.set_yticks(*_ticks(rows, most))


def _colour_bar(
    figure: Figure, mesh: Any, axes: Any, title: str, text: Callable[[float], str]
) -> None:
    bar = figure.colorbar(mesh, ax=axes, fraction=0.045, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label(title)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _height(rows: int) -> float:
    """Inches for a map of so many rows: comfortable for few, never taller than a page."""
    return float(min(0.9 + 0.3 * rows, 7.0))


def _minus(text: str) -> str:
    return text.replace("-", "−")


def accuracy_map(
    accuracy: npt.NDArray[np.float64], tasks: Sequence[str], name: str = "accuracy"
) -> str:
    """Heat map of an accuracy matrix (T+1, T) in percent; a row 0 without scores is left out."""
    first = 1 if np.isnan(accuracy[0]).all() else 0
    values = accuracy[first:]
    steps = ["before any", *_steps(tasks)][first:]
    known = values[~np.isnan(values)]
    low = float(np.floor(10 * known.min()) / 10) if known.size else 0.0
    high = float(np.ceil(10 * known.max()) / 10) if known.size else 1.0
    norm = Normalize(low, max(high, low + 0.1))
    with _style(name):
        figure = Figure(figsize=(WIDTH, _height(len(values))))
        axes = figure.subplots()
        numbered = len(tasks) <= MOST_NUMBERED
        mesh = _map(axes, values, norm, SEQUENTIAL, percent if numbered else None)
        _label_map(axes, steps, list(tasks))
        axes.set_xlabel("accuracy on task")
        axes.set_ylabel("after task")
        _colour_bar(figure, mesh, axes, "accuracy (%)", lambda value: f"{100 * value:.0f}")
        return _svg(figure, name)


def accuracy_curves(rows: Sequence[RowSummary], tasks: Sequence[str], name: str = "curves") -> str:
    """Mean accuracy on the tasks seen so far after each task, a line for every row.

    Several seeds: the mean, in a band of one sample standard deviation. A row that was measured
    only now and then is drawn by its markers.
    """
    seen = [np.stack([seen_accuracy(one) for one in row.accuracy]) for row in rows]
    return _curves(rows, seen, tasks, name, "mean accuracy on seen tasks (%)")


def recall_error_curves(
    rows: Sequence[RowSummary], tasks: Sequence[str], name: str = "recall"
) -> str:
    """Mean relative error of all recalled adapters by the number of stored tasks; log scale.

    Rows without recalled adapters are left out. Several seeds as in `accuracy_curves`.
    """
    known = [row for row in rows if row.recall_error is not None]
    seen = [np.stack([seen_accuracy(one) for one in row.recall_error]) for row in known]  # type: ignore[union-attr]
    return _curves(known, seen, tasks, name, "relative recall error", log=True)


def _curves(
    rows: Sequence[RowSummary],
    values: Sequence[npt.NDArray[np.float64]],
    tasks: Sequence[str],
    name: str,
    what: str,
    *,
    log: bool = False,
) -> str:
    """A line for every row: values[i] (seeds, T) after each task, NaN where not measured."""
    steps = np.arange(1, len(tasks) + 1)
    markers = ("o", "s", "^", "D", "v", "P", "X")
    with _style(name):
        figure = Figure(figsize=(WIDTH, 3.3))
        axes = figure.subplots()
        others = 0
        for row, seen in zip(rows, values, strict=True):
            known = ~np.isnan(seen).any(axis=0)
            if not known.any():
                continue
            mean = seen.mean(axis=0)
            if row.kind == "method":
                look: dict[str, Any] = {"linewidth": 2.2, "zorder": 3}
            elif row.kind == "baseline":
                look = {"linewidth": 1.1, "zorder": 2}
            else:
                look = {
                    "linewidth": 1.1,
                    "zorder": 1,
                    "linestyle": (0, (4, 2)),
                    "markerfacecolor": "none",
                }
            colour = INK if row.kind == "upper bound" else COLOURS[others % len(COLOURS)]
            marker = markers[others % len(markers)] if row.kind != "upper bound" else "o"
            others += row.kind != "upper bound"
            axes.plot(
                steps[known],
                mean[known],
                color=colour,
                marker=marker,
                markersize=4 if len(tasks) <= 25 else 2,
                label=label(row),
                **look,
            )
            if len(seen) > 1:
                spread = seen[:, known].std(axis=0, ddof=1)
                axes.fill_between(
                    steps[known],
                    mean[known] - spread,
                    mean[known] + spread,
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        positions, names = _ticks(_steps(tasks), 30)
        slanted = max(map(len, names)) * len(names) > 72
        axes.set_xticks(
            [position + 0.5 for position in positions],
            names,
            rotation=45 if slanted else 0,
            ha="right" if slanted else "center",
        )
        if log:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        axes.set_xlabel("after task")
        axes.set_ylabel(what)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.2)
        return _svg(figure, name)


def _coefficient_scale(values: npt.NDArray[np.float64]) -> tuple[Normalize, str]:
    """Zero in the middle of a diverging map when a coefficient is negative, else from zero up."""
    largest = float(np.abs(values).max()) or 1.0
    if (values < 0).any():
        return Normalize(-largest, largest), DIVERGING
    return Normalize(0.0, largest), SEQUENTIAL


def coefficient_map(coefficients: CoefficientMap, name: str = "coefficients") -> str:
    """Heat map of mean coefficients, true task × adapter; the mean over the blocks if several."""
    values = coefficients.mean
    norm, colours = _coefficient_scale(coefficients.values)
    numbered = len(coefficients.adapters) <= MOST_NUMBERED
    with _style(name):
        figure = Figure(figsize=(WIDTH, _height(len(values))))
        axes = figure.subplots()
        text = (lambda value: _minus(f"{value + 0.0:.2f}")) if numbered else None
        mesh = _map(axes, values, norm, colours, text)
        _label_map(axes, list(coefficients.tasks), list(coefficients.adapters))
        axes.set_xlabel("adapter")
        axes.set_ylabel("true task")
        _colour_bar(figure, mesh, axes, "mean coefficient", lambda value: _minus(f"{value:.2g}"))
        return _svg(figure, name)


def coefficient_blocks(coefficients: CoefficientMap, name: str = "blocks") -> str:
    """Small heat maps of the mean coefficients, one for every block, on one scale."""
    norm, colours = _coefficient_scale(coefficients.values)
    columns = min(4, len(coefficients.blocks))
    lines = -(-len(coefficients.blocks) // columns)
    with _style(name):
        figure = Figure(figsize=(WIDTH, 0.5 + 1.55 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False)
        for panel in panels.flat:
            panel.set_visible(False)
        mesh: Any = None
        for panel, block, values in zip(
            panels.flat, coefficients.blocks, coefficients.values, strict=False
        ):
            panel.set_visible(True)
            mesh = _map(panel, values, norm, colours, None)
            panel.set_title(f"block {block}", fontsize=8.5)
            panel.set_xticks([])
            panel.set_yticks([])
        figure.supxlabel("adapter", fontsize=8.5)
        figure.supylabel("true task", fontsize=8.5)
        _colour_bar(
            figure, mesh, list(panels.flat), "mean coefficient", lambda v: _minus(f"{v:.2g}")
        )
        return _svg(figure, name)


def key_map(keys: KeyMap, name: str = "keys") -> str:
    """Heat map of the cosine similarity of keys, from −1 to 1."""
    count = len(keys.adapters)
    numbered = count <= MOST_NUMBERED
    with _style(name):
        side = min(2.2 + 0.3 * count, 5.6)
        figure = Figure(figsize=(side * 1.12, side))
        axes = figure.subplots()
        text = (lambda value: _minus(f"{round(value, 2) + 0.0:.2f}")) if numbered else None
        mesh = _map(axes, keys.similarity, Normalize(-1, 1), DIVERGING, text, size=7.5)
        axes.set_aspect("equal")
        _label_map(axes, list(keys.adapters), list(keys.adapters), most=20)
        _colour_bar(figure, mesh, axes, "cosine similarity", lambda value: _minus(f"{value:.1f}"))
        return _svg(figure, name)
