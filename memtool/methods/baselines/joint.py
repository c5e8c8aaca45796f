"""Joint training: one LoRA on the images of all tasks at once. An upper bound, not a baseline."""

from __future__ import annotations

import time
from collections.abc import Sequence

from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Row
from memtool.methods.baselines.learner import Learner, pooled
from memtool.methods.baselines.reading import TITLES, ClosedForms, Reading, accuracies
from memtool.methods.fixed_head import is_fixed
from memtool.methods.workspace import Workspace
from memtool.streams.task import Task

_READINGS: tuple[Reading, ...] = ("linear", "lda")  # linear: the head trained along, or fixed


def joint(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """The last row of the matrix only: there is no model before all tasks were learned."""
    begin = time.perf_counter()
    learner = Learner(work, 1)
    learner.learn(pooled(tasks), "all tasks: upper bound, joint LoRA")
    closed = ClosedForms(work, len(tasks))
    for task in tasks:
        closed.count(learner.features_of(task.train), task)
    seconds = time.perf_counter() - begin
    samples = [task.test for task in tasks]
    test = [learner.features_of(each) for each in samples]
    fixed = is_fixed(work.config)
    rows = []
    for reading in _READINGS:
        predict = learner.linear() if reading == "linear" else closed.solve(reading)
        matrix = AccuracyMatrix.empty([task.name for task in tasks])
        rows.append(
            Row.measured(
                "joint" if reading == "linear" else f"joint-{reading}",
                f"joint LoRA, {TITLES['fixed' if fixed and reading == 'linear' else reading]}",
                "upper bound",
                matrix.with_row(len(tasks), accuracies(predict, test, samples)),
                seconds=seconds,
            )
        )
    return rows
