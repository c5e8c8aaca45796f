"""Joint training: one LoRA on the samples of all tasks at once. An upper bound, not a baseline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from memtool.evaluation.record import Kind, Row
from memtool.learning.learner import Learner
from memtool.methods.baselines.reading import Reading, random_reading
from memtool.methods.baselines.testing import measured_by
from memtool.streams.task import Task
from memtool.workspace import Workspace


class Joint(Learner):
    """One LoRA that sees everything."""

    id: ClassVar[str] = "joint"
    title: ClassVar[str] = "joint LoRA"
    kind: ClassVar[Kind] = "upper bound"


def joint(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """The last line only: there is no model before all tasks were learned."""
    begin = time.perf_counter()
    learner = Joint(work, 1)
    learner.learn(Task.pooled(tasks), f"all tasks: upper bound, {Joint.title}")
    own: Reading = "fixed" if learner.objective.is_fixed else "linear"
    testing = measured_by(learner, tasks, (own, "lda", *random_reading(work)))
    for task in tasks:
        testing.count(task)
    seconds = time.perf_counter() - begin
    testing.after(len(tasks))
    return testing.rows(seconds)
