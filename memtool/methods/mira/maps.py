"""The pictures of a memory in a report: who recalls what, and how alike the keys are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from memtool.methods.mira.measure import Measure
from memtool.methods.mira.state import Snapshot
from memtool.methods.subject import SUBJECT_SAMPLES
from memtool.reports.shown import CoefficientMap, KeyMap, SampleCoefficientMap
from memtool.streams.task import Task, spread

if TYPE_CHECKING:
    from memtool.methods.mira.method import Mira


def coefficient_maps(
    mira: Mira, tasks: Sequence[Task]
) -> tuple[CoefficientMap, SampleCoefficientMap]:
    """The coefficients of the tasks' test images: means by true task and memory, and one by one."""
    snapshot = mira.snapshot()
    _, model, head = snapshot.consolidated()
    measure = Measure(mira.workspace)
    found = [
        measure.recall(model, head, spread(task.test, SUBJECT_SAMPLES["images"]).images)[1].double()
        for task in tasks
    ]
    names = tuple(record.name for record in snapshot.records)
    by_task = torch.stack([coefficients.mean(dim=0) for coefficients in found], dim=1)
    shown = CoefficientMap(
        by_task.numpy(), tuple(task.name for task in tasks), names, model.memory.blocks
    )
    each = torch.cat([coefficients.mean(dim=1) for coefficients in found])
    owners = [task.name for task, many in zip(tasks, found, strict=True) for _ in range(len(many))]
    return shown, SampleCoefficientMap(each.numpy(), tuple(owners), names)


def key_map(snapshot: Snapshot) -> KeyMap | None:
    """Cosine of every pair of keys; of the mean of its keys where an adapter has several."""
    keys = snapshot.view.keys()
    if keys is not None and snapshot.model is not None:
        memory = snapshot.model.memory
        width = memory[memory.blocks[0]].query.width
        keys = keys.reshape(*keys.shape[:2], -1, width).mean(axis=2)
    if keys is None or not np.linalg.norm(keys, axis=-1).all():
        return None  # the key of a single task has no direction
    return KeyMap.of_keys(keys, tuple(record.name for record in snapshot.records))
