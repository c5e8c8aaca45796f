"""The figures of a report, each made from records alone; accuracies are on one scale, 0 to 100 %.

Choices that a reader makes on a live figure are parameters of its specification; a figure without
its script shows the first choice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from memtool.evaluation.metrics import seen_accuracy
from memtool.evaluation.paired import Paired, bootstrap, paired
from memtool.evaluation.record import Record
from memtool.evaluation.summary import RowSummary, summarise
from memtool.reports.figure import INK, Figure
from memtool.reports.looks import OWN, scales
from memtool.reports.table import label, main_row, samples_text, task_labels
from memtool_stores.printable import printable

Numbers = npt.NDArray[np.float64]
Measure = Literal["accuracy", "loss"]

MOST_NUMBERED = 12
"""Numbers stand in the cells of a map up to this many columns."""
MOST_METHODS = 12
"""More lines than that hide each other."""
MOST_CLASSES = 30
"""Of more, the pairs that are most often confused are shown."""
MOST_ADAPTERS = 60
"""Of more adapters no two keys are compared."""
LETTERS = 48
PERCENT = [0, 20, 40, 60, 80, 100]
STEP = {"step": 26}
LIGHT = ("#f0f4fa", "#084594")  # of a map of shares: nothing is nearly white, all of it blue
SIGNED = ["#b35806", "#f1a340", "#f7f7f7", "#998ec3", "#542788"]


def recall_map(record: Record) -> Figure | None:
    """True task × recalled adapter: what the product is about; None where nothing was recalled."""
    found = None if record.inside is None else record.inside.recalled
    if found is None:
        return _reuse(record)
    weights = np.array(found.weights)
    layers = [weights, *map(np.array, found.by_block)]
    spread = np.array(found.spread) if found.spread else np.full_like(weights, np.nan)
    tasks, adapters = _names(found.tasks), _names(found.adapters)
    rows = [
        {
            "task": task,
            "adapter": adapter,
            "w": [_number(layer[i, j]) for layer in layers],
            "sd": _number(spread[i, j]),
            "n": found.samples[i],
        }
        for i, task in enumerate(tasks)
        for j, adapter in enumerate(adapters)
    ]
    every = np.stack(layers)
    choices = ["mean of all blocks", *(f"block {block}" for block in found.blocks)]
    params = [_choice("block", choices, "Blocks")] if len(choices) > 1 else []
    least = min(found.samples)
    most = max(found.samples)
    count = f"{least}" if least == most else f"{least} to {most}"
    return _map(
        "recall",
        rows,
        ("adapter", adapters, "recalled adapter"),
        ("task", tasks, "true task"),
        "datum.w[block]" if params else "datum.w[0]",
        (float(every.min()), max(1.0, float(every.max()))),  # 0 to 1 in every report
        found.what,
        ".2f",
        f"What each task recalls: the {found.what} of every adapter (columns) for test samples of "
        f"every true task (rows), n = {count} samples a task; hover for the standard "
        "deviation over them.",
        params=params,
        tooltip=[
            _field("task", "true task"),
            _field("adapter", "adapter"),
            _field("value", found.what, ".3f"),
            _field("sd", "standard deviation over samples", ".3f"),
            _field("n", "samples"),
        ],
    )


def _reuse(record: Record) -> Figure | None:
    """The weight on atoms of each task, of a record from before there was more."""
    use = next((row.atom_use for row in record.metrics.rows if row.atom_use is not None), None)
    if use is None:
        return None
    tasks = _names(record.run.task_names[: len(use.reuse)])
    rows = [
        {"task": task, "adapter": other, "w": [_number(use.reuse[i][j])]}
        for i, task in enumerate(tasks)
        for j, other in enumerate(tasks)
    ]
    return _map(
        "recall",
        rows,
        ("adapter", tasks, "atoms of task"),
        ("task", tasks, "true task"),
        "datum.w[0]",
        (0.0, max(1.0, *map(max, use.reuse))),
        "share of the gate",
        ".2f",
        "What each task recalls: the gate's weight on the atoms of each task (columns) for test "
        "samples of each task (rows), all tasks in the bank.",
        tooltip=[
            _field("task", "true task"),
            _field("adapter", "atoms of"),
            _field("value", "share", ".3f"),
        ],
    )


def methods_figure(
    rows: Sequence[RowSummary], records: Sequence[Record], measure: Measure = "accuracy"
) -> Figure | None:
    """Every method at the end, with its interval; a choice of all tasks, or one."""
    tasks = task_labels(records)
    shown = [row for row in rows if not np.isnan(last_line(records, row, measure)).all()]
    if not shown:
        return None
    names = _labels(shown)
    found = [
        [point(records, row, measure, task) for task in (None, *range(len(tasks)))] for row in shown
    ]
    order = sorted(range(len(shown)), key=lambda i: _sort_key(found[i][0][0], measure))
    scale = 100 if measure == "accuracy" else 1
    values = [
        {
            "method": names[i],
            "kind": _kind(shown[i]),
            "m": [_number(scale * mean) for mean, _, _ in found[i]],
            "lo": [_number(scale * low) for _, low, _ in found[i]],
            "hi": [_number(scale * high) for _, _, high in found[i]],
        }
        for i in order
    ]
    several = len(tasks) > 1
    which = "task" if several else "0"
    x: dict[str, Any] = {"field": "mean", "type": "quantitative", "title": _axis(measure)}
    if measure == "accuracy":
        x |= {"scale": {"domain": [0, 100]}, "axis": {"values": PERCENT}}
    else:
        x |= {"scale": {"zero": True, "nice": True}}
    y = {
        "field": "method",
        "type": "nominal",
        "sort": [names[i] for i in order],
        "title": None,
        "axis": {"grid": True, "labelLimit": 290},
    }
    colour = {"field": "method", "legend": None, "scale": scales(shown, names)["color"]}
    shape = {"field": "method", "legend": None, "scale": scales(shown, names)["shape"]}
    tip = [
        _field("method", "method"),
        _field("kind", "kind"),
        _field("mean", _axis(measure), ".2f"),
        _field("low", "95 % from", ".2f"),
        _field("high", "to", ".2f"),
    ]
    spec = {
        "height": STEP,
        "data": {"values": values},
        "params": [_choice("task", ["all tasks", *_names(tasks)], "Tasks")] if several else [],
        "transform": [
            {"calculate": f"datum.{short}[{which}]", "as": name}
            for short, name in (("m", "mean"), ("lo", "low"), ("hi", "high"))
        ]
        + [{"filter": "isValid(datum.mean)"}],
        "encoding": {"y": y, "color": colour, "tooltip": tip},
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 1.6},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {"x": x, "shape": shape},
            },
        ],
    }
    return Figure(
        "methods",
        f"{'Accuracy' if measure == 'accuracy' else 'Loss'} of every method at the end"
        f"{_with_interval(records, found)}{_n(records)}",
        spec,
        len(shown) * 3,
    )


def curves_figure(
    rows: Sequence[RowSummary], records: Sequence[Record], measure: Measure = "accuracy"
) -> Figure | None:
    """The mean over the tasks seen so far, after each task, a line a method; None without steps."""
    tasks = _names(task_labels(records))
    values, shown = [], []
    for row in rows:
        each = np.stack([seen_accuracy(one) for one in matrices(records, row, measure)])
        if np.isfinite(each).all(axis=0).sum() < 2:
            continue
        shown.append((row, each))
    fewer = f" The first {MOST_METHODS} of {len(shown)}." if len(shown) > MOST_METHODS else ""
    shown = shown[:MOST_METHODS]
    if not shown:
        return None
    kept = [row for row, _ in shown]
    names = _labels(kept)
    scale = 100 if measure == "accuracy" else 1
    for name, (_, each) in reversed(list(zip(names, shown, strict=True))):  # the method on top
        for step in np.flatnonzero(np.isfinite(each).all(axis=0)).tolist():
            mean = float(each[:, step].mean())
            sd = float(each[:, step].std(ddof=1)) if len(each) > 1 else 0.0
            values.append(
                {
                    "method": name,
                    "step": step + 1,
                    "after": f"{step + 1} {tasks[step]}",
                    "mean": _number(scale * mean),
                    "low": _number(scale * (mean - sd)),
                    "high": _number(scale * (mean + sd)),
                }
            )
    band = " Bands: one standard deviation over the seeds." if len(records) > 1 else ""
    what = "accuracy" if measure == "accuracy" else "loss"
    return Figure(
        "curves",
        f"Mean {what} on the tasks seen so far, after each task, of what was measured then; choose "
        "lines by the legend."
        f"{band}{fewer}{_n(records)}",
        _lines(
            values,
            kept,
            names,
            x={
                "field": "step",
                "type": "quantitative",
                "title": "tasks learned",
                "scale": {"nice": False, "padding": 12},
                "axis": {"values": _whole(len(tasks)), "grid": False},
            },
            y={
                "field": "mean",
                "type": "quantitative",
                "title": f"mean {_axis(measure)}",
                **(
                    {"scale": {"domain": [0, 100]}, "axis": {"values": PERCENT}}
                    if measure == "accuracy"
                    else {}
                ),
            },
            tooltip=[
                _field("method", "method"),
                _field("after", "after task"),
                _field("mean", _axis(measure), ".2f"),
            ],
            band=len(records) > 1,
        ),
    )


def recall_error_figure(rows: Sequence[RowSummary]) -> Figure | None:
    """Mean relative error of all recalled adapters, by how many are in memory; None without."""
    known = [row for row in rows if row.recall_error is not None]
    if not known:
        return None
    names = _labels(known)
    values = []
    for name, row in zip(names, known, strict=True):
        each = np.stack([seen_accuracy(one) for one in row.recall_error])  # type: ignore[union-attr]
        for step in np.flatnonzero(np.isfinite(each).all(axis=0)).tolist():
            mean = float(each[:, step].mean())
            if mean > 0:
                values.append({"method": name, "step": step + 1, "mean": _number(mean)})
    if not values:
        return None
    return Figure(
        "recall-error",
        "Mean relative error of all recalled adapters, |recalled − stored| / |stored|, by the "
        "number of tasks in memory.",
        _lines(
            values,
            known,
            names,
            x={
                "field": "step",
                "type": "quantitative",
                "title": "tasks in memory",
                "scale": {"nice": False, "padding": 12},
                "axis": {"values": _whole(known[0].accuracy.shape[-1]), "grid": False},
            },
            y={
                "field": "mean",
                "type": "quantitative",
                "title": "relative recall error",
                "scale": {"type": "log"},
                "axis": {"format": ".0e", "tickCount": 5},
            },
            tooltip=[
                _field("method", "method"),
                _field("step", "tasks in memory"),
                _field("mean", "error", ".3g"),
            ],
        ),
    )


def matrix_figure(
    rows: Sequence[RowSummary], records: Sequence[Record], measure: Measure = "accuracy"
) -> Figure | None:
    """Every task after every task, for a method of choice; None where only the end was measured."""
    tasks = _names(task_labels(records))
    shown = [
        (row, matrices(records, row, measure).mean(axis=0))
        for row in rows
        if _steps(matrices(records, row, measure).mean(axis=0)) > 1
    ][:MOST_METHODS]
    if not shown or len(tasks) < 2:
        return None
    scale = 100 if measure == "accuracy" else 1
    stack = scale * np.stack([one for _, one in shown])
    first = 1 if np.isnan(stack[:, 0]).all() else 0
    steps = ["before any", *(f"{i} {task}" for i, task in enumerate(tasks, start=1))]
    values = [
        {
            "after": steps[i],
            "task": tasks[j],
            "w": [_number(x) for x in stack[:, i, j]],
            "learned": "yes" if j < i else "not yet",
        }
        for i in range(first, len(steps))
        for j in range(len(tasks))
    ]
    params = [_choice("method", _labels([row for row, _ in shown]), "Method")]
    known = stack[np.isfinite(stack)]
    extent = (0.0, 100.0) if measure == "accuracy" else (float(known.min()), float(known.max()))
    return _map(
        "matrix",
        values,
        ("task", tasks, f"{_axis(measure)} on task"),
        ("after", steps[first:], "after task"),
        "datum.w[method]",
        extent,
        _axis(measure),
        ".1f" if measure == "accuracy" else ".2f",
        f"{'Accuracy' if measure == 'accuracy' else 'Loss'} on every task (columns) after each "
        f"task (rows), for the method of choice. Blank cells were not measured.{_n(records)}",
        params=params,
        tooltip=[
            _field("task", "on task"),
            _field("after", "after task"),
            _field("learned", "learned"),
            _field("value", _axis(measure), ".2f"),
        ],
    )


def forgetting_figure(
    rows: Sequence[RowSummary], records: Sequence[Record], measure: Measure = "accuracy"
) -> Figure | None:
    """Every task when it was learned and at the end, for a method of choice."""
    tasks = _names(task_labels(records))
    if len(tasks) < 2:
        return None
    scale = 100 if measure == "accuracy" else 1
    found, shown = [], []
    for row in rows:
        mean = scale * matrices(records, row, measure).mean(axis=0)
        then = np.array([mean[j + 1, j] for j in range(len(tasks))])
        now = _last(mean)
        if np.isfinite(then[:-1]).any() and np.isfinite(now).any():
            found.append((then, now))
            shown.append(row)
    found, shown = found[:MOST_METHODS], shown[:MOST_METHODS]
    if not shown:
        return None
    values = [
        {
            "task": f"{j + 1} {task}",
            "a": [_number(then[j]) for then, _ in found],
            "b": [_number(now[j]) for _, now in found],
        }
        for j, task in enumerate(tasks)
    ]
    x: dict[str, Any] = {
        "field": "then",
        "type": "quantitative",
        "title": _axis(measure),
    }
    if measure == "accuracy":
        x |= {"scale": {"domain": [0, 100]}, "axis": {"values": PERCENT}}
    spec = {
        "height": STEP,
        "data": {"values": values},
        "params": [_choice("method", _labels(shown), "Method")],
        "transform": [
            {"calculate": "datum.a[method]", "as": "then"},
            {"calculate": "datum.b[method]", "as": "now"},
            {"calculate": "datum.now - datum.then", "as": "change"},
            {"filter": "isValid(datum.then) && isValid(datum.now)"},
        ],
        "encoding": {
            "y": {
                "field": "task",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"grid": True},
            },
            "tooltip": [
                _field("task", "task"),
                _field("then", "when learned", ".2f"),
                _field("now", "at the end", ".2f"),
                _field("change", "change", "+.2f"),
            ],
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2, "stroke": "#d55e00", "opacity": 0.7},
                "encoding": {"x": x, "x2": {"field": "now"}},
            },
            {
                "mark": {
                    "type": "point",
                    "filled": False,
                    "size": 80,
                    "stroke": OWN,
                    "strokeWidth": 1.6,
                },
                "encoding": {"x": x},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "fill": OWN, "opacity": 1},
                "encoding": {"x": {**x, "field": "now"}},
            },
        ],
    }
    return Figure(
        "forgetting",
        "What was forgotten: every task just after it was learned (○) and after the last one (●), "
        f"for the method of choice.{_n(records)}",
        spec,
        3 * len(tasks),
    )


def paired_figure(rows: Sequence[RowSummary], records: Sequence[Record]) -> Figure | None:
    """The method less every other row on the same test samples, with intervals; None without."""
    own = main_row(rows)
    others = [
        (row, one) for row in rows if row is not own and (one := paired(records, own.id, row.id))
    ]
    if not others:
        return None
    names = _labels([row for row, _ in others])
    values = [
        {
            "method": name,
            "mean": _number(100 * one.difference),
            "low": _number(100 * one.low),
            "high": _number(100 * one.high),
            "holds": _verdict(one),
            "p": "below 0.001" if one.p < 0.001 else f"{one.p:.2g}",
        }
        for name, (_, one) in zip(names, others, strict=True)
    ]
    x = {"type": "quantitative", "title": "difference (points)", "axis": {"tickCount": 8}}
    spec = {
        "height": STEP,
        "data": {"values": values},
        "encoding": {
            "y": {
                "field": "method",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"grid": True, "labelLimit": 290},
            },
            "color": {
                "field": "holds",
                "title": None,
                "scale": {
                    "domain": ["better", "worse", "not told apart"],
                    "range": [OWN, "#d55e00", "#8a8d94"],
                },
            },
            "tooltip": [
                _field("method", "against"),
                _field("mean", "difference", "+.2f"),
                _field("low", "95 % from", "+.2f"),
                _field("high", "to", "+.2f"),
                _field("p", "p"),
            ],
        },
        "layer": [
            {
                "data": {"values": [{"zero": 0}]},
                "mark": {"type": "rule", "strokeWidth": 1, "stroke": INK},
                "encoding": {
                    "x": {"field": "zero", **x},
                    "y": None,
                    "color": None,
                    "tooltip": None,
                },
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1.8},
                "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {"x": {"field": "mean", **x}},
            },
        ],
    }
    count = others[0][1].samples
    return Figure(
        "paired",
        f"{label(own)} less every other row on the same test samples, n = {count:,}: right of 0 "
        f"{label(own)} is better. Bars: paired bootstrap interval of 95 %; colour where McNemar's "
        "exact test agrees.",
        spec,
        3 * len(values),
    )


def confusion_figure(rows: Sequence[RowSummary], records: Sequence[Record]) -> Figure | None:
    """What every class is taken for, for a method of choice; of many classes the worst pairs."""
    found = [(row, table) for row in rows if (table := confusion(records, row)) is not None][:8]
    if not found:
        return None
    names = _labels([row for row, _ in found])
    classes = _names(records[0].run.class_order)
    stack = np.stack([table for _, table in found])
    seen = np.flatnonzero(stack.sum(axis=(0, 1)) + stack.sum(axis=(0, 2))).tolist()
    params = [_choice("method", names, "Method")]
    totals = np.maximum(stack.sum(axis=2, keepdims=True), 1)
    shares = 100 * stack / totals
    count = int(stack[0].sum())
    if len(seen) <= MOST_CLASSES:
        values = [
            {
                "true": classes[i],
                "said": classes[j],
                "w": [_number(x) for x in shares[:, i, j]],
                "c": stack[:, i, j].tolist(),
            }
            for i in seen
            for j in seen
        ]
        ordered = [classes[i] for i in seen]
        return _map(
            "confusion",
            values,
            ("said", ordered, "taken for"),
            ("true", ordered, "class"),
            "datum.w[method]",
            (0.0, 100.0),
            "share of the class (%)",
            ".0f",
            f"What every class (rows) is taken for (columns), in % of the class, all tasks "
            f"together; n = {count:,} test samples. Cells below half a per cent have no number.",
            params=params,
            calculate={"count": "datum.c[method]"},
            least_text=0.5,
            tooltip=[
                _field("true", "class"),
                _field("said", "taken for"),
                _field("value", "% of the class", ".1f"),
                _field("count", "samples"),
            ],
        )
    pairs = {(int(i), int(j)) for table in stack for i, j in _worst(table, 20)}
    values = [
        {
            "pair": f"{classes[i]} → {classes[j]}",
            "c": stack[:, i, j].tolist(),
            "w": [_number(x) for x in shares[:, i, j]],
        }
        for i, j in sorted(pairs)
    ]
    spec = {
        "height": {"step": 20},
        "data": {"values": values},
        "params": params,
        "transform": [
            {"calculate": "datum.c[method]", "as": "count"},
            {"calculate": "datum.w[method]", "as": "share"},
            {
                "window": [{"op": "row_number", "as": "rank"}],
                "sort": [{"field": "count", "order": "descending"}],
            },
            {"filter": "datum.rank <= 20 && datum.count > 0"},
        ],
        "mark": {"type": "bar", "fill": OWN},
        "encoding": {
            "y": {"field": "pair", "type": "nominal", "sort": "-x", "title": None},
            "x": {
                "field": "count",
                "type": "quantitative",
                "title": "test samples",
                "axis": {"tickMinStep": 1},
            },
            "tooltip": [
                _field("pair", "class → taken for"),
                _field("count", "samples"),
                _field("share", "% of the class", ".1f"),
            ],
        },
    }
    return Figure(
        "confusion",
        f"The pairs of classes that are most often confused, of {len(seen)} classes; n = {count:,} "
        "test samples.",
        spec,
        20,
    )


def classes_figure(rows: Sequence[RowSummary], records: Sequence[Record]) -> Figure | None:
    """Accuracy on every class: the method with its interval, and others by the legend."""
    found = [(row, table) for row in rows if (table := confusion(records, row)) is not None][:6]
    if not found:
        return None
    classes, names = _names(records[0].run.class_order), _labels([row for row, _ in found])
    own = found[0][1]
    known = [i for i in range(len(classes)) if own[i].sum()]
    known.sort(key=lambda i: own[i, i] / own[i].sum())
    worst = known[: 2 * MOST_CLASSES]
    values = []
    for name, (_, table) in zip(names, found, strict=True):
        for i in worst:
            count = int(table[i].sum())
            if not count:
                continue
            low, high = wilson(int(table[i, i]), count)
            values.append(
                {
                    "class": classes[i],
                    "method": name,
                    "mean": _number(100 * table[i, i] / count),
                    "low": _number(100 * low),
                    "high": _number(100 * high),
                    "n": count,
                }
            )
    shown = [row for row, _ in found]
    scale = scales(shown, names)
    x = {
        "field": "mean",
        "type": "quantitative",
        "title": "accuracy (%)",
        "scale": {"domain": [0, 100]},
        "axis": {"values": PERCENT},
    }
    opacity = {"condition": {"param": "lines", "value": 1, "empty": True}, "value": 0.08}
    spec = {
        "height": {"step": 20},
        "data": {"values": values},
        "encoding": {
            "y": {
                "field": "class",
                "type": "nominal",
                "sort": [classes[i] for i in worst],
                "title": None,
                "axis": {"grid": True},
            },
            "color": {"field": "method", "title": None, "scale": scale["color"]},
            "opacity": opacity,
            "tooltip": [
                _field("class", "class"),
                _field("method", "method"),
                _field("mean", "accuracy (%)", ".1f"),
                _field("low", "95 % from", ".1f"),
                _field("high", "to", ".1f"),
                _field("n", "samples"),
            ],
        },
        "layer": [
            {
                "transform": [{"filter": f"datum.method == {_quoted(names[0])}"}],
                "mark": {"type": "rule", "strokeWidth": 1.4},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "params": [_by_legend(names[0])],
                "mark": {"type": "point", "filled": True, "size": 60},
                "encoding": {
                    "x": x,
                    "shape": {"field": "method", "title": None, "scale": scale["shape"]},
                },
            },
        ],
    }
    counts = [int(own[i].sum()) for i in worst]
    some = f" The {len(worst)} hardest of {len(known)}." if len(worst) < len(known) else ""
    return Figure(
        "classes",
        f"Accuracy on every class, hardest first, n = {min(counts):,} to {max(counts):,} test "
        f"samples a class; bars: Wilson interval of 95 % of {names[0]}.{some}",
        spec,
        len(values) + len(worst),
    )


def learning_figure(record: Record) -> Figure | None:
    """How adapters and keys learned, epoch by epoch; None where the record does not hold it."""
    known = () if record.inside is None else [one for one in record.inside.curves if one.loss]
    if not known or max(len(one.loss) for one in known) < 2:
        return None
    kinds = list(dict.fromkeys(one.of for one in known))
    values = [
        {"of": one.of, "name": printable(one.name)[:LETTERS], "epoch": epoch, "loss": _number(loss)}
        for one in known
        for epoch, loss in enumerate(one.loss, start=1)
    ]
    names = list(dict.fromkeys(one["name"] for one in values))
    what = {"adapters": "training of adapters", "keys": "learning of keys"}
    params: list[dict[str, Any]] = []
    if len(kinds) > 1:
        params.append(
            {
                "name": "which",
                "value": kinds[0],
                "bind": {
                    "input": "select",
                    "name": "What ",
                    "options": kinds,
                    "labels": [what[k] for k in kinds],
                },
            }
        )
    spec = {
        "height": 260,
        "data": {"values": values},
        "params": params,
        "transform": [{"filter": "datum.of == which"}] if params else [],
        "layer": [
            {
                "params": [_by_legend(None, "name")],
                "mark": {"type": "line", "point": True, "strokeWidth": 1.6},
            }
        ],
        "encoding": {
            "x": {
                "field": "epoch",
                "type": "quantitative",
                "title": "epoch",
                "axis": {"values": _whole(max(len(one.loss) for one in known)), "grid": False},
                "scale": {"nice": False, "padding": 12},
            },
            "y": {
                "field": "loss",
                "type": "quantitative",
                "title": "mean training loss",
                "scale": {"zero": True},
            },
            "color": {
                "field": "name",
                "title": None,
                "sort": None,
                "scale": {"domain": names, "scheme": "viridis"},
                "legend": {"symbolLimit": 24},
            },
            "opacity": {"condition": {"param": "lines", "value": 1}, "value": 0.12},
            "tooltip": [
                _field("name", "of"),
                _field("epoch", "epoch"),
                _field("loss", "loss", ".4f"),
            ],
        },
    }
    return Figure(
        "learning",
        f"How {' and '.join(kinds)} learned: mean training loss of every epoch, a line each, from "
        "the first (dark) to the last (light).",
        spec,
        len(values),
    )


def keys_figure(record: Record) -> Figure | None:
    """How alike the keys of adapters are; None where the record does not hold it."""
    keys = None if record.inside is None else record.inside.keys
    if keys is None or not 1 < len(keys.adapters) <= MOST_ADAPTERS:
        return None
    names = _names(keys.adapters)
    values = [
        {"one": one, "other": other, "w": [_number(keys.cosine[i][j])]}
        for i, one in enumerate(names)
        for j, other in enumerate(names)
    ]
    return _map(
        "keys",
        values,
        ("other", names, "key of adapter"),
        ("one", names, "key of adapter"),
        "datum.w[0]",
        (-1.0, 1.0),
        "cosine",
        ".2f",
        "How alike keys are: cosine similarity of the keys of every two adapters, mean over the "
        "blocks.",
        tooltip=[
            _field("one", "adapter"),
            _field("other", "and"),
            _field("value", "cosine", ".3f"),
        ],
    )


def runs_figure(groups: Sequence[tuple[str, Sequence[Record], RowSummary]]) -> Figure:
    """Several runs side by side: the method of each at the end, with its interval."""
    measure: Measure = "accuracy"
    if all(np.isnan(last_line(records, row, measure)).all() for _, records, row in groups):
        measure = "loss"
    scale = 100 if measure == "accuracy" else 1
    values = []
    for name, records, row in groups:
        mean, low, high = point(records, row, measure, None)
        if not math.isnan(mean):
            values.append(
                {
                    "run": name,
                    "method": label(row),
                    "mean": _number(scale * mean),
                    "low": _number(scale * low),
                    "high": _number(scale * high),
                    "seeds": len(records),
                }
            )
    x: dict[str, Any] = {"type": "quantitative", "title": f"{_axis(measure)} at the end"}
    if measure == "accuracy":
        x |= {"scale": {"domain": [0, 100]}, "axis": {"values": PERCENT}}
    spec = {
        "height": STEP,
        "data": {"values": values},
        "encoding": {
            "y": {
                "field": "run",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"grid": True, "labelLimit": 290},
            },
            "tooltip": [
                _field("run", "run"),
                _field("mean", _axis(measure), ".2f"),
                _field("low", "95 % from", ".2f"),
                _field("high", "to", ".2f"),
                _field("seeds", "seeds"),
            ],
        },
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 1.8, "stroke": OWN},
                "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "fill": OWN, "opacity": 1},
                "encoding": {"x": {"field": "mean", **x}},
            },
        ],
    }
    return Figure(
        "runs",
        "The runs side by side, each by its method at the end: 95 % intervals over test samples of "
        "one seed, or over the seeds of several.",
        spec,
        3 * len(values),
    )


# What figures and tables measure ----------------------------------------------------------------


def matrices(records: Sequence[Record], row: RowSummary, measure: Measure) -> Numbers:
    """A row's matrix of every seed (seeds, T+1, T), NaN where not measured."""
    if measure == "accuracy":
        return row.accuracy
    empty = np.full(row.accuracy.shape[1:], np.nan)
    found = [record.row(row.id).loss for record in records]
    return np.stack([np.array(one, dtype=np.float64) if one else empty for one in found])


def last_line(records: Sequence[Record], row: RowSummary, measure: Measure) -> Numbers:
    """The last line that was measured, by seed: (seeds, T)."""
    return np.stack([_last(one) for one in matrices(records, row, measure)])


def point(
    records: Sequence[Record], row: RowSummary, measure: Measure, task: int | None
) -> tuple[float, float, float]:
    """Mean at the end over all tasks, or on one, and its 95 % interval; NaN where not known.

    Of several seeds Student's t over them; of one the bootstrap over its test samples, or Wilson's
    where there is one task.
    """
    last = last_line(records, row, measure)
    each = last[:, task] if task is not None else _mean_of_measured(last)
    if np.isnan(each).any():
        return (math.nan,) * 3
    summary = summarise(each.tolist())
    top = 1.0 if measure == "accuracy" else math.inf
    if (bounds := summary.interval(0.0, top)) is not None:
        return summary.mean, *bounds
    if measure == "loss":
        return summary.mean, math.nan, math.nan
    right = records[0].row(row.id).right
    some = right if task is None else right[task : task + 1]
    flags = [one.flags.astype(np.float64) for one in some if one is not None]
    if not flags or len(flags) < len(some) or (task is None and np.isnan(last).any()):
        return summary.mean, math.nan, math.nan
    if len(flags) == 1:
        return summary.mean, *wilson(int(flags[0].sum()), len(flags[0]))
    return summary.mean, *bootstrap(flags)


def confusion(records: Sequence[Record], row: RowSummary) -> npt.NDArray[np.int64] | None:
    """How often every class (rows) was taken for which, over all seeds; None where not known."""
    found = [record.row(row.id).confused for record in records]
    classes = len(records[0].run.class_order)
    same = all(record.run.class_order == records[0].run.class_order for record in records)
    if not same or not all(found):
        return None
    if max(max(own, said) for one in found for own, said, _ in one) >= classes:
        return None
    table = np.zeros((classes, classes), dtype=np.int64)
    for one in found:
        for own, said, count in one:
            table[own, said] += count
    return table


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a share."""
    z = 1.959964
    share, under = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / under
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / under
    low = 0.0 if right == 0 else middle - half
    return low, 1.0 if right == count else middle + half


def _last(matrix: Numbers) -> Numbers:
    known = np.flatnonzero(~np.isnan(matrix).all(axis=1))
    return matrix[known[-1]] if len(known) else np.full(matrix.shape[1], np.nan)


def _mean_of_measured(last: Numbers) -> Numbers:
    known = ~np.isnan(last)
    return np.where(
        known.any(axis=1), np.nansum(last, axis=1) / np.maximum(known.sum(axis=1), 1), np.nan
    )


def _steps(matrix: Numbers) -> int:
    """After how many tasks a learned task was measured."""
    return sum(bool(np.isfinite(matrix[i, :i]).any()) for i in range(1, len(matrix)))


def _worst(table: npt.NDArray[np.int64], count: int) -> list[tuple[int, int]]:
    wrong = table.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    return [
        (int(i), int(j))
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]


# Parts of specifications ------------------------------------------------------------------------


def _map(
    name: str,
    values: list[dict[str, Any]],
    across: tuple[str, Sequence[str], str],
    down: tuple[str, Sequence[str], str],
    value: str,
    extent: tuple[float, float],
    what: str,
    text: str,
    caption: str,
    *,
    tooltip: list[dict[str, Any]],
    params: list[dict[str, Any]] | None = None,
    calculate: dict[str, str] | None = None,
    least_text: float = -math.inf,
) -> Figure:
    """A map of cells: `across` and `down` are (field, names in order, title)."""
    low, high = extent
    if low < 0:
        most = max(abs(low), abs(high)) or 1.0
        scale: dict[str, Any] = {"domain": [-most, -most / 2, 0, most / 2, most], "range": SIGNED}
        dark = f"abs(datum.value) > {0.62 * most}"
    else:
        most = high or 1.0
        scale = {"domain": [0.0, most], "range": list(LIGHT)}
        dark = f"datum.value > {0.5 * most}"
    (x, x_names, x_title), (y, y_names, y_title) = across, down
    slanted = max(map(len, x_names)) * len(x_names) > 60
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "rect"},
            "encoding": {
                "color": {
                    "field": "value",
                    "type": "quantitative",
                    "title": what,
                    "scale": scale,
                    "legend": {"gradientLength": 180, "tickCount": 5, "columns": 1},
                },
                "tooltip": tooltip,
            },
        }
    ]
    if len(x_names) <= MOST_NUMBERED:
        shown = [] if least_text == -math.inf else [{"filter": f"datum.value >= {least_text}"}]
        layers.append(
            {
                "transform": shown,
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {
                    "text": {"field": "value", "type": "quantitative", "format": text},
                    "color": {"condition": {"test": dark, "value": "#ffffff"}, "value": "#1c1d20"},
                },
            }
        )
    more = [{"calculate": how, "as": field} for field, how in (calculate or {}).items()]
    step = 26 if len(y_names) <= 30 else max(4, 780 // len(y_names))
    spec = {
        "height": {"step": step},
        "data": {"values": values},
        "params": params or [],
        "transform": [
            {"calculate": value, "as": "value"},
            *more,
            {"filter": "isValid(datum.value)"},
        ],
        "encoding": {
            "x": {
                "field": x,
                "type": "nominal",
                "sort": list(x_names),
                "title": x_title,
                "scale": {"domain": list(x_names)},
                "axis": {
                    "labelAngle": -40 if slanted else 0,
                    "labelLimit": 130,
                    "labelOverlap": True,
                },
            },
            "y": {
                "field": y,
                "type": "nominal",
                "sort": list(y_names),
                "title": y_title,
                "scale": {"domain": list(y_names)},
                "axis": {"labelLimit": 150, "labelOverlap": True},
            },
        },
        "layer": layers,
    }
    return Figure(name, caption, spec, len(values) * len(layers))


def _lines(
    values: list[dict[str, Any]],
    rows: Sequence[RowSummary],
    names: Sequence[str],
    *,
    x: dict[str, Any],
    y: dict[str, Any],
    tooltip: list[dict[str, Any]],
    band: bool = False,
) -> dict[str, Any]:
    scale = scales(rows, names)
    opacity = {"condition": {"param": "lines", "value": 1}, "value": 0.08}
    bands: list[dict[str, Any]] = [
        {
            "mark": {"type": "area", "tooltip": None},
            "encoding": {
                "y": {**y, "field": "low"},
                "y2": {"field": "high"},
                "opacity": {"condition": {"param": "lines", "value": 0.13}, "value": 0.01},
                "tooltip": None,
            },
        }
    ]
    return {
        "height": 300,
        "data": {"values": values},
        "encoding": {
            "x": x,
            "color": {"field": "method", "title": None, "scale": scale["color"]},
            "tooltip": tooltip,
        },
        "layer": [
            *(bands if band else []),
            {
                "mark": {"type": "line"},
                "encoding": {
                    "y": y,
                    "strokeWidth": {
                        "condition": {"test": f"datum.method == {_quoted(names[0])}", "value": 3},
                        "value": 1.5,
                    },
                    "opacity": opacity,
                    "strokeDash": {
                        "field": "method",
                        "title": None,
                        "scale": scale["strokeDash"],
                    },
                },
            },
            {
                "params": [_by_legend(None)],
                "mark": {"type": "point", "filled": True, "size": 55},
                "encoding": {
                    "y": y,
                    "opacity": opacity,
                    "shape": {"field": "method", "title": None, "scale": scale["shape"]},
                },
            },
        ],
    }


def _by_legend(first: str | None, field: str = "method") -> dict[str, Any]:
    """Lines are chosen by the legend, several with Shift; at first all, or the one named."""
    param: dict[str, Any] = {
        "name": "lines",
        "select": {"type": "point", "fields": [field], "toggle": "true"},
        "bind": "legend",
    }
    if first is not None:
        param["value"] = [{field: first}]
    return param


def _choice(name: str, options: Sequence[str], title: str) -> dict[str, Any]:
    """A list to choose from; the parameter is the number of what is chosen."""
    numbers = list(range(len(options)))
    bind = {"input": "select", "name": f"{title} ", "options": numbers, "labels": list(options)}
    return {"name": name, "value": 0, "bind": bind}


def _field(name: str, title: str, format: str | None = None) -> dict[str, Any]:
    found = {"field": name, "title": title}
    return found | ({"type": "quantitative", "format": format} if format else {"type": "nominal"})


def _whole(count: int) -> list[int]:
    """The ticks of an axis of 1 to `count`: all, or every k-th."""
    return list(range(1, count + 1, -(-count // 12)))


def _labels(rows: Sequence[RowSummary]) -> list[str]:
    return _names([label(row) for row in rows])


def _names(names: Sequence[str]) -> list[str]:
    """Names as they can be drawn, no two alike."""
    found: list[str] = []
    for name in names:
        shown = printable(name[: LETTERS + 1])
        shown = shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…"
        other, number = shown, 2
        while other in found:
            other, number = f"{shown} ({number})", number + 1
        found.append(other or " ")
    return found


def _quoted(text: str) -> str:
    return json.dumps(text)


def _number(value: float | np.floating[Any]) -> float | None:
    """Five digits; None of what is no number, which JSON cannot hold."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _axis(measure: Measure) -> str:
    return "accuracy (%)" if measure == "accuracy" else "loss (nats per answer token)"


def _kind(row: RowSummary) -> str:
    if row.replay:
        return f"{row.kind}, keeps samples of earlier tasks"
    if row.reading:
        return "another reading of the memory"
    return "reference" if row.kind == "upper bound" and not row.is_bound else row.kind


def _verdict(one: Paired) -> str:
    if one.holds:
        return "better"
    return "worse" if one.high < 0 and one.p < 0.05 else "not told apart"


def _sort_key(value: float, measure: Measure) -> float:
    if math.isnan(value):
        return math.inf
    return -value if measure == "accuracy" else value


def _n(records: Sequence[Record]) -> str:
    counts = samples_text(records)
    return f" {counts}." if counts else ""


def _with_interval(
    records: Sequence[Record], found: Sequence[Sequence[tuple[float, float, float]]]
) -> str:
    if all(math.isnan(each[0][1]) for each in found):
        return "."
    if len(records) > 1:
        return f"; bars: 95 % t-interval over {len(records)} runs."
    return (
        "; bars: 95 % interval over the test samples of one seed, bootstrap or, of a task, Wilson."
    )
