"""Task after task: what a learner is after each of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from memtool.evaluation.record import Row
from memtool.learning.learner import Learner
from memtool.methods.baselines.testing import measured_by
from memtool.streams.task import Task
from memtool.workspace import Workspace


def in_turn(kind: type[Learner], work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """Learn task after task; rows with the whole matrix, a row for every way to read features.

    Seconds are those of learning and of counting features, without the testing.
    """
    learner = kind(work, len(tasks))
    testing = measured_by(learner, tasks)
    testing.before()
    seconds = 0.0
    for number, task in enumerate(tasks, start=1):
        begin = time.perf_counter()
        learner.learn(task, f"task {number}/{len(tasks)} {task.name}: baseline, {kind.title}")
        testing.count(task)
        seconds += time.perf_counter() - begin
        testing.after(number)
    return testing.rows(seconds)
