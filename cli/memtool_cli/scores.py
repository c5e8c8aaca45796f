"""Evaluation records as tables, and as the one number of -q."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from memtool.evaluation.record import Record
    from memtool.reports.table import Grid
    from memtool_cli.output import Out


def show(
    out: Out,
    records: Sequence[Record],
    *,
    history: bool = False,
    report: Path | None = None,
) -> float:
    """Print records of one experiment, one a seed, and write their page; the final average."""
    average = final_average(records)
    out.data(records, *grids(records, history=history), ids=[f"{average:.4f}"])
    if report is not None:
        from memtool.reports.html import write_report

        out.note(f"report: {write_report(records, report)}")
    return average


def grids(records: Sequence[Record], *, history: bool = False) -> list[Grid]:
    """Methods by tasks after the last one; with `history` the method after every task, too.

    Of several seeds also the tasks with their confidence intervals; of several rows also their
    differences on the same test samples; where adapters were recalled, also what that cost.
    """
    from memtool.reports.chosen import bounds_grid, selection_grid
    from memtool.reports.table import (
        atoms_grid,
        losses_grid,
        methods_grid,
        metrics_grid,
        paired_grid,
        recall_grid,
        steps_grid,
        tasks_grid,
        unseen_grid,
    )

    losses, atoms = losses_grid(records), atoms_grid(records)
    tried = selection_grid(records)
    if losses is not None and not _scored(records):
        return [grid for grid in (losses, tried, atoms) if grid is not None]
    shown = [methods_grid(records)]
    if len(records) > 1:
        shown.append(tasks_grid(records))
    shown += [grid for grid in (bounds_grid(records), tried) if grid is not None]
    unseen = unseen_grid(records)
    if unseen is not None:
        shown.append(unseen)
    pairs = paired_grid(records)
    if pairs is not None:
        shown.append(pairs)
    if losses is not None:
        shown.append(losses)
    elif history:
        shown.append(steps_grid(records))
    recalled = recall_grid(records)
    chain = records[0].run.setting == "xtail"
    if history or chain or recalled is not None or losses is not None:
        shown.append(metrics_grid(records))
    shown += [grid for grid in (recalled, atoms) if grid is not None]
    return shown


def final_average(records: Sequence[Record]) -> float:
    """Accuracy of the method after its last task, mean over the measured tasks and the seeds.

    On a stream of texts without generated answers, the loss.
    """
    return mean(_final_average(record) for record in records)


def _final_average(record: Record) -> float:
    rows = record.metrics.rows
    method = next((row for row in rows if row.kind == "method"), rows[0])
    if method.loss and not _scored([record]):
        return method.metrics["loss.final"]
    measured = [[score for score in line if score is not None] for line in method.accuracy]
    return mean(next(line for line in reversed(measured) if line))


def _scored(records: Sequence[Record]) -> bool:
    """Whether there is an accuracy anywhere: not where only losses were measured."""
    rows = [row for record in records for row in record.metrics.rows]
    return any(score is not None for row in rows for line in row.accuracy for score in line)
