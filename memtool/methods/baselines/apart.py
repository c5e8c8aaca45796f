"""An adapter of its own for every task, each kept as its training left it.

Which one an image needs is not known, so features are taken under several of them. What is scored
is a class as one task knows it (a cell): in cil the same as a class, in dil a class has one cell
for each of its domains, and the highest of them counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from memtool.adapters.recalls import every
from memtool.heads import LinearClassifier
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.methods.baselines.aligned import Gaussian, aligned, gaussians
from memtool.methods.baselines.refused import require_own_head
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace


class Apart(Learner, ABC):
    """`kept` are the flat values (numel,) of the tasks so far.

    `cell_task` and `cell_class` (cells,) say which task, from 0, and which class a cell is of.
    """

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        require_own_head(work, self.id)
        super().__init__(work, tasks, objective)

    def begin(self) -> None:
        """The first adapter; nothing is kept yet."""
        super().begin()
        self.kept: list[Tensor] = []
        self.cell_task = torch.empty(0, dtype=torch.int64)
        self.cell_class = torch.empty(0, dtype=torch.int64)
        self._tested: dict[tuple[int, int], Tensor] = {}

    def before_task(self, task: Task) -> None:
        """A fresh adapter, and a head at zero."""
        del task
        if self.seen:
            self.values = self.fresh(1)
            with torch.no_grad():
                for parameter in self.objective.head.parameters():
                    parameter.zero_()

    def after_task(self, task: Task) -> None:
        """Keep the adapter, and count the task's classes as cells."""
        self.kept.append(self.values.flat()[0])
        classes = torch.from_numpy(np.unique(task.train.labels))
        place = torch.full_like(classes, len(self.kept) - 1)
        self.cell_task = torch.cat([self.cell_task, place])
        self.cell_class = torch.cat([self.cell_class, classes])

    def features_under(self, value: Tensor, samples: Images) -> Tensor:
        """Features (n, dim) of images under an adapter of flat value (numel,), on the CPU."""
        return self.work.features(samples.images, every(self.work.stacked(value[None])))

    def test_features(self, task: Task) -> Tensor:
        """Features (t, n, dim) of a task's test images under each kept adapter; each taken once."""
        for place, value in enumerate(self.kept):
            key = (task.number, place)
            if key not in self._tested:
                self._tested[key] = self.features_under(value, task.test)
        return torch.stack([self._tested[task.number, i] for i in range(len(self.kept))])

    def of_classes(self, scores: Tensor) -> Tensor:
        """Scores (n, classes) from those of cells (n, cells): the highest; −inf for none."""
        found = scores.new_full((len(scores), len(self.work.stream.class_names)), -torch.inf)
        index = self.cell_class.expand(len(scores), -1)
        return found.scatter_reduce(1, index, scores, "amax")

    @abstractmethod
    def scores(self, task: Task) -> Tensor:
        """Scores (n, classes) of a task's test images as the model is now; the highest wins."""


class ApartWithHeads(Apart, ABC):
    """Every task also keeps the head that it trained; one alignment makes them comparable.

    `head` has a row for every cell. Adapters all start at the same random A and B = 0, so that
    their numbers mean the same and can be averaged or merged one by one.
    """

    alignment_epochs: ClassVar[int] = 5
    alignment_lr: ClassVar[float] = 0.01
    temperature: ClassVar[float | None] = 0.1
    first_alignment: ClassVar[int] = 1
    """How many tasks there are when heads are first aligned."""

    def begin(self) -> None:
        """The first adapter, whose start is that of all."""
        super().begin()
        self.start = self.values.flat()
        self.head = LinearClassifier(torch.empty(0, self.work.backbone.dim), torch.empty(0))
        self.known: list[Gaussian] = []

    def before_task(self, task: Task) -> None:
        """As above, from the common start."""
        super().before_task(task)
        if self.seen:
            self.values = self.work.stacked(self.start, trainable=True)

    def after_task(self, task: Task) -> None:
        """Keep the head and the Gaussians of the task's classes, and align all heads."""
        super().after_task(task)
        labels = torch.from_numpy(np.asarray(task.train.labels))
        classes = labels.unique()
        learned = self.objective.classifier().to("cpu")
        self.head = LinearClassifier(
            torch.cat([self.head.weight, learned.weight[classes]]),
            torch.cat([self.head.bias, learned.bias[classes]]),
        )
        own = self.features_under(self.kept[-1], task.train)
        self.known += gaussians(own, labels, classes.tolist())
        if self.alignment_epochs and len(self.kept) >= self.first_alignment:
            self.head = aligned(
                self.head,
                self.known,
                range(len(self.known)),
                epochs=self.alignment_epochs,
                lr=self.alignment_lr,
                temperature=self.temperature,
                generator=self.work.engine.generator(self.work.training_seed(task.number)),
                tasks=self.cell_task.tolist(),
            )
