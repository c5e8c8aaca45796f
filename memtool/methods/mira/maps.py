"""What a report shows of a memory: who recalls what, and how alike the keys are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from memtool.evaluation.inside import Inside, Keys
from memtool.methods.inside import recalled
from memtool.methods.mira.measure import Measure
from memtool.methods.mira.state import Snapshot
from memtool.methods.subject import SUBJECT_SAMPLES
from memtool.streams.task import Task, spread

if TYPE_CHECKING:
    from memtool.methods.mira.method import Mira


def weight_map(mira: Mira, tasks: Sequence[Task], version: str) -> Inside:
    """The weights that the tasks' test images recall, by true task and memory, and examples."""
    snapshot = mira.snapshot(version)
    state, model, head = snapshot.consolidated()
    measure = Measure(mira.workspace)
    samples = [spread(task.test, SUBJECT_SAMPLES["images"]) for task in tasks]
    found = [measure.recall(model, head, some.images) for some in samples]
    return recalled(
        tasks,
        samples,
        [weights for _, weights in found],
        [record.name for record in snapshot.records],
        blocks=model.memory.blocks,
        chances=[head.probabilities(scores) for scores, _ in found],
        class_names=state.class_names,
    )


def key_map(snapshot: Snapshot) -> Keys | None:
    """Cosine of every pair of keys; of the mean of its keys where an adapter has several."""
    keys = snapshot.view.keys()
    if keys is not None and snapshot.model is not None:
        memory = snapshot.model.memory
        width = memory[memory.blocks[0]].query.width
        keys = keys.reshape(*keys.shape[:2], -1, width).mean(axis=2)
    if keys is None or not np.linalg.norm(keys, axis=-1).all():
        return None  # the key of a single task has no direction
    return Keys.of(keys, tuple(record.name for record in snapshot.records))
