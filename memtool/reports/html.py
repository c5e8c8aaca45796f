"""The report of runs as a single HTML file that needs nothing else.

Sections come in the order of the questions: what is recalled, how good is it, what is forgotten,
what is confused, how did it learn, what did it cost, how was it made. Figures are live where the
page's script runs, and static pictures elsewhere and on paper.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from markupsafe import Markup
from pydantic import JsonValue

from memtool.atomic import write_atomic
from memtool.errors import MismatchError
from memtool.evaluation.csv_text import to_csv
from memtool.evaluation.inside import Example
from memtool.evaluation.metrics import METRICS
from memtool.evaluation.record import Record
from memtool.evaluation.summary import RowSummary, check_one_experiment, summarise_rows
from memtool.reports import charts
from memtool.reports.best import HOW
from memtool.reports.charts import Measure
from memtool.reports.chosen import bounds_grid, selection_grid
from memtool.reports.figure import CONFIG, Figure
from memtool.reports.page import templates
from memtool.reports.script import script
from memtool.reports.table import (
    MISSING,
    Grid,
    atoms_grid,
    by_kind,
    drift_grid,
    held_out,
    label,
    leading,
    losses_grid,
    main_row,
    methods_grid,
    metrics_grid,
    negative_grid,
    paired_grid,
    percent,
    recall_grid,
    seconds_text,
    unseen_grid,
)

THIN_SPACE = "\u2009"
WHERE_A_RUN_IS = ("seed", "store", "runs", "engine", "orders", "lock_timeout", "limits")
"""Settings that say where and on what a run is, and not which experiment."""


@dataclass(frozen=True, eq=False)
class Shown:
    """A figure on a page: its static picture, and its specification as JSON for the script."""

    name: str
    caption: str
    picture: Markup
    spec: Markup


@dataclass(frozen=True)
class Captioned:
    """A table with its caption."""

    grid: Grid
    caption: str


@dataclass(eq=False)
class Section:
    """A heading and what stands below it; one without content is left out."""

    heading: str
    figures: list[Shown] = field(default_factory=list)
    tables: list[Captioned] = field(default_factory=list)
    examples: Sequence[Example] = ()
    terms: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.figures or self.tables or self.examples)


def write_report(records: Record | Sequence[Record], path: Path) -> Path:
    """Write the report of one record, of several seeds, or of several runs side by side.

    The bytes follow from the records alone. Parts that they do not hold are left out. MismatchError
    for one seed of an experiment twice, MemtoolError when the file cannot be written.
    """
    several = (records,) if isinstance(records, Record) else tuple(records)
    return write_atomic(path, render(several))


def render(records: Sequence[Record]) -> str:
    """The HTML of `write_report` as text."""
    groups = experiments(records)
    names = run_names(groups)
    runs = [_run(group, f"r{place}" if place else "") for place, group in enumerate(groups)]
    beside: list[Section] = []
    if len(groups) > 1:
        beside = [_side_by_side(groups, names)]
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            title=runs[0]["title"] if len(groups) == 1 else f"{len(groups)} runs side by side",
            names=names,
            runs=runs,
            beside=beside,
            downloads=_downloads(records),
            script=_in_script(script()),
            config=_as_json(CONFIG),
            version=records[0].environment.packages.get("memtool", ""),
        )
    )


def page_of(figure: Figure) -> str:
    """A page with one live figure."""
    return page(figure.name, [Section("", figures=[live(figure)])])


def page(
    title: str,
    sections: Sequence[Section],
    *,
    about: str = "",
    summary: str = "",
    command: str | None = None,
    facts: Sequence[tuple[str, str]] = (),
    configuration: Sequence[tuple[str, str]] = (),
    version: str = "",
) -> str:
    """A page of sections that needs nothing else, as a report."""
    run = {
        "title": title,
        "about": about,
        "summary": summary,
        "tiles": [],
        "sections": sections,
        "command": command,
        "facts": facts,
        "configuration": configuration,
    }
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            title=title,
            names=[title],
            runs=[run],
            beside=[],
            downloads=[],
            script=_in_script(script()),
            config=_as_json(CONFIG),
            version=version,
        )
    )


# Several runs -----------------------------------------------------------------------------------


def experiments(records: Sequence[Record]) -> list[tuple[Record, ...]]:
    """The records of each experiment, which differ by seed only; in the order given."""
    try:
        check_one_experiment(records)
    except MismatchError:
        groups: dict[str, list[Record]] = {}
        for record in records:
            groups.setdefault(_experiment(record), []).append(record)
        return [tuple(group) for group in groups.values()]
    return [tuple(records)]


def _experiment(record: Record) -> str:
    """What tells an experiment from others."""
    run = record.run
    settings = {k: v for k, v in run.configuration.items() if k not in WHERE_A_RUN_IS}
    about = (run.method, run.setting, run.preset, run.mix, run.separation, run.backbone.sha256)
    rows = [(row.id, row.kind) for row in record.metrics.rows]
    return json.dumps([about, run.data.name, len(run.tasks), rows, settings], sort_keys=True)


def run_names(groups: Sequence[Sequence[Record]]) -> list[str]:
    """What the runs are called: method and data, and the settings that tell them apart."""
    firsts = [group[0].run for group in groups]
    plain = [f"{run.method} on {run.data.name}" for run in firsts]
    if len(set(plain)) < len(plain):
        differing = _differing(groups)
        plain = [
            ", ".join([name, *(f"{key}={values[place]}" for key, values in differing[:2])])
            for place, name in enumerate(plain)
        ]
    if len(plain) == 1:
        return plain
    return [f"{place}. {name}" for place, name in enumerate(plain, start=1)]


def _differing(groups: Sequence[Sequence[Record]]) -> list[tuple[str, list[str]]]:
    """Settings that all runs have and that tell them apart, each with its value in every run."""
    settings = [dict(flatten(_settings(group[0].run.configuration))) for group in groups]
    found = [
        (key, [one[key] for one in settings])
        for key in settings[0]
        if all(key in one for one in settings)
    ]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _settings(configuration: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {key: value for key, value in configuration.items() if key not in WHERE_A_RUN_IS}


def _side_by_side(groups: Sequence[Sequence[Record]], names: Sequence[str]) -> Section:
    """The methods of several runs beside each other, and the settings that differ."""
    rows = [main_row(by_kind(summarise_rows(group))) for group in groups]
    figure = charts.runs_figure(list(zip(names, groups, rows, strict=True)))
    differing = _differing(groups)
    measure = measure_of(groups[0], rows[:1])
    columns = [
        ("setting", [group[0].run.setting for group in groups]),
        ("seeds", [str(len(group)) for group in groups]),
        (
            f"{'accuracy %' if measure == 'accuracy' else 'loss'} at the end",
            [
                _estimate(group, row, measure_of(group, [row]))[0]
                for group, row in zip(groups, rows, strict=True)
            ],
        ),
        (
            "95 %",
            [
                _estimate(group, row, measure_of(group, [row]))[1]
                for group, row in zip(groups, rows, strict=True)
            ],
        ),
        (
            "forgetting (max) %",
            [
                percent(row.metrics["forgetting.max"].mean)
                if "forgetting.max" in row.metrics
                else MISSING
                for row in rows
            ],
        ),
    ]
    grid = Grid(
        title="The runs",
        header=("run", *(name for name, _ in columns)),
        rows=tuple((name, *(cells[i] for _, cells in columns)) for i, name in enumerate(names)),
    )
    tables = [Captioned(grid, "The runs, each by its method.")]
    if differing:
        tables.append(
            Captioned(
                Grid(
                    title="Settings that differ",
                    header=("setting", *(f"run {place}" for place in range(1, len(names) + 1))),
                    rows=tuple((key, *values) for key, values in differing),
                ),
                "Settings that differ.",
            )
        )
    return Section("Side by side", figures=[live(figure)], tables=tables)


# One run ----------------------------------------------------------------------------------------


def _run(records: Sequence[Record], prefix: str) -> dict[str, object]:
    """What the template shows of the records of one experiment."""
    rows = by_kind(summarise_rows(records))
    run = records[0].run
    kind = "held-out domain" if held_out(records) else "task"
    seeds = ", ".join(str(record.run.seed) for record in records)
    about = [
        f"{run.backbone.name} backbone",
        f"{len(run.tasks)} {kind}{'s' if len(run.tasks) > 1 else ''}",
        f"seed{'s' if len(records) > 1 else ''} {seeds}",
        *([f"mix {run.mix}"] if run.mix else []),
        *([f"separation {run.separation}"] if run.separation else []),
        f"{run.created:%Y-%m-%d}",
    ]
    sections = _sections(rows, records, prefix)
    return {
        "title": f"{run.method} on {run.data.name}, setting {run.setting}",
        "about": " · ".join(about),
        "summary": summary_sentence(rows, records),
        "tiles": _tiles(rows, records),
        "sections": [section for section in sections if not section.is_empty],
        "command": run.command,
        "facts": _provenance(records) + _orders(records),
        "configuration": flatten(run.configuration),
    }


def measure_of(records: Sequence[Record], rows: Sequence[RowSummary]) -> Measure:
    """What there is to show: accuracy where any was measured, else the loss of texts."""
    known = any(np.isfinite(row.accuracy).any() for row in rows)
    return "accuracy" if known or not any(r.loss for r in records[0].metrics.rows) else "loss"


OF_ONE_SEED = ("What each task recalls", "How it learned")
"""Sections whose figures are of the first record alone."""


def _sections(rows: Sequence[RowSummary], records: Sequence[Record], prefix: str) -> list[Section]:
    sections = [
        *_how_it_went(rows, records, prefix),
        *_inside(rows, records, prefix),
        *_in_numbers(rows, records),
    ]
    if len(records) > 1:
        for section in sections:
            if section.heading in OF_ONE_SEED:
                section.figures = [
                    Shown(
                        one.name,
                        f"{one.caption} Of seed {records[0].run.seed}.",
                        one.picture,
                        one.spec,
                    )
                    for one in section.figures
                ]
    return sections


def _figures(prefix: str, *made: Figure | None) -> list[Shown]:
    return [live(one, prefix) for one in made if one is not None]


def _tables(*made: tuple[Grid | None, str]) -> list[Captioned]:
    return [Captioned(grid, caption) for grid, caption in made if grid is not None]


def _how_it_went(
    rows: Sequence[RowSummary], records: Sequence[Record], prefix: str
) -> list[Section]:
    """What came out, by method, task and test sample."""
    measure = measure_of(records, rows)
    ordered = leading_first(rows, records)
    figures = partial(_figures, prefix)
    first, is_accuracy = records[0], measure == "accuracy"
    methods = _with_intervals(methods_grid(records), rows, records) if is_accuracy else None
    bold = f" Bold: {HOW}." if methods is not None and methods.bold else ""
    losses = losses_grid(records)
    return [
        Section("What each task recalls", figures=figures(charts.recall_map(first))),
        Section(
            "Methods",
            figures=figures(charts.methods_figure(ordered, records, measure)),
            tables=_tables(
                (methods, f"{methods.title if methods else ''}.{bold}"),
                (
                    None if losses is None else losses,
                    f"{losses.title if losses else ''}: −log p of the right answer given its "
                    "prompt. Forgetting is how much it rose since the task was learned.",
                ),
            ),
        ),
        Section(
            "After each task",
            figures=figures(
                charts.curves_figure(ordered, records, measure),
                charts.matrix_figure(ordered, records, measure),
            ),
            tables=_tables(
                (unseen := unseen_grid(records), f"{unseen.title if unseen else ''}."),
            ),
        ),
        Section(
            "What was forgotten",
            figures=figures(charts.forgetting_figure(ordered, records, measure)),
        ),
        Section(
            "Differences on the same test samples",
            figures=figures(charts.paired_figure(rows, records)),
            tables=_tables((pairs := paired_grid(records), f"{pairs.title if pairs else ''}.")),
        ),
        Section(
            "What is taken for what",
            figures=figures(
                charts.confusion_figure(ordered, records), charts.classes_figure(ordered, records)
            ),
        ),
    ]


def _inside(rows: Sequence[RowSummary], records: Sequence[Record], prefix: str) -> list[Section]:
    """What the memory does: examples, how it learned, what it recalls."""
    first, figures = records[0], partial(_figures, prefix)
    inside, recall_error = first.inside, recall_grid(records)
    return [
        Section("Examples", examples=() if inside is None else inside.examples),
        Section(
            "How it learned",
            figures=figures(charts.learning_figure(first), charts.keys_figure(first)),
            tables=_tables(
                (
                    drift := drift_grid(records),
                    f"{drift.title if drift else ''}. The same test samples, just after their task "
                    "was learned and now. 0: what earlier tasks recall has not moved.",
                )
            ),
        ),
        Section(
            "How exactly adapters are recalled",
            figures=figures(charts.recall_error_figure(rows)),
            tables=_tables(
                (
                    recall_error,
                    f"{recall_error.title if recall_error else ''}: |recalled − stored| / "
                    "|stored|, with all tasks in memory.",
                )
            ),
        ),
        Section(
            "Negative weights",
            tables=_tables(
                (
                    negative := negative_grid(records),
                    f"{negative.title if negative else ''}. The same memory and head, with every "
                    "negative weight set to zero: the difference is what they carry.",
                )
            ),
        ),
        Section(
            "Atoms as the bank grows",
            tables=_tables((atoms := atoms_grid(records), f"{atoms.title if atoms else ''}.")),
        ),
    ]


def _in_numbers(rows: Sequence[RowSummary], records: Sequence[Record]) -> list[Section]:
    """What the order does, what was tried, all metrics, and costs."""
    metrics = metrics_grid(records)
    of_one = f" Of seed {records[0].run.seed}." if len(records) > 1 else ""
    return [
        Section(
            "What the order does",
            tables=_tables((order := bounds_grid(records), f"{order.title if order else ''}.")),
        ),
        Section(
            "How settings were chosen",
            tables=_tables((tried := selection_grid(records), f"{tried.title if tried else ''}.")),
        ),
        Section(
            "Metrics",
            tables=_tables(
                (
                    metrics if len(metrics.header) > 1 else None,
                    f"{metrics.title}. Differences are percentage points; an arrow points to the "
                    "better side.",
                )
            ),
            terms=_descriptions(metrics),
        ),
        Section(
            "Cost",
            tables=_tables(
                (
                    cost_grid(rows, records),
                    f"Cost by method{_machine(records)}: learning, inference in batches, and what "
                    "is kept beside the frozen model; – was not measured.",
                ),
                (parts_grid(records[0]), f"Cost of the parts of the run.{of_one}"),
            ),
        ),
    ]


def leading_first(rows: Sequence[RowSummary], records: Sequence[Record]) -> list[RowSummary]:
    """The method, then upper bounds and rivals by their average, then all others."""
    first = leading(rows, records, charts.MOST_METHODS)
    own = main_row(rows)
    ids = {row.id for row in first}
    rest = [row for row in rows if row.id not in ids]
    return [own, *(row for row in [*first, *rest] if row is not own)]


def _estimate(records: Sequence[Record], row: RowSummary, measure: Measure) -> tuple[str, str]:
    """Mean at the end and its interval, as text."""
    mean, low, high = charts.point(records, row, measure, None)
    text = percent if measure == "accuracy" else _three_digits
    return text(mean), MISSING if np.isnan(low) else f"{text(low)} to {text(high)}"


def _three_digits(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:.3f}"


def _with_intervals(grid: Grid, rows: Sequence[RowSummary], records: Sequence[Record]) -> Grid:
    """The table of methods with the interval of the average beside it."""
    names = [
        name
        for name in grid.header
        if name.startswith(("final average", "dg.heldout", "dgcl.heldout"))
    ]
    if not names:
        return grid
    at = grid.header.index(names[0]) + 1
    cells = [_estimate(records, row, "accuracy")[1] for row in rows]
    if set(cells) == {MISSING}:
        return grid
    return Grid(
        title=grid.title,
        header=(*grid.header[:at], "95 % interval", *grid.header[at:]),
        rows=tuple(
            (*row[:at], cell, *row[at:]) for row, cell in zip(grid.rows, cells, strict=True)
        ),
        bold=frozenset((i, j + (j >= at)) for i, j in grid.bold),
        rules=grid.rules,
        notes=grid.notes,
    )


def summary_sentence(rows: Sequence[RowSummary], records: Sequence[Record]) -> str:
    """What came out, in plain words: the method beside its best baseline and its upper bound."""
    run, method = records[0].run, main_row(rows)
    kind = "held-out domain" if held_out(records) else "task"
    tasks = f"{len(run.tasks)} {kind}{'s' if len(run.tasks) > 1 else ''}"
    own = method.metrics.get("faa")
    measure = measure_of(records, rows)
    if own is None or measure == "loss":
        mean, _ = _estimate(records, method, measure)
        if mean == MISSING:
            return f"{method.label} was evaluated on {tasks} of {run.data.name} ({run.setting})."
        name = "loss of" if measure == "loss" else "accuracy of"
        unit = "nats per answer token" if measure == "loss" else "%"
        return (
            f"After {tasks} of {run.data.name} ({run.setting}), {method.label} has a mean {name} "
            f"{mean} {unit}."
        )
    begin, average = ("On", "an") if held_out(records) else ("After", "a final")
    text = (
        f"{begin} {tasks} of {run.data.name} ({run.setting}), {method.label} has {average} average "
        f"accuracy of {percent(own.mean)} %"
    )
    _, low, high = charts.point(records, method, "accuracy", None)
    if not np.isnan(low):
        over = f"{own.n} seeds, 95 % t-interval" if own.n > 1 else "95 % interval over test samples"
        text += f" ({over} {percent(low)} to {percent(high)} %)"
    rest = [row for row in rows if row is not method and "faa" in row.metrics]
    others: list[str] = []
    for of_kind, words in (
        ([row for row in rest if row.is_rival], "the best baseline"),
        ([row for row in rest if row.is_bound], "the upper bound"),
    ):
        if of_kind:
            best = max(of_kind, key=lambda row: row.metrics["faa"].mean)
            others.append(f"{words}, {best.label}, {percent(best.metrics['faa'].mean)} %")
    if others:
        text += "; " + "; ".join(others)
    text += "."
    forgetting = method.metrics.get("forgetting.max")
    if forgetting is not None:
        text += (
            f" It lost {percent(forgetting.mean)} percentage points from the best accuracy on "
            "earlier tasks (forgetting.max)."
        )
    return text


def _tiles(rows: Sequence[RowSummary], records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """The few numbers that matter: name, number, and what it is beside."""
    own, measure = main_row(rows), measure_of(records, rows)
    mean, interval = _estimate(records, own, measure)
    unit = " %" if measure == "accuracy" else ""
    what = "final average accuracy" if measure == "accuracy" else "loss at the end"
    tiles = [(what, f"{mean}{unit}", "" if interval == MISSING else f"95 %: {interval}")]
    rivals = [row for row in rows if row.is_rival and "faa" in row.metrics]
    if rivals and measure == "accuracy":
        best = max(rivals, key=lambda row: row.metrics["faa"].mean)
        tiles.append(("best baseline", f"{percent(best.metrics['faa'].mean)} %", best.label))
    forgetting = own.metrics.get("forgetting.max")
    if forgetting is not None:
        tiles.append(("forgetting", f"{percent(forgetting.mean)}", "points from the best"))
    told = own.metrics.get("task_accuracy")
    if told is not None:
        tiles.append(("task told right", f"{percent(told.mean)} %", "of test samples"))
    row = records[0].row(own.id)
    if row.ms_per_input is not None:
        tiles.append(("inference", f"{row.ms_per_input:.3g} ms", "an input, in batches"))
    if row.bytes is not None:
        kept = "" if row.parameters is None else f"{count(row.parameters)} numbers"
        tiles.append(("memory", size(row.bytes), kept))
    return tiles


def cost_grid(rows: Sequence[RowSummary], records: Sequence[Record]) -> Grid | None:
    """What every method costs, where it was measured: means over the seeds."""

    def mean(row: RowSummary, name: str) -> float | None:
        found = [getattr(record.row(row.id), name) for record in records]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None

    columns = [
        ("learning, s", "seconds", seconds_text),
        ("inference, ms an input", "ms_per_input", lambda value: f"{value:.3g}"),
        ("parameters", "parameters", lambda value: count(round(value))),
        ("size", "bytes", lambda value: size(round(value))),
    ]
    found = []
    for title, name, text in columns:
        values = [mean(row, name) for row in rows]
        if any(value is not None for value in values):
            cells = [MISSING if value is None else text(value) for value in values]
            found.append((title, cells))
    if not found:
        return None
    return Grid(
        title="Cost by method",
        header=("", *(title for title, _ in found)),
        rows=tuple((label(row), *(c[i] for _, c in found)) for i, row in enumerate(rows)),
    )


def parts_grid(record: Record) -> Grid | None:
    """What the parts of a run cost."""
    costs = () if record.inside is None else record.inside.costs
    if not costs:
        return None
    columns = [
        ("time s", [MISSING if c.seconds is None else seconds_text(c.seconds) for c in costs]),
        ("parameters", [MISSING if c.parameters is None else count(c.parameters) for c in costs]),
        ("size", [MISSING if c.bytes is None else size(c.bytes) for c in costs]),
    ]
    known = [(name, cells) for name, cells in columns if set(cells) != {MISSING}]
    return Grid(
        title="Cost of each part",
        header=("", *(name for name, _ in known)),
        rows=tuple((cost.label, *(c[i] for _, c in known)) for i, cost in enumerate(costs)),
    )


def _machine(records: Sequence[Record]) -> str:
    device = records[0].environment.device
    return f" on {device}" if device else ""


# For the script ---------------------------------------------------------------------------------


def live(figure: Figure, prefix: str = "") -> Shown:
    """A figure as a page shows it: static where its script does not run."""
    name = f"{prefix}-{figure.name}" if prefix else figure.name
    named = Figure(name, figure.caption, figure.spec, figure.cells)
    return Shown(name, figure.caption, Markup(named.inline()), _as_json(figure.spec))


def _as_json(value: object) -> Markup:
    """JSON that can stand in a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _in_script(text: str) -> Markup:
    """A script whose strings do not end its element."""
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _downloads(records: Sequence[Record]) -> list[tuple[str, str, Markup]]:
    """The records as files: what the link says, the file's name, and its address on the page."""
    documents = [json.loads(record.to_json()) for record in records]
    whole = json.dumps(documents[0] if len(documents) == 1 else documents, separators=(",", ":"))
    lines: list[Sequence[str | int]] = [
        (
            "run",
            "seed",
            "row",
            "label",
            "kind",
            "after_tasks",
            "task",
            "test_samples",
            "accuracy",
            "loss",
        )
    ]
    names = {id(record): name for group, name in _named(records) for record in group}
    for record in records:
        for row in record.metrics.rows:
            for step, scores in enumerate(row.accuracy):
                for place, score in enumerate(scores):
                    loss = row.loss[step][place] if row.loss else None
                    if score is None and loss is None:
                        continue
                    task = record.run.tasks[place]
                    lines.append(
                        (
                            names[id(record)],
                            record.run.seed,
                            row.id,
                            row.label,
                            row.kind,
                            step,
                            task.name,
                            "" if task.test_samples is None else task.test_samples,
                            "" if score is None else repr(float(score)),
                            "" if loss is None else repr(float(loss)),
                        )
                    )
    files = [
        ("JSON", "record.json", whole, "application/json"),
        ("CSV", "record.csv", to_csv(lines), "text/csv"),
    ]
    return [
        (
            name,
            file,
            Markup(f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"),
        )
        for name, file, text, kind in files
    ]


def _named(records: Sequence[Record]) -> list[tuple[Sequence[Record], str]]:
    groups = experiments(records)
    return list(zip(groups, run_names(groups), strict=True))


# Settings, sizes and provenance -----------------------------------------------------------------


def flatten(configuration: Mapping[str, JsonValue], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as `("memory.separation", "affine")` pairs, in their order."""
    pairs: list[tuple[str, str]] = []
    for name, value in configuration.items():
        if isinstance(value, dict) and value:
            pairs += flatten(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", _setting(value)))
    return pairs


def _setting(value: JsonValue) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(_setting(item) for item in value) or "–"
        case _:
            return str(value)


def count(number: int) -> str:
    """A whole number in groups of three: `"294 912"`."""
    return f"{number:,}".replace(",", THIN_SPACE)


def size(number: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1: `"1.2 MiB"`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """`"42.0 s"`, `"3 min 05 s"`, `"2 h 07 min"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _descriptions(metrics: Grid) -> list[tuple[str, str]]:
    ids = [name.split(" ")[0] for name in metrics.header[1:]]
    return [(id, f"{METRICS[id].description}; {METRICS[id].direction} is better") for id in ids]


def _orders(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The task order, or that of every seed when they differ."""
    if held_out(records):
        return [("held-out domains", ", ".join(records[0].run.task_names))]
    orders = [" → ".join(record.run.task_names) for record in records]
    if len(set(orders)) == 1:
        return [("task order", orders[0])]
    return [
        (f"task order, seed {record.run.seed}", order)
        for record, order in zip(records, orders, strict=True)
    ]


def _provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    run, environment = records[0].run, records[0].environment
    memory = [r.environment.peak_memory_bytes for r in records]
    known = [number for number in memory if number is not None]
    kernels = {name for record in records for name in record.environment.kernels}
    fingerprints = dict.fromkeys(record.run.data.fingerprint for record in records)
    versions = dict.fromkeys(r.run.store_version for r in records if r.run.store_version)
    pairs = [
        ("method", run.method),
        ("setting", run.setting),
        ("preset", run.preset),
        ("mix", run.mix),
        ("separation", run.separation),
        ("seeds" if len(records) > 1 else "seed", ", ".join(str(r.run.seed) for r in records)),
        ("data", run.data.name),
        ("data fingerprint", ", ".join(fingerprints)),
        ("backbone", run.backbone.name),
        ("backbone tensors (sha256)", run.backbone.sha256),
        ("class order", ", ".join(run.class_order)),
        ("store", run.store),
        ("store version", ", ".join(versions)),
        ("created", run.created.isoformat(timespec="seconds")),
        ("device", environment.device),
        ("kernels of picked adapters", ", ".join(sorted(kernels))),
        ("wall time", duration(sum(r.environment.wall_seconds for r in records))),
        ("peak memory", size(max(known)) if known else None),
        ("platform", environment.platform),
        ("python", environment.python),
        ("packages", ", ".join(f"{name} {v}" for name, v in environment.packages.items())),
    ]
    return [(name, value) for name, value in pairs if value]
