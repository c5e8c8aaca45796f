"""SLCA: all weights learn slowly, the head fast, and the head is aligned after every task.

The head's rate is the stream's, that of pre-trained weights a hundredth of it: what is pre-trained
hardly forgets. From the second task on the head learns once more from draws of every class's
Gaussian (`aligned.py`); training goes on from the head before that. Source: Zhang et al. 2023.

As published (ViT-B/16): ratio of rates 0.01 (1e-4 to 1e-2), 256 draws a class, 5 epochs of SGD at
0.01 (3 in the toolbox PILOT), normalised logits at τ = 0.1; a task's own classes only are compared
while it learns. As in the code: sizes of logits are means over tasks, and means of a class of task
t of T are drawn at (0.9 + 0.1 t / T) of their length. Ours: epochs, batch, rate of the head and
AdamW are the stream's, as for all baselines (published: 20 epochs of SGD). In dil every class has a
Gaussian for each of its domains, and its row is of the first. The Gaussians are of the features of
then. The alignment beside PILOT's on the same features and heads: `python -m benchmarks rivals
--pilot PATH`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from memtool.heads import LinearClassifier
from memtool.learning.objective import Objective
from memtool.methods.baselines.aligned import Gaussian, aligned, gaussians
from memtool.methods.baselines.fine_tune import FineTune
from memtool.methods.baselines.refused import require_own_head
from memtool.streams.task import Task
from memtool.workspace import Workspace


class Slca(FineTune):
    """Fine-tuning at a small rate, and a head that is aligned."""

    id: ClassVar[str] = "slca"
    title: ClassVar[str] = "SLCA"
    ratio: ClassVar[float] = 0.01
    """Learning rate of pre-trained weights, relative to the head's."""
    alignment_epochs: ClassVar[int] = 5
    alignment_lr: ClassVar[float] = 0.01
    temperature: ClassVar[float] = 0.1

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        require_own_head(work, self.id)
        super().__init__(work, tasks, objective)
        self.known: list[Gaussian] = []
        self.targets: list[int] = []
        self.tasks_of: list[int] = []
        self.before: LinearClassifier | None = None

    def rate_of(self, name: str) -> float:
        """The head learns at the full rate."""
        return self.ratio if name.startswith("objective.backbone.") else 1.0

    def before_task(self, task: Task) -> None:
        """Go on from the head before it was aligned."""
        super().before_task(task)
        if self.before is not None:
            self.objective.head.start_from(self.before)

    def after_task(self, task: Task) -> None:
        """Keep the Gaussians of the task's classes, and align the head to all."""
        if not self.alignment_epochs:
            return
        labels = torch.from_numpy(np.asarray(task.train.labels))
        classes = labels.unique().tolist()
        self.known += gaussians(self.features_of(task.train), labels, classes)
        self.targets += classes
        self.tasks_of += [len(self.seen)] * len(classes)
        if not self.seen:
            return
        self.before = self.objective.classifier()
        generator = self.work.engine.generator(self.work.training_seed(task.number))
        self.objective.head.start_from(self.realigned(self.before, generator))

    def realigned(self, head: LinearClassifier, generator: torch.Generator) -> LinearClassifier:
        """A head that is aligned to the Gaussians of all tasks so far, on the CPU."""
        return slca_aligned(
            head,
            self.known,
            self.targets,
            self.tasks_of,
            epochs=self.alignment_epochs,
            lr=self.alignment_lr,
            temperature=self.temperature,
            generator=generator,
        )


def slca_aligned(
    head: LinearClassifier,
    known: Sequence[Gaussian],
    targets: Sequence[int],
    tasks_of: Sequence[int],
    *,
    epochs: int,
    lr: float,
    temperature: float | None,
    generator: torch.Generator,
) -> LinearClassifier:
    """As `aligned`, with the means of older tasks a little shorter; Gaussian k is of `tasks_of[k]`.

    A row is of the first task that has its class.
    """
    count = max(tasks_of) + 1
    first = [0] * len(head.weight)
    for row, task in reversed([*zip(targets, tasks_of, strict=True)]):
        first[row] = task
    shorter = [
        one.nearer(0.9 + 0.1 * (t + 1) / count) for one, t in zip(known, tasks_of, strict=True)
    ]
    return aligned(
        head,
        shorter,
        targets,
        epochs=epochs,
        lr=lr,
        temperature=temperature,
        generator=generator,
        tasks=first,
    )
