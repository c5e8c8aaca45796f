"""Scores after each task: on all tasks, and on a domain that nothing is learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Kind, Row
from memtool.streams.task import Task


class Course:
    """What becomes a row. `tested` are the tasks, and behind them the unseen one where it is."""

    def __init__(self, tasks: Sequence[Task], unseen: Task | None) -> None:
        self.tested: list[Task] = [*tasks, *([] if unseen is None else [unseen])]
        self.matrix = AccuracyMatrix.empty([task.name for task in tasks])
        self._unseen: list[float | None] = [] if unseen is None else [None] * (len(tasks) + 1)

    def add(self, number: int, scores: Sequence[float | None]) -> None:
        """The scores on `tested` after `number` tasks (0: before any)."""
        count = len(self.matrix.tasks)
        self.matrix = self.matrix.with_row(number, scores[:count])
        if self._unseen:
            self._unseen[number] = scores[count]

    def row(self, id: str, label: str, kind: Kind, **about: Any) -> Row:
        """The row of the table; `about` as in `Row.measured`."""
        measured = any(score is not None for score in self._unseen)
        unseen = self._unseen if measured else ()
        return Row.measured(id, label, kind, self.matrix, unseen=unseen, **about)
