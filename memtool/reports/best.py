"""Which row of a column is the best, and whether that holds against the next one."""

from __future__ import annotations

from collections.abc import Sequence

from memtool.evaluation.paired import paired
from memtool.evaluation.record import Record
from memtool.evaluation.summary import RowSummary, Summary

HOW = (
    "better than the next row on the same test samples: paired bootstrap and McNemar's exact test, "
    "each at 5 %; upper bounds, replay and other readings of the memory aside"
)
"""What bold says."""

UNTESTED = "No row is bold: of the two best it is not known which test samples they had right."


def best(
    records: Sequence[Record],
    rows: Sequence[RowSummary],
    summaries: Sequence[Summary | None],
    *,
    task: int | None = None,
) -> set[int]:
    """The number of the best row of those that are ranked; none where it may be luck.

    `summaries` are the accuracies of the rows, higher is better: means over all tasks, or those on
    the task at a place.
    """
    first = _ranked(rows, summaries)[:2]
    if len(first) < 2:
        return set()
    ids = [rows[number].id for number in first]
    found = paired(records, ids[0], ids[1], task=task)
    return {first[0]} if found is not None and found.holds else set()


def untested(
    records: Sequence[Record], rows: Sequence[RowSummary], summaries: Sequence[Summary | None]
) -> bool:
    """Whether the two best rows cannot be compared sample by sample."""
    ids = [rows[number].id for number in _ranked(rows, summaries)[:2]]
    return len(ids) == 2 and paired(records, ids[0], ids[1]) is None


def _ranked(rows: Sequence[RowSummary], summaries: Sequence[Summary | None]) -> list[int]:
    """Numbers of the rows that have a value and are ranked, the best first.

    Not ranked are upper bounds, replay, and other readings of the memory.
    """
    values = {
        number: summary.mean
        for number, (summary, row) in enumerate(zip(summaries, rows, strict=True))
        if summary is not None and (row.is_rival or (row.kind == "method" and not row.reading))
    }
    return sorted(values, key=lambda number: -values[number])
