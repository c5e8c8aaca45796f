"""The report of one experiment as a single HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from pydantic import JsonValue

from memtool.atomic import write_atomic
from memtool.evaluation.metrics import METRICS
from memtool.evaluation.record import Record
from memtool.evaluation.summary import RowSummary, summarise_rows
from memtool.reports import figures
from memtool.reports.best import HOW
from memtool.reports.chosen import bounds_grid, selection_grid
from memtool.reports.page import Picture, templates
from memtool.reports.shown import CoefficientMap, KeyMap, SampleCoefficientMap
from memtool.reports.table import (
    MISSING,
    Grid,
    atom_uses,
    atoms_grid,
    by_kind,
    drift_grid,
    held_out,
    leading,
    losses_grid,
    main_row,
    methods_grid,
    metrics_grid,
    negative_grid,
    paired_grid,
    percent,
    recall_grid,
    samples_text,
    seconds_text,
    task_labels,
    tasks_grid,
)

MOST_CURVES = 12  # more lines than that hide each other
THIN_SPACE = "\u2009"


@dataclass(frozen=True)
class Cost:
    """What one part of the run cost; None where it was not measured."""

    label: str
    seconds: float | None = None
    parameters: int | None = None
    bytes: int | None = None


def write_report(
    records: Record | Sequence[Record],
    path: Path,
    *,
    coefficients: CoefficientMap | None = None,
    samples: SampleCoefficientMap | None = None,
    keys: KeyMap | None = None,
    costs: Sequence[Cost] = (),
) -> Path:
    """Write the report of one record, or of several that differ by seed only; returns `path`.

    The bytes follow from the arguments alone. Parts that are not given are left out. MismatchError
    for records of different experiments, MemtoolError when the file cannot be written.
    """
    several = (records,) if isinstance(records, Record) else tuple(records)
    text = render(several, coefficients=coefficients, samples=samples, keys=keys, costs=costs)
    return write_atomic(path, text)


def render(
    records: Sequence[Record],
    *,
    coefficients: CoefficientMap | None = None,
    samples: SampleCoefficientMap | None = None,
    keys: KeyMap | None = None,
    costs: Sequence[Cost] = (),
) -> str:
    """The HTML of `write_report` as text."""
    rows = by_kind(summarise_rows(records))
    metrics = metrics_grid(records)
    recall = recall_grid(records)
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            run=records[0].run,
            environment=records[0].environment,
            seeds=[record.run.seed for record in records],
            summary=summary_sentence(rows, records),
            methods=methods_grid(records),
            bold=HOW,
            selection=selection_grid(records),
            bounds=bounds_grid(records),
            metrics=metrics,
            recall=recall,
            losses=losses_grid(records),
            descriptions=_descriptions(metrics),
            held_out=held_out(records),
            tasks=tasks_grid(records),
            accuracy=_accuracy(rows, records),
            paired=paired_grid(records),
            negative=negative_grid(records),
            drift=drift_grid(records),
            atoms=atoms_grid(records),
            reuse=_reuse(records),
            coefficients=_coefficients(coefficients, samples),
            keys=_keys(keys),
            costs=_cost_grid(costs),
            orders=_orders(records),
            configuration=flatten(records[0].run.configuration),
            provenance=_provenance(records),
        )
    )


def summary_sentence(rows: Sequence[RowSummary], records: Sequence[Record]) -> str:
    """What came out, in plain words: the method beside its best baseline and its upper bound."""
    run, method = records[0].run, main_row(rows)
    kind = "held-out domain" if held_out(records) else "task"
    tasks = f"{len(run.tasks)} {kind}{'s' if len(run.tasks) > 1 else ''}"
    own = method.metrics.get("faa")
    if own is None:
        return f"{method.label} was evaluated on {tasks} of {run.data.name} ({run.setting})."
    begin, average = ("On", "an") if held_out(records) else ("After", "a final")
    text = (
        f"{begin} {tasks} of {run.data.name} ({run.setting}), {method.label} has {average} average "
        f"accuracy of {percent(own.mean)} %"
    )
    bounds = own.interval(0.0, 1.0)
    if bounds is not None:
        low, high = map(percent, bounds)
        text += f" ({own.n} seeds, 95 % t-interval {low} to {high} %)"
    rest = [row for row in rows if row is not method and "faa" in row.metrics]
    others: list[str] = []
    for kind, words in (("baseline", "the best baseline"), ("upper bound", "the upper bound")):
        known = [row for row in rest if row.kind == kind]
        if known:
            best = max(known, key=lambda row: row.metrics["faa"].mean)
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


def _accuracy(rows: Sequence[RowSummary], records: Sequence[Record]) -> list[Picture]:
    tasks = task_labels(records)
    counts = samples_text(records)
    samples = f" {counts}." if counts else ""
    if held_out(records):
        caption = "Accuracy of every method on each held-out domain, in percent"
        over = ("; mean over the seeds." if len(records) > 1 else ".") + samples
        return [Picture(Markup(figures.heldout_map(rows, tasks)), caption + over)]
    drawn = leading(rows, records, MOST_CURVES)
    pictures = [
        Picture(
            Markup(figures.accuracy_curves(drawn, tasks)),
            "Mean accuracy on the tasks seen so far, after each task."
            + (f" The leading {len(drawn)} of {len(rows)} methods." if drawn != rows else "")
            + (
                " Bands: one sample standard deviation over the seeds."
                if len(rows[0].accuracy) > 1
                else ""
            )
            + samples,
        )
    ]
    if any(row.recall_error is not None for row in rows):
        pictures.append(
            Picture(
                Markup(figures.recall_error_curves(rows, tasks)),
                "Mean relative error of all recalled adapters, by the number of tasks in memory.",
            )
        )
    methods = [row for row in rows if row.kind == "method"] or [main_row(rows)]
    for number, row in enumerate(methods):
        blank = " Blank cells were not measured." if _has_blanks(row) else ""
        pictures.append(
            Picture(
                Markup(figures.accuracy_map(row.mean, tasks, name=f"accuracy{number}")),
                f"{row.label}: accuracy on every task (columns) after each task (rows), in "
                f"percent.{blank}{samples}",
            )
        )
        if len(tasks) > 1 and figures.measured_steps(row) > 1:
            pictures.append(
                Picture(
                    Markup(figures.task_curves(row, tasks, name=f"forgetting{number}")),
                    f"{row.label}: accuracy on every task from when it was learned on; a line that "
                    f"falls is a task that is forgotten.{samples}",
                )
            )
    return pictures


def _has_blanks(row: RowSummary) -> bool:
    return bool((row.mean[1:] != row.mean[1:]).any())


def _coefficients(
    coefficients: CoefficientMap | None, samples: SampleCoefficientMap | None
) -> list[Picture]:
    pictures = []
    if samples is not None:
        pictures.append(
            Picture(
                Markup(figures.sample_map(samples)),
                f"Coefficient of every adapter (rows) for {count(len(samples.domains))} samples "
                "(columns), by their true domain.",
            )
        )
    if coefficients is None:
        return pictures
    over = f", mean over {len(coefficients.blocks)} blocks" if coefficients.blocks else ""
    pictures.append(
        Picture(
            Markup(figures.coefficient_map(coefficients)),
            f"Mean coefficient of each adapter by the true task of the sample{over}.",
        )
    )
    if len(coefficients.blocks) > 1:
        pictures.append(
            Picture(
                Markup(figures.coefficient_blocks(coefficients)),
                "The same for every block, tasks and adapters in the same order.",
            )
        )
    return pictures


def _reuse(records: Sequence[Record]) -> list[Picture]:
    uses = atom_uses(records)
    if not uses:
        return []
    shares = np.mean([use.reuse for use in uses], axis=0)
    return [
        Picture(
            Markup(figures.reuse_map(shares, task_labels(records)[: len(shares)])),
            "The gate's weight on the atoms of each task (columns) for tests of each task "
            "(rows), all tasks in the bank. Left of the diagonal: atoms of earlier tasks that "
            "later ones use.",
        )
    ]


def _keys(keys: KeyMap | None) -> list[Picture]:
    if keys is None:
        return []
    return [
        Picture(
            Markup(figures.key_map(keys)), "Cosine similarity of the keys of every two adapters."
        )
    ]


def _cost_grid(costs: Sequence[Cost]) -> Grid | None:
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


def _descriptions(metrics: Grid) -> list[tuple[str, str, str]]:
    ids = [row[0].split(" ")[0] for row in metrics.rows]
    return [(id, METRICS[id].direction, METRICS[id].description) for id in ids]


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
        ("wall time", duration(sum(r.environment.wall_seconds for r in records))),
        ("peak memory", size(max(known)) if known else None),
        ("platform", environment.platform),
        ("python", environment.python),
        ("packages", ", ".join(f"{name} {v}" for name, v in environment.packages.items())),
    ]
    return [(name, value) for name, value in pairs if value]
