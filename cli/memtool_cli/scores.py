"""Evaluation records as tables, and as the one number of -q."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memtool.evaluation.record import Record
    from memtool.reports.table import Grid


def grids(records: Sequence[Record], *, history: bool = False) -> list[Grid]:
    """Methods by tasks after the last one; with `history` the method after every task, too.

    Where adapters were recalled, also what recalling them cost.
    """
    from memtool.reports.table import methods_grid, metrics_grid, recall_grid, steps_grid

    shown = [methods_grid(records)]
    if history:
        shown.append(steps_grid(records))
    recalled = recall_grid(records)
    if history or recalled is not None:
        shown.append(metrics_grid(records))
    if recalled is not None:
        shown.append(recalled)
    return shown


def final_average(records: Sequence[Record]) -> float:
    """Accuracy of the method after its last task, mean over the measured tasks and the seeds."""
    return mean(_final_average(record) for record in records)


def _final_average(record: Record) -> float:
    rows = record.metrics.rows
    method = next((row for row in rows if row.kind == "method"), rows[0])
    return mean(score for score in method.accuracy[-1] if score is not None)
