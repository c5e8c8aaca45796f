"""The plots of a report as inline SVG: the same bytes for the same numbers, at home on any page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from memtool.evaluation.metrics import seen_accuracy
from memtool.evaluation.summary import RowSummary
from memtool.reports.drawing import (
    COLOURS,
    DIVERGING,
    INK,
    MARKERS,
    MOST_NUMBERED,
    RULE,
    SEQUENTIAL,
    WIDTH,
    coefficient_scale,
    colour_bar,
    heat_map,
    inline_svg,
    label_map,
    legend_name,
    map_height,
    minus,
    short,
    style,
    ticks,
)
from memtool.reports.shown import CoefficientMap, KeyMap, SampleCoefficientMap, require_map
from memtool.reports.table import label, percent


def _steps(tasks: Sequence[str]) -> list[str]:
    """`1 photo`, `2 art`, …; of many tasks the numbers alone."""
    if len(tasks) > MOST_NUMBERED:
        return [str(i) for i in range(1, len(tasks) + 1)]
    return [f"{i} {task}" for i, task in enumerate(tasks, start=1)]


def _shares(values: npt.NDArray[np.float64]) -> Normalize:
    """From the tenth below the least known share to the tenth above the largest."""
    known = values[~np.isnan(values)]
    low = float(np.floor(10 * known.min()) / 10) if known.size else 0.0
    high = float(np.ceil(10 * known.max()) / 10) if known.size else 1.0
    return Normalize(low, max(high, low + 0.1))


def accuracy_map(
    accuracy: npt.NDArray[np.float64], tasks: Sequence[str], name: str = "accuracy"
) -> str:
    """Heat map of an accuracy matrix (T+1, T) in percent; a row 0 without scores is left out."""
    first = 1 if np.isnan(accuracy[0]).all() else 0
    values = accuracy[first:]
    steps = ["before any", *_steps(tasks)][first:]
    with style(name):
        figure = Figure(figsize=(WIDTH, map_height(len(values))))
        axes = figure.subplots()
        numbered = len(tasks) <= MOST_NUMBERED
        mesh = heat_map(axes, values, _shares(values), SEQUENTIAL, percent if numbered else None)
        label_map(axes, steps, list(tasks))
        axes.set_xlabel("accuracy on task")
        axes.set_ylabel("after task")
        colour_bar(figure, mesh, axes, "accuracy (%)", lambda value: f"{100 * value:.0f}")
        return inline_svg(figure, name)


def heldout_map(rows: Sequence[RowSummary], domains: Sequence[str], name: str = "heldout") -> str:
    """Heat map of the accuracy of every method (rows) on every held-out domain, in percent."""
    values = np.stack([row.mean[-1] for row in rows])
    with style(name):
        figure = Figure(figsize=(WIDTH, map_height(len(values))))
        axes = figure.subplots()
        text = percent if len(domains) <= MOST_NUMBERED and len(rows) <= 30 else None
        mesh = heat_map(axes, values, _shares(values), SEQUENTIAL, text)
        label_map(axes, [label(row) for row in rows], list(domains), most=40, length=40)
        axes.set_xlabel("held-out domain")
        colour_bar(figure, mesh, axes, "accuracy (%)", lambda value: f"{100 * value:.0f}")
        return inline_svg(figure, name)


def measured_steps(row: RowSummary) -> int:
    """After how many tasks at least one learned task was measured."""
    return sum(bool((~np.isnan(row.mean[i, :i])).any()) for i in range(1, len(row.mean)))


def task_curves(row: RowSummary, tasks: Sequence[str], name: str = "forgetting") -> str:
    """Accuracy of every task from when it was learned on, a line for each; mean over the seeds."""
    count = len(tasks)
    steps = np.arange(1, count + 1)
    few = count <= len(COLOURS)
    colours = COLOURS if few else colormaps[SEQUENTIAL](np.linspace(0.0, 0.85, count))
    with style(name):
        figure = Figure(figsize=(WIDTH, 3.3))
        axes = figure.subplots()
        for place, task in enumerate(tasks):
            scores = row.mean[1:, place]
            known = (~np.isnan(scores)) & (steps > place)
            axes.plot(
                steps[known],
                scores[known],
                color=colours[place],
                marker=MARKERS[place] if few else "o",
                markersize=4 if count <= 25 else 2,
                linewidth=1.4,
                label=legend_name(task),
            )
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        _step_ticks(axes, tasks)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        axes.set_ylabel("accuracy on each task (%)")
        if count <= MOST_NUMBERED:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.2)
        return inline_svg(figure, name)


def _step_ticks(axes: Any, tasks: Sequence[str]) -> None:
    """The tasks along a horizontal axis of steps 1 to T."""
    positions, names = ticks(_steps(tasks), 30)
    slanted = max(map(len, names)) * len(names) > 72
    axes.set_xticks(
        [position + 0.5 for position in positions],
        names,
        rotation=45 if slanted else 0,
        ha="right" if slanted else "center",
    )
    axes.set_xlabel("after task")


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
    with style(name):
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
            marker = MARKERS[others % len(MARKERS)] if row.kind != "upper bound" else "o"
            others += row.kind != "upper bound"
            axes.plot(
                steps[known],
                mean[known],
                color=colour,
                marker=marker,
                markersize=4 if len(tasks) <= 25 else 2,
                label=legend_name(label(row)),
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
        _step_ticks(axes, tasks)
        if log:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        axes.set_ylabel(what)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.2)
        return inline_svg(figure, name)


def coefficient_map(coefficients: CoefficientMap, name: str = "coefficients") -> str:
    """Heat map of mean coefficients, true task × adapter; the mean over the blocks if several."""
    values = coefficients.mean
    norm, colours = coefficient_scale(coefficients.values)
    numbered = len(coefficients.adapters) <= MOST_NUMBERED
    with style(name):
        figure = Figure(figsize=(WIDTH, map_height(len(values))))
        axes = figure.subplots()
        text = (lambda value: minus(f"{value + 0.0:.2f}")) if numbered else None
        mesh = heat_map(axes, values, norm, colours, text)
        label_map(axes, list(coefficients.tasks), list(coefficients.adapters))
        axes.set_xlabel("adapter")
        axes.set_ylabel("true task")
        colour_bar(figure, mesh, axes, "mean coefficient", lambda value: minus(f"{value:.2g}"))
        return inline_svg(figure, name)


def reuse_map(shares: npt.NDArray[np.float64], tasks: Sequence[str], name: str = "reuse") -> str:
    """Heat map of the gate's weight: inputs of a task (rows) on the atoms of a task (columns)."""
    require_map(shares, (len(tasks), len(tasks)), "a map of shares")
    numbered = len(tasks) <= MOST_NUMBERED
    with style(name):
        figure = Figure(figsize=(WIDTH, map_height(len(tasks))))
        axes = figure.subplots()
        norm = Normalize(0.0, float(shares.max()) or 1.0)
        text = (lambda value: f"{value:.2f}") if numbered else None
        mesh = heat_map(axes, shares, norm, SEQUENTIAL, text)
        label_map(axes, list(tasks), list(tasks))
        axes.set_xlabel("atoms of task")
        axes.set_ylabel("inputs of task")
        colour_bar(figure, mesh, axes, "weight", lambda value: f"{value:.2g}")
        return inline_svg(figure, name)


def sample_map(samples: SampleCoefficientMap, name: str = "samples") -> str:
    """Heat map of the coefficients of single samples, adapter × sample, samples by true domain."""
    norm, colours = coefficient_scale(samples.values)
    groups = samples.groups
    ends = np.cumsum([len(values) for _, values in groups])
    values = np.concatenate([values for _, values in groups]).T
    with style(name):
        figure = Figure(figsize=(WIDTH, map_height(len(values))))
        axes = figure.subplots()
        mesh = heat_map(axes, values, norm, colours, None)
        label_map(axes, list(samples.adapters), [""])
        for end in ends[:-1]:
            axes.axvline(end, color=INK, linewidth=1.0)
        centres = ends - np.diff(ends, prepend=0) / 2
        names = [short(domain) for domain, _ in groups]
        slanted = max(map(len, names)) * len(names) > 64
        axes.set_xticks(
            centres, names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
        )
        axes.set_xlabel("samples by true domain")
        axes.set_ylabel("adapter")
        colour_bar(figure, mesh, axes, "coefficient", lambda value: minus(f"{value:.2g}"))
        return inline_svg(figure, name)


def coefficient_blocks(coefficients: CoefficientMap, name: str = "blocks") -> str:
    """Small heat maps of the mean coefficients, one for every block, on one scale."""
    norm, colours = coefficient_scale(coefficients.values)
    columns = min(4, len(coefficients.blocks))
    lines = -(-len(coefficients.blocks) // columns)
    with style(name):
        figure = Figure(figsize=(WIDTH, 0.5 + 1.55 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False)
        for panel in panels.flat:
            panel.set_visible(False)
        mesh: Any = None
        for panel, block, values in zip(
            panels.flat, coefficients.blocks, coefficients.values, strict=False
        ):
            panel.set_visible(True)
            mesh = heat_map(panel, values, norm, colours, None)
            panel.set_title(f"block {block}", fontsize=8.5)
            panel.set_xticks([])
            panel.set_yticks([])
        figure.supxlabel("adapter", fontsize=8.5)
        figure.supylabel("true task", fontsize=8.5)
        colour_bar(figure, mesh, list(panels.flat), "mean coefficient", lambda v: minus(f"{v:.2g}"))
        return inline_svg(figure, name)


def key_map(keys: KeyMap, name: str = "keys") -> str:
    """Heat map of the cosine similarity of keys, from −1 to 1."""
    count = len(keys.adapters)
    numbered = count <= MOST_NUMBERED
    with style(name):
        side = min(2.2 + 0.3 * count, 5.6)
        figure = Figure(figsize=(side * 1.12, side))
        axes = figure.subplots()
        text = (lambda value: minus(f"{round(value, 2) + 0.0:.2f}")) if numbered else None
        mesh = heat_map(axes, keys.similarity, Normalize(-1, 1), DIVERGING, text, size=7.5)
        axes.set_aspect("equal")
        label_map(axes, list(keys.adapters), list(keys.adapters), most=20)
        colour_bar(figure, mesh, axes, "cosine similarity", lambda value: minus(f"{value:.1f}"))
        return inline_svg(figure, name)
