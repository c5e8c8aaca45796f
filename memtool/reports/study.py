"""A study as a table, as figures with error bars, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memtool.atomic import write_atomic
from memtool.evaluation.study import Measure, Point, StudyRecord
from memtool.reports.figure import Figure
from memtool.reports.html import Captioned, Section, flatten, live, page
from memtool.reports.looks import COLOURS, DASHES, OWN, SHAPES
from memtool.reports.table import MISSING, Grid
from memtool_stores.printable import printable

UNITS = {
    "share": "%",
    "points": "points",
    "ms": "ms",
    "bytes": "MB",
    "degrees": "degrees",
    "ratio": "",
    "s": "s",
}
_SCALE = {"share": 100.0, "points": 100.0, "bytes": 1e-6}
_LIMITS = {"points": (-100.0, 100.0), "share": (0.0, 100.0), "degrees": (0.0, 180.0)}


def study_grid(record: StudyRecord) -> Grid:
    """A line for every point: the mean of every measure, and its spread over the seeds."""
    measures = record.measured
    groups = any(point.group for point in record.points)
    rows = [
        (
            *([point.label, point.group] if groups else [point.label]),
            *(_cell(point, measure) for measure in measures),
        )
        for point in record.points
    ]
    failures = tuple(
        f"{point.group or point.label}, seed {seed}: {text}"
        for point in record.points
        for seed, text in point.failed.items()
    )
    spread = ": mean ± standard deviation" if len(record.seeds) > 1 else ""
    seeds = f"{len(record.seeds)} seed{'s' if len(record.seeds) > 1 else ''}"
    return Grid(
        title=f"study {record.study}, {seeds}{spread}",
        header=(record.axis, *(["memory"] if groups else []), *map(_title, measures)),
        rows=tuple(rows),
        notes=tuple(dict.fromkeys(failures)),
    ).printable


def study_figures(record: StudyRecord) -> list[Figure]:
    """A figure for every measure: means as lines, 95 % intervals, and the seeds as small points."""
    return [_figure(record, measure) for measure in record.measured]


def write_study_page(record: StudyRecord, path: Path) -> Path:
    """Write the page: figures, live where its script runs, and the table. The same bytes for the
    same record. MemtoolError when the file cannot be written.
    """
    grid = study_grid(record)
    about = " · ".join(
        (
            str(record.configuration.get("method", "")),
            f"{len(record.tasks)} tasks",
            f"seed{'s' if len(record.seeds) > 1 else ''} {', '.join(map(str, record.seeds))}",
        )
    )
    sections = [
        Section("In numbers", tables=[Captioned(grid, f"{grid.title}.")]),
        Section("In pictures", figures=[live(one) for one in study_figures(record)]),
    ]
    return write_atomic(
        path,
        page(
            f"Study: {record.study}",
            sections,
            about=about,
            summary=record.question,
            command=record.command,
            facts=[("tasks", ", ".join(record.tasks))]
            + [(one.label, one.about) for one in record.measured],
            configuration=flatten(record.configuration),
            version=record.environment.packages.get("memtool", ""),
        ),
    )


def _cell(point: Point, measure: Measure) -> str:
    found = point.summary(measure.id)
    if found is None:
        return MISSING
    scale = _SCALE.get(measure.unit, 1.0)
    digits = 3 if measure.unit == "ratio" else 1
    text = f"{scale * found.mean:.{digits}f}"
    return text if found.std is None else f"{text} ± {scale * found.std:.{digits}f}"


def _title(measure: Measure) -> str:
    arrow = {"higher": " ↑", "lower": " ↓", "neither": ""}[measure.better]
    unit = UNITS[measure.unit]
    return f"{measure.label}{f' ({unit})' if unit else ''}{arrow}"


def _figure(record: StudyRecord, measure: Measure) -> Figure:
    groups = list(dict.fromkeys(point.group for point in record.points))
    means, seeds = _drawn(record, measure, groups)
    bars = ""
    if len(record.seeds) > 1:
        bars = f" Bars: 95 % t-interval over {len(record.seeds)} seeds; small points: the seeds."
    name = f"{record.study}-{measure.id.replace('_', '-')}"
    caption = f"{measure.label[0].upper()}{measure.label[1:]}: {measure.about}{bars}"
    names = [group or record.study for group in groups]
    spec = {
        "height": 240,
        "data": {"values": means},
        "encoding": {
            "x": _axis(record, list(dict.fromkeys(printable(p.label) for p in record.points))),
            "color": _of_memories(names, (OWN, *COLOURS)),
        },
        "layer": _layers(record, measure, names, seeds),
    }
    return Figure(name, caption, spec, len(means) + len(seeds))


def _drawn(
    record: StudyRecord, measure: Measure, groups: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a plot is of: the mean of every point with its interval, and every seed."""
    scale = _SCALE.get(measure.unit, 1.0)
    least, most = _LIMITS.get(measure.unit, (0.0, float("inf")))
    means: list[dict[str, Any]] = []
    seeds: list[dict[str, Any]] = []
    for point in record.points:
        found = point.summary(measure.id)
        if found is None:
            continue
        aside = 0.06 * (groups.index(point.group) - (len(groups) - 1) / 2)  # bars stand apart
        x_at = None if point.x is None else point.x + aside
        place = {"at": printable(point.label), "x": x_at, "memory": point.group or record.study}
        bounds = found.interval(least / scale, most / scale)
        low, high = bounds if bounds is not None else (None, None)
        means.append(
            place
            | {
                "mean": scale * found.mean,
                "low": None if low is None else scale * low,
                "high": None if high is None else scale * high,
                "seeds": found.n,
            }
        )
        seeds += [
            place | {"seed": seed, "value": scale * value}
            for seed, value in point.values[measure.id].items()
        ]
    return means, seeds


def _of_memories(names: Sequence[str], looks: Sequence[Any]) -> dict[str, Any]:
    """A channel that tells the memories apart, with a legend where there are several."""
    return {
        "field": "memory",
        "title": None,
        "scale": {"domain": [*names], "range": _some(looks, len(names))},
        "legend": {} if len(names) > 1 else None,
    }


def _layers(
    record: StudyRecord, measure: Measure, names: Sequence[str], seeds: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A line through the means, their intervals, every seed, and the means themselves."""
    unit = UNITS[measure.unit]
    y = {
        "type": "quantitative",
        "title": f"{measure.label}{f' ({unit})' if unit else ''}",
        "scale": {
            "zero": measure.unit in ("bytes", "s", "ms", "ratio"),
            "nice": True,
            "padding": 8,
        },
    }
    of_point = [
        {"field": "memory", "title": "of", "type": "nominal"},
        {"field": "at", "title": record.axis, "type": "nominal"},
        {"field": "mean", "title": measure.label, "type": "quantitative", "format": ".4~g"},
        {"field": "low", "title": "95 % from", "type": "quantitative", "format": ".4~g"},
        {"field": "high", "title": "to", "type": "quantitative", "format": ".4~g"},
        {"field": "seeds", "title": "seeds", "type": "nominal"},
    ]
    of_seed = [
        {"field": "memory", "title": "of", "type": "nominal"},
        {"field": "seed", "title": "seed", "type": "nominal"},
        {"field": "value", "type": "quantitative", "format": ".4~g"},
    ]
    return [
        {
            "transform": [{"filter": "isValid(datum.x)"}],
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {
                "y": {**y, "field": "mean"},
                "strokeDash": _of_memories(names, [list(one) for one in DASHES]),
            },
        },
        {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "errorbar", "ticks": {"size": 8}, "thickness": 1.6},
            "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "data": {"values": seeds},
            "mark": {"type": "point", "size": 18, "filled": False, "opacity": 0.6},
            "encoding": {"y": {**y, "field": "value"}, "tooltip": of_seed},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
            "encoding": {
                "y": {**y, "field": "mean"},
                "shape": _of_memories(names, SHAPES),
                "tooltip": of_point,
            },
        },
    ]


def _axis(record: StudyRecord, labels: Sequence[str]) -> dict[str, Any]:
    """Numbers on a scale of their own, a logarithm where they span more than ten; else labels."""
    known = [point.x for point in record.points if point.x is not None]
    if len(known) < len(record.points) or not known:
        return {
            "field": "at",
            "type": "nominal",
            "sort": list(labels),
            "title": record.axis,
            "axis": {"labelAngle": 0, "grid": False},
        }
    wide = min(known) > 0 and max(known) > 10 * min(known) and record.study == "capacity"
    return {
        "field": "x",
        "type": "quantitative",
        "title": record.axis,
        "scale": {"type": "log" if wide else "linear", "nice": False, "padding": 14, "zero": False},
        "axis": {"values": sorted(set(known)), "grid": False},
    }


def _some(looks: Sequence[Any], count: int) -> list[Any]:
    return [looks[place % len(looks)] for place in range(count)]
