"""Joint training: one LoRA on the samples of all tasks at once. An upper bound, not a baseline.

Where the memory learns its tasks at once, too (setting mtl), it is a rival on its terms: as many
numbers as all adapters of the memory together, T · J times their rank, at the same alpha / r.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import ClassVar

from memtool.evaluation.record import Kind, Row
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.methods.baselines.reading import Reading, random_reading
from memtool.methods.baselines.testing import measured_by
from memtool.streams.task import Task
from memtool.workspace import Workspace


class Joint(Learner):
    """One LoRA that sees everything."""

    id: ClassVar[str] = "joint"
    title: ClassVar[str] = "joint LoRA"
    kind: ClassVar[Kind] = "upper bound"


class Wide(Learner):
    """One LoRA with the parameters of all adapters of a memory."""

    id: ClassVar[str] = "joint"

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        rank, of_each = joint_rank(work), work.config.adapter.rank
        super().__init__(_of_rank(work, rank), tasks, objective)
        self.label = f"joint LoRA of rank {rank} ({rank // of_each} x {of_each})"


def joint_rank(work: Workspace) -> int:
    """The rank of the LoRA that learns all tasks at once."""
    adapter = work.config.adapter
    if work.config.stream.setting != "mtl":
        return adapter.rank
    return adapter.rank * adapter.per_task * len(work.stream.tasks)


def _of_rank(work: Workspace, rank: int) -> Workspace:
    """The same parts with adapters of another rank and the same alpha / r."""
    _ = work.stream, work.backbone, work.engine  # opened once, for both
    other = copy.copy(work)
    other.__dict__.pop("layout", None)
    adapter = work.config.adapter.model_copy(update={"rank": rank, "alpha": work.scaling * rank})
    other.config = work.config.model_copy(update={"adapter": adapter})
    return other


def joint(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """The last line only: there is no model before all tasks were learned."""
    return at_once(Joint, 1, work, tasks)


def at_once(
    kind: type[Learner], adapters: int, work: Workspace, tasks: Sequence[Task]
) -> list[Row]:
    """A learner on the samples of all tasks, with so many adapters; the last line of its rows."""
    begin = time.perf_counter()
    learner = kind(work, adapters)
    what = "baseline" if kind.kind == "baseline" else "upper bound"
    learner.learn(Task.pooled(tasks), f"all tasks: {what}, {learner.label}")
    own: Reading = "fixed" if learner.objective.is_fixed else "linear"
    testing = measured_by(learner, tasks, (own, "lda", *random_reading(work)))
    for task in tasks:
        testing.count(task)
    seconds = time.perf_counter() - begin
    testing.after(len(tasks))
    return testing.rows(seconds)
