"""The adapters of one version of the store, which the memories are asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import memtool_stores
from memtool.errors import NotFoundError
from memtool.heads import LinearClassifier
from memtool.methods.in_store import classifier_of
from memtool.methods.records import own_head_blob, task_of
from memtool.streams.task import Task
from memtool.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Stored:
    """The adapters of one version, one a task, in the order written.

    `tasks` are task numbers, `values` (t, numel) float32 as stored, `scaling` (t,), `heads` the
    classifier that was trained with each, none of texts.
    """

    version: str
    view: memtool_stores.MemoryView
    records: tuple[memtool_stores.AdapterRecord, ...]
    tasks: tuple[int, ...]
    values: Tensor
    scaling: Tensor
    heads: tuple[LinearClassifier, ...]

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def read(cls, work: Workspace, version: str) -> Stored:
        """Those of a version; the stream is not opened.

        Raises NotFoundError for an empty memory, or of images an adapter without a head.
        """
        view = work.store.view(work.version_of(version))
        records = view.adapters
        if not records:
            raise NotFoundError(
                f"the memory {work.store_path!r} holds no adapters at version {view.version}",
                remedy="memtool train-adapter --task 1 && memtool write",
            )
        return cls(
            version=view.version,
            view=view,
            records=records,
            tasks=tuple(task_of(record) for record in records),
            values=torch.from_numpy(view.values().copy()),
            scaling=torch.tensor([record.scaling for record in records], dtype=torch.float32),
            heads=tuple(_head(view, record.name) for record in records if work.reads == "images"),
        )

    def place(self, task: Task) -> int:
        """Which of the adapters is that of a task. Raises NotFoundError where none is."""
        if task.number not in self.tasks:
            raise NotFoundError(
                f"no adapter of task {task.number} at version {self.version}",
                expected=f"one of the tasks in memory: {', '.join(map(str, self.tasks))}",
                remedy=f"memtool train-adapter --task {task.number} && memtool write",
            )
        return self.tasks.index(task.number)

    def only(self, place: int) -> Stored:
        """The same with one adapter."""
        one = slice(place, place + 1)  # also of heads where there are none
        return replace(
            self,
            records=self.records[one],
            tasks=self.tasks[one],
            values=self.values[one],
            scaling=self.scaling[one],
            heads=self.heads[one],
        )


def _head(view: memtool_stores.MemoryView, adapter: str) -> LinearClassifier:
    name = own_head_blob(adapter)
    if not view.has_blob(name):
        raise NotFoundError(
            f"adapter {adapter!r} came without a trained head",
            remedy="an adapter made by memtool train-adapter",
        )
    return classifier_of(view.blob(name), f"blob {name!r}")
