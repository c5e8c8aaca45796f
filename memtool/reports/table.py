"""Tables of a record: what stands in each cell, shown by rich in a terminal and plain elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memtool.errors import NotFoundError
from memtool.evaluation.metrics import METRICS, seen_accuracy
from memtool.evaluation.paired import paired
from memtool.evaluation.record import AtomUse, Kind, Record, Row
from memtool.evaluation.summary import RowSummary, Summary, summarise, summarise_rows
from memtool.reports.best import HOW, UNTESTED, best, untested
from memtool_stores.printable import printable

MISSING = "-"
REPLAYS = "‡"
"""Behind the label of a row that keeps samples of earlier tasks."""
GAP = 2  # blank columns after every column of a terminal table
KINDS: tuple[Kind, ...] = ("method", "baseline", "upper bound")

# With more tasks (fewer when every cell has its spread) a table of all tasks is wider than a page;
# the report's map of the accuracy matrix shows them instead.
MOST_TASK_COLUMNS = 10
MOST_TASK_COLUMNS_WITH_SPREAD = 6
MOST_METHOD_COLUMNS = 4

# Metrics that the tables show for a setting; a record holds all that are defined.
_COMMON = (
    "faa",
    "average_incremental",
    "forgetting.max",
    "forgetting.first",
    "forgetting.step",
    "bwt.gem",
    "fwt",
)
_SHOWN: dict[str, tuple[str, ...]] = {
    "dg": ("dg.heldout",),
    "til": ("faa", "average_incremental", "forgetting.max"),
    "mts": ("faa",),
    "mtl": ("faa",),
    "dgcl": ("forgetting.max", "forgetting.first", "bwt.gem"),
    "xtail": ("transfer.xtail", "average.xtail", "last.xtail", "forgetting.max"),
    "trace": ("op.trace", "bwt.gem", "bwt.trace"),
}

_OF_LAST = ("faa", "dg.heldout", "last.xtail", "op.trace")
"""Metrics that are the mean over the tasks of what `Row.right` knows sample by sample."""


@dataclass(frozen=True)
class Grid:
    """A table as text: header, rows of equal length, cells to emphasise, notes below.

    bold: (row, column) pairs; rules: numbers of the rows that have a line above them. The first
    column holds names, the others numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()
    rules: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def printable(self) -> Grid:
        """The same with what names may hide or do in a terminal shown as its escape."""
        return replace(
            self,
            title=printable(self.title),
            header=tuple(map(printable, self.header)),
            rows=tuple(tuple(map(printable, row)) for row in self.rows),
            notes=tuple(map(printable, self.notes)),
        )


def percent(fraction: float) -> str:
    """A fraction 0..1 as percent with one decimal, without the sign: `"83.5"`."""
    if math.isnan(fraction):
        return MISSING
    return f"{round(100 * fraction, 1) + 0.0:.1f}"  # + 0.0: never "-0.0"


def seconds_text(seconds: float) -> str:
    """Seconds with one decimal, or three digits below ten: `"41.2"`, `"0.0241"`."""
    return f"{seconds:.1f}" if seconds >= 9.95 else f"{seconds:.3g}"


def _cell(summary: Summary | None, text: Callable[[float], str] = percent) -> str:
    """`"83.5"`, or `"83.5 ± 0.4"` for several seeds."""
    if summary is None:
        return MISSING
    if summary.std is None:
        return text(summary.mean)
    return f"{text(summary.mean)} ± {text(summary.std)}"


def _interval(
    summary: Summary | None,
    text: Callable[[float], str] = percent,
    *,
    least: float = 0.0,
    most: float = 1.0,
) -> str:
    """`"83.5"`, or `"83.5 (82.1 to 84.9)"` for several seeds, cut at `least` and `most`."""
    if summary is None:
        return MISSING
    bounds = summary.interval(least, most)
    if bounds is None:
        return text(summary.mean)
    return f"{text(summary.mean)} ({text(bounds[0])} to {text(bounds[1])})"


def _over_seeds(values: Iterable[float]) -> Summary | None:
    numbers = [float(value) for value in values]
    return None if any(math.isnan(number) for number in numbers) else summarise(numbers)


def by_kind(rows: Sequence[RowSummary]) -> list[RowSummary]:
    """Methods first, then baselines, then upper bounds; otherwise as in the record."""
    return [row for kind in KINDS for row in rows if row.kind == kind]


def label(row: RowSummary) -> str:
    """The label of a row; an upper bound says that it is one where it is, replay is marked."""
    if row.kind == "upper bound":
        return f"{row.label} ({'upper bound' if row.is_bound else 'reference'})"
    return f"{row.label} {REPLAYS}" if row.replay else row.label


def _rules(rows: Sequence[RowSummary]) -> tuple[int, ...]:
    return tuple(i for i in range(1, len(rows)) if rows[i].kind != rows[i - 1].kind)


SPREAD = "mean ± sample standard deviation"
INTERVAL = "mean (95 % t-interval over the seeds)"


def _about(records: Sequence[Record], spread: str = SPREAD) -> str:
    run = records[0].run
    about = f"{run.method}, {run.setting}, {run.data.name}"
    if counts := samples_text(records):
        about += f"; {counts}"
    if len(records) > 1:
        what = "seeds" if records[0].run.bound is None else "runs at the order bounds"
        about += f"; {len(records)} {what}: {spread}"
    return about


def samples_text(records: Sequence[Record]) -> str:
    """How many test samples all tasks have: `"n = 1,800"`; empty where a record does not say it.

    Validation samples are called so.
    """
    of_tasks = [[task.test_samples or 0 for task in record.run.tasks] for record in records]
    if not all(all(counts) for counts in of_tasks):
        return ""
    sums = [sum(counts) for counts in of_tasks]
    stream = records[0].run.configuration.get("stream")
    held_back = isinstance(stream, dict) and stream.get("split") == "validation"
    text = "n = " + " to ".join(f"{count:,}" for count in sorted({min(sums), max(sums)}))
    return f"{text} validation samples" if held_back else text


def held_out(records: Sequence[Record]) -> bool:
    """Whether the tasks are domains that nothing was learned from (settings dg and dgcl).

    Of dgcl only where every domain was held out in turn: else they are those that were learned.
    """
    run = records[0].run
    stream = run.configuration.get("stream")
    one = isinstance(stream, dict) and stream.get("held_out") is not None
    return run.setting == "dg" or (run.setting == "dgcl" and not one)


def _average(row: RowSummary, records: Sequence[Record]) -> Summary | None:
    """Mean over the tasks after the last one, or over the held-out domains."""
    id = f"{records[0].run.setting}.heldout"
    return row.metrics[id] if held_out(records) and id in row.metrics else row.metrics.get("faa")


def _average_name(records: Sequence[Record]) -> str:
    return f"{records[0].run.setting}.heldout" if held_out(records) else "final average"


def _measured_at(records: Sequence[Record]) -> str:
    return "on each held-out domain" if held_out(records) else "after the last task"


def task_labels(records: Sequence[Record]) -> tuple[str, ...]:
    """Names of the tasks; `task 1`, … when the order differs between seeds."""
    names = {record.run.task_names for record in records}
    if len(names) == 1:
        return next(iter(names))
    return tuple(f"task {number}" for number in range(1, len(records[0].run.tasks) + 1))


def notes(rows: Sequence[RowSummary]) -> tuple[str, ...]:
    """A sentence for every method that a baseline equals or beats in final average accuracy."""
    sentences: list[str] = []
    for method in rows:
        own = method.metrics.get("faa")
        if method.kind != "method" or method.reading or own is None:
            continue
        above = [
            (row, row.metrics["faa"].mean) for row in rows if row.is_rival and "faa" in row.metrics
        ]
        above = sorted(
            [(row, value) for row, value in above if value >= own.mean], key=lambda pair: -pair[1]
        )
        if above:
            names = ", ".join(f"{row.label} {percent(value)} %" for row, value in above)
            sentences.append(f"Not below {method.label} ({percent(own.mean)} %): {names}.")
    return tuple(sentences)


def footnotes(rows: Sequence[RowSummary]) -> tuple[str, ...]:
    """What the marks behind labels say."""
    found = []
    if any(row.replay for row in rows):
        found.append(
            f"{REPLAYS} keeps samples of earlier tasks, which no other row may: not ranked."
        )
    if any(row.kind == "upper bound" and not row.is_bound for row in rows):
        found.append("A reference was made as an upper bound, and is below the method here.")
    return tuple(found)


def methods_grid(records: Sequence[Record]) -> Grid:
    """Methods × tasks after the last task, final average, forgetting and time.

    In setting dg the tasks are the held-out domains, and their mean is dg.heldout; in dgcl too,
    where every domain was held out, beside what the memories have of the domains that they learned.
    """
    rows = by_kind(summarise_rows(records))
    tasks = task_labels(records)
    most = MOST_TASK_COLUMNS if len(records) == 1 else MOST_TASK_COLUMNS_WITH_SPREAD
    shown = range(len(tasks)) if len(tasks) <= most else range(0)
    columns = [
        (f"{tasks[j]} %", [_over_seeds(row.accuracy[:, -1, j]) for row in rows]) for j in shown
    ]
    averages = [_average(row, records) for row in rows]
    columns.append((f"{_average_name(records)} %", averages))
    bold = {
        (i, 1 + place)
        for place, (_, column) in enumerate(columns)
        for i in best(records, rows, column, task=place if place < len(shown) else None)
    }
    other = "dgcl.seen" if held_out(records) else "dgcl.heldout"
    if any(other in row.metrics for row in rows):
        columns.append((f"{other} %", [row.metrics.get(other) for row in rows]))
    if any("forgetting.max" in row.metrics for row in rows):
        forgetting = [row.metrics.get("forgetting.max") for row in rows]
        columns.append(("forgetting (max) %", forgetting))
    cells = [[_cell(summary) for summary in column] for _, column in columns]
    header = ["", *(name for name, _ in columns)]
    if any(row.seconds is not None for row in rows):
        header.append("time s")
        times = [row.seconds for row in rows]
        cells.append([MISSING if time is None else seconds_text(time.mean) for time in times])
    return Grid(
        title=f"Accuracy {_measured_at(records)} ({_about(records)})",
        header=tuple(header),
        rows=tuple((label(row), *(c[i] for c in cells)) for i, row in enumerate(rows)),
        bold=frozenset(bold),
        rules=_rules(rows),
        notes=(
            *notes(rows),
            *([UNTESTED] if untested(records, rows, averages) else []),
            *footnotes(rows),
            *_selected(records),
        ),
    )


def _selected(records: Sequence[Record]) -> tuple[str, ...]:
    """What the rows were chosen to have, as a sentence; none where nothing was chosen."""
    selection = records[0].run.selection
    ids = [row.id for row in records[0].metrics.rows]
    return () if selection is None else (selection.sentence(ids),)


def tasks_grid(records: Sequence[Record]) -> Grid:
    """Tasks × methods after the last task, each with its 95 % t-interval over the seeds.

    Of many methods only the leading ones: those of kind method, the best baselines and the best
    upper bound. `methods_grid` has all.
    """
    all_rows = by_kind(summarise_rows(records))
    rows = leading(all_rows, records)
    lines = [
        (name, [_over_seeds(row.accuracy[:, -1, place]) for row in rows])
        for place, name in enumerate(task_labels(records))
    ]
    lines.append((_average_name(records), [_average(row, records) for row in rows]))
    return Grid(
        title=f"Accuracy {_measured_at(records)} in % ({_about(records, INTERVAL)})",
        header=(
            "held-out domain" if held_out(records) else "task",
            *(label(row) for row in rows),
        ),
        rows=tuple((name, *map(_interval, summaries)) for name, summaries in lines),
        bold=frozenset(
            (i, 1 + j)
            for i, (_, summaries) in enumerate(lines)
            for j in best(records, rows, summaries, task=i if i < len(lines) - 1 else None)
        ),
        rules=(len(lines) - 1,),
        notes=()
        if len(rows) == len(all_rows)
        else ("The best baselines by their average; the table of methods has all.",),
    )


def leading(
    rows: Sequence[RowSummary], records: Sequence[Record], most: int = MOST_METHOD_COLUMNS
) -> list[RowSummary]:
    """At most so many rows, in their order: every method, the best upper bound and baselines."""

    def average(row: RowSummary) -> float:
        summary = _average(row, records)
        return -math.inf if summary is None else summary.mean

    by_average = sorted(rows, key=average, reverse=True)
    first = [row for row in by_average if row.kind == "method"]
    first += [row for row in by_average if row.kind == "upper bound"][:1]
    first += [row for row in by_average if row.is_rival]
    first += [row for row in by_average if row.kind == "baseline" and not row.is_rival]
    kept = {row.id for row in first[:most]}
    return [row for row in rows if row.id in kept]


def _signed(fraction: float) -> str:
    """A difference in percentage points with its sign: `"+1.3"`."""
    points = round(100 * fraction, 1) + 0.0
    return f"{points:+.1f}" if points else "0.0"


def negative_grid(records: Sequence[Record]) -> Grid | None:
    """What negative coefficients carry: rows memory and memory-nonnegative, task by task, or None.

    The difference is taken seed by seed. A note says what share of the gain over the best reading
    of the frozen backbone it is, where that was measured and there is a gain.
    """
    rows = {row.id: row for row in summarise_rows(records)}
    if not {"memory", "memory-nonnegative"} <= set(rows):
        return None
    whole, positive = rows["memory"], rows["memory-nonnegative"]
    pairs = [
        (name, whole.accuracy[:, -1, place], positive.accuracy[:, -1, place])
        for place, name in enumerate(task_labels(records))
    ]
    averages = whole.accuracy[:, -1].mean(axis=1), positive.accuracy[:, -1].mean(axis=1)
    pairs.append((_average_name(records), *averages))
    body = [
        (
            name,
            _interval(_over_seeds(one)),
            _interval(_over_seeds(other)),
            _interval(_over_seeds(one - other), _signed, least=-1.0),
        )
        for name, one, other in pairs
    ]
    carried, own = float((averages[0] - averages[1]).mean()), float(averages[0].mean())
    frozen = [
        (float(row.accuracy[:, -1].mean()), row.label)
        for row in rows.values()
        if row.id.startswith("frozen")
    ]
    sentences = []
    if frozen and own > max(frozen)[0]:
        level, name = max(frozen)
        gain = own - level
        sentences.append(
            f"{whole.label} is {percent(gain)} points above {name}; negative coefficients carry "
            f"{_signed(carried)} of them ({round(100 * carried / gain)} %)."
        )
    return Grid(
        title=f"Negative coefficients set to zero ({_about(records, INTERVAL)})",
        header=(
            "held-out domain" if held_out(records) else "task",
            f"{whole.label} %",
            "without negative %",
            "they carry, points",
        ),
        rows=tuple(body),
        rules=(len(body) - 1,),
        notes=tuple(sentences),
    )


def paired_grid(records: Sequence[Record]) -> Grid | None:
    """The first method less every other row, on the same test samples, or None.

    Only rows that say which samples were right.
    """
    rows = by_kind(summarise_rows(records))
    own = main_row(rows)
    found = [
        (row, pair)
        for row in rows
        if row is not own and (pair := paired(records, own.id, row.id)) is not None
    ]
    if not found:
        return None
    return Grid(
        title=f"{own.label} less each other row, by test sample ({_about(records, 'mean')})",
        header=(
            "",
            "difference, points",
            "95 %: from",
            "to",
            "p",
            f"only {own.label} right",
            "only this right",
        ),
        rows=tuple(
            (
                label(row),
                _signed(pair.difference),
                _signed(pair.low),
                _signed(pair.high),
                p_text(pair.p),
                str(pair.only_first),
                str(pair.only_second),
            )
            for row, pair in found
        ),
        rules=_rules([row for row, _ in found]),
        notes=(
            f"On {found[0][1].samples:,} test samples, the models being as they are: the interval "
            "is the paired bootstrap's, p that of McNemar's exact test."
            + (" More seeds are no more samples." if len(records) > 1 else ""),
        ),
    )


def p_text(p: float) -> str:
    """A probability with two digits: `"0.042"`, `"< 0.001"`."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def drift_grid(records: Sequence[Record]) -> Grid | None:
    """How coefficients of earlier tasks changed since they were learned, by method, or None."""
    ids = ("coefficient_drift", "new_coefficients")
    rows = [row for row in by_kind(summarise_rows(records)) if ids[0] in row.metrics]
    if not rows:
        return None
    known = [id for id in ids if any(id in row.metrics for row in rows)]
    return Grid(
        title=f"Change of the coefficients of earlier tasks ({_about(records, INTERVAL)})",
        header=("", *(f"{METRICS[id].id} ↓" for id in known)),
        rows=tuple(
            (
                label(row),
                *(
                    _interval(row.metrics.get(id), lambda value: f"{value:.3g}", most=math.inf)
                    for id in known
                ),
            )
            for row in rows
        ),
    )


def atom_uses(records: Sequence[Record]) -> tuple[AtomUse, ...]:
    """How atoms are used, by the first row in which every seed measured it; empty without one."""
    for row in records[0].metrics.rows:
        found = [record.row(row.id).atom_use for record in records]
        known = tuple(use for use in found if use is not None)
        if len(known) == len(records):
            return known
    return ()


def atoms_grid(records: Sequence[Record]) -> Grid | None:
    """What the atoms of earlier tasks still add after each task, as the bank grows, or None."""
    uses = atom_uses(records)
    if not uses:
        return None
    tables = [
        np.array([getattr(use, name) for use in uses], dtype=np.float64)
        for name in ("norm", "difference")
    ]

    def cell(values: npt.NDArray[np.float64]) -> str:
        return _interval(_over_seeds(values), lambda value: f"{value:.2f}", most=math.inf)

    body = []
    for place, name in enumerate(task_labels(records)[: len(uses[0].norm)]):
        if not place:
            continue
        first = [cell(table[:, place, 0]) for table in tables]
        earlier = [cell(table[:, place, :place].mean(axis=1)) for table in tables]
        body.append((f"{place + 1} {name}", *first, *earlier))
    return Grid(
        title=f"What atoms of earlier tasks still add ({_about(records, INTERVAL)})",
        header=(
            "after task",
            "first task: length ↑",
            "change ↓",
            "all earlier: length ↑",
            "change ↓",
        ),
        rows=tuple(body),
        notes=(
            "Relative to just after the task was learned, on its tests at the layer inputs "
            "of then: 1 and 0 are atoms that work as they did.",
        ),
    )


def steps_grid(records: Sequence[Record], id: str | None = None) -> Grid:
    """Accuracy on every task after each task, for one row (default: the first method).

    NotFoundError for an unknown row id.
    """
    rows = summarise_rows(records)
    row = main_row(rows) if id is None else next((r for r in rows if r.id == id), None)
    if row is None:
        raise NotFoundError(f"no row {id!r} in the record", expected=", ".join(r.id for r in rows))
    tasks = task_labels(records)
    if held_out(records):
        # Nothing is learned step by step: the held-out domains are one line.
        return Grid(
            title=f"{row.label}: accuracy {_measured_at(records)} ({_about(records)})",
            header=("", *(f"{task} %" for task in tasks), f"{_average_name(records)} %"),
            rows=(
                (
                    label(row),
                    *(_cell(_over_seeds(row.accuracy[:, -1, j])) for j in range(len(tasks))),
                    _cell(_average(row, records)),
                ),
            ),
        )
    steps = [i for i in range(len(tasks) + 1) if not np.isnan(row.mean[i]).all()]
    seen = [seen_accuracy(accuracy) for accuracy in row.accuracy]
    body = [
        (
            "before any" if i == 0 else f"{i} {tasks[i - 1]}",
            *(_cell(_over_seeds(row.accuracy[:, i, j])) for j in range(len(tasks))),
            MISSING if i == 0 else _cell(_over_seeds(s[i - 1] for s in seen)),
        )
        for i in steps
    ]
    return Grid(
        title=f"{row.label}: accuracy after each task ({_about(records)})",
        header=("after task", *(f"{task} %" for task in tasks), "mean of seen %"),
        rows=tuple(body),
    )


def unseen_grid(records: Sequence[Record]) -> Grid | None:
    """Accuracy on the domain never learned from after each task: methods × steps, or None."""
    rows = [row for row in by_kind(summarise_rows(records)) if row.unseen is not None]
    curves = [(row, row.unseen) for row in rows if row.unseen is not None]
    curves = [(row, c) for row, c in curves if not np.isnan(c[:, 1:]).any()]
    if not curves:
        return None
    shown = [i for i in range(curves[0][1].shape[1]) if not np.isnan(curves[0][1][:, i]).any()]
    run = records[0].run
    named = held_out(records) or len({record.run.task_names for record in records}) > 1
    return Grid(
        title=f"Accuracy on the domain never learned from, after each task ({_about(records)})",
        header=(
            "",
            *(
                f"{'before any' if i == 0 else i if named else f'{i} {run.task_names[i - 1]}'} %"
                for i in shown
            ),
        ),
        rows=tuple(
            (label(row), *(_cell(_over_seeds(c[:, i])) for i in shown)) for row, c in curves
        ),
        rules=_rules([row for row, _ in curves]),
    )


def metrics_grid(records: Sequence[Record]) -> Grid:
    """Methods × metrics: those of the setting, and all that have inputs of their own."""
    rows = by_kind(summarise_rows(records))
    wanted = _SHOWN.get(records[0].run.setting, _COMMON)
    shown = [
        metric
        for metric in METRICS.values()
        if (metric.id in wanted or not metric.of_matrix)
        and any(metric.id in row.metrics for row in rows)
    ]
    header, columns = [], []
    bold: set[tuple[int, int]] = set()
    for number, metric in enumerate(shown, start=1):
        arrow = "↑" if metric.direction == "higher" else "↓"
        summaries = [row.metrics.get(metric.id) for row in rows]
        if metric.unit == "points":
            name = f"{metric.id} {arrow}"
            cells = [_cell(summary, lambda value: f"{100 * value:.3f}") for summary in summaries]
        elif metric.unit == "fraction":
            name, cells = f"{metric.id} % {arrow}", [_cell(summary) for summary in summaries]
            if metric.id in _OF_LAST:
                bold |= {(i, number) for i in best(records, rows, summaries)}
        else:
            name = f"{metric.id} {arrow} ({metric.unit})"
            cells = [_cell(summary, lambda value: f"{value:.3g}") for summary in summaries]
        header.append(name)
        columns.append(cells)
    return Grid(
        title=f"Metrics ({_about(records)})",
        header=("", *header),
        rows=tuple((label(row), *(cells[i] for cells in columns)) for i, row in enumerate(rows)),
        bold=frozenset(bold),
        rules=_rules(rows),
        notes=(*_undefined(rows, wanted), *footnotes(rows)),
    )


def _undefined(rows: Sequence[RowSummary], wanted: Sequence[str]) -> tuple[str, ...]:
    """One sentence on all metrics that some rows have not, with the reasons."""
    reasons: dict[str, list[str]] = {}
    for id in wanted:
        for reason in dict.fromkeys(row.undefined[id] for row in rows if id in row.undefined):
            reasons.setdefault(reason, []).append(id)
    if not reasons:
        return ()
    parts = [f"{', '.join(ids)} ({reason})" for reason, ids in reasons.items()]
    return (f"{MISSING} where a row does not define it: {'; '.join(parts)}.",)


def recall_grid(records: Sequence[Record]) -> Grid | None:
    """Relative recall error of every adapter after the last task: tasks × memories, or None."""
    rows = [row for row in by_kind(summarise_rows(records)) if row.recall_error is not None]
    if not rows:
        return None
    body = [
        (
            name,
            *(
                _cell(_over_seeds(row.recall_error[:, -1, place]), lambda value: f"{value:.2e}")
                for row in rows
                if row.recall_error is not None
            ),
        )
        for place, name in enumerate(task_labels(records))
    ]
    return Grid(
        title=f"Relative recall error of each adapter ({_about(records)})",
        header=("adapter of task", *(label(row) for row in rows)),
        rows=tuple(body),
    )


def losses_grid(records: Sequence[Record]) -> Grid | None:
    """The loss after the last task on streams of texts: methods × tasks, or None."""
    rows = by_kind(summarise_rows(records))
    last = {
        row.id: np.array([_after_last(record.row(row.id)) for record in records], dtype=np.float64)
        for row in rows
        if all(record.row(row.id).loss for record in records)
    }
    if not last:
        return None
    tasks = task_labels(records)
    places = range(len(tasks)) if len(tasks) <= MOST_TASK_COLUMNS else range(0)

    def shown(summary: Summary | None) -> str:
        return _cell(summary, lambda value: f"{value:.3f}")

    # Adapters of a collection were not learned one after another.
    in_time = any("loss.forgetting" in row.metrics for row in rows)
    body = [
        (
            label(row),
            *(shown(_over_seeds(last[row.id][:, place])) for place in places),
            shown(row.metrics.get("loss.final")),
            *((shown(row.metrics.get("loss.forgetting")),) if in_time else ()),
        )
        for row in rows
        if row.id in last
    ]
    rows_of_all = [row for record in records for row in record.metrics.rows]
    cut = {
        name: max(getattr(row, f"cut_{name}") or 0 for row in rows_of_all)
        for name in ("prompts", "answers")
    }
    return Grid(
        title=f"Loss{' after the last task' if in_time else ''}, nats per answer token "
        f"({_about(records)})",
        header=(
            *("method", *(tasks[place] for place in places), "mean ↓"),
            *(("forgetting ↓",) if in_time else ()),
        ),
        rows=tuple(body),
        notes=tuple(
            f"{count} test {name} were longer than text.{name[:-1]}_tokens, and cut."
            for name, count in cut.items()
            if count
        ),
    )


def _after_last(row: Row) -> tuple[float | None, ...]:
    """The losses after the last task that was learned; those of nothing where none was measured."""
    known = (line for line in reversed(row.loss) if any(loss is not None for loss in line))
    return next(known, row.loss[-1])


def main_row(rows: Sequence[RowSummary]) -> RowSummary:
    """The first method, or the first row when there is no method."""
    return next((row for row in rows if row.kind == "method"), rows[0])


def _columns(grid: Grid) -> list[list[str]]:
    return [[name, *(row[j] for row in grid.rows)] for j, name in enumerate(grid.header)]


def _natural_widths(grid: Grid) -> list[int]:
    return [max(map(len, column)) for column in _columns(grid)]


def _least_widths(grid: Grid) -> list[int]:
    """Names of rows may wrap, and headers between words; no number is broken."""
    names, *numbers = _columns(grid)
    return [
        min(max(map(len, names)), 18),
        *(max(map(len, [*column[0].split(" "), *column[1:]])) for column in numbers),
    ]


def to_rich(grid: Grid, width: int | None = None) -> Table:
    """The grid as a rich table; cells are taken literally, never as markup.

    When its lines are longer than `width`, headers and the names of rows wrap.
    """
    grid = grid.printable
    widths = _natural_widths(grid)
    if width is not None and sum(widths) + GAP * len(widths) > width:
        least = _least_widths(grid)
        spare = max(width - sum(least) - GAP * len(least), 0)
        widths = [min(least[0] + spare, widths[0]), *least[1:]]
    table = Table(
        title=Text(grid.title, style="bold") if grid.title else None,
        title_justify="left",
        caption=Text("\n".join(grid.notes)) if grid.notes else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for number, (name, columns) in enumerate(zip(grid.header, widths, strict=True)):
        table.add_column(
            Text(name), justify="right" if number else "left", width=columns, overflow="fold"
        )
    for i, row in enumerate(grid.rows):
        table.add_row(
            *(
                Text(cell, style="bold" if (i, j) in grid.bold else "")
                for j, cell in enumerate(row)
            ),
            end_section=i + 1 in grid.rules,
        )
    return table


def cut_to_width(grid: Grid, width: int) -> list[Grid]:
    """The grid cut between columns into grids that fit the width, the names in each of them."""
    names, *widths = (least + GAP for least in _least_widths(grid))
    groups: list[list[int]] = [[]]
    room = width - names
    for column, needed in enumerate(widths, start=1):
        if needed > room and groups[-1]:
            groups.append([])
            room = width - names
        groups[-1].append(column)
        room -= needed
    return [
        replace(
            grid,
            title=grid.title if group is groups[0] else "",
            header=tuple(grid.header[j] for j in (0, *group)),
            rows=tuple(tuple(row[j] for j in (0, *group)) for row in grid.rows),
            bold=frozenset((i, 1 + group.index(j)) for i, j in grid.bold if j in group),
            notes=grid.notes if group is groups[-1] else (),
        )
        for group in groups
    ]


def plain_text(grid: Grid) -> str:
    """The grid as aligned text without colour or boxes; `*` marks what rich shows bold."""
    grid = grid.printable
    marked = [
        [f"{cell}*" if (i, j) in grid.bold else f"{cell} " for j, cell in enumerate(row)]
        for i, row in enumerate(grid.rows)
    ]
    lines = [[f"{name} " for name in grid.header], *marked]
    widths = [max(len(line[column]) for line in lines) for column in range(len(grid.header))]
    text = [grid.title]
    for i, line in enumerate(lines):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        if i - 1 in grid.rules:
            text.append("")
        text.append("  ".join(cells).rstrip())
    if grid.bold:
        text += ["", f"* {HOW}"]
    return "\n".join([*text, *grid.notes]) + "\n"


def show(grid: Grid, console: Console | None = None) -> None:
    """Print the grid: a rich table in a terminal (cut to its width), plain text elsewhere."""
    console = console or Console()
    if console.is_terminal:
        for part in cut_to_width(grid.printable, console.width):
            console.print(to_rich(part, console.width))
    else:
        console.print(
            plain_text(grid), markup=False, highlight=False, emoji=False, soft_wrap=True, end=""
        )
