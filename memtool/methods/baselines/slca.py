"""SLCA: all weights learn slowly, the head fast, and the head is aligned after every task.

The head's rate is the stream's, that of pre-trained weights a hundredth of it: what is pre-trained
hardly forgets. After each task the head learns once more from draws of every class's Gaussian
(`aligned.py`). Source: Zhang et al. 2023.

As published (ViT-B/16): ratio of rates 0.01 (1e-4 to 1e-2), 256 draws a class, 5 epochs of SGD at
0.01, normalised logits at τ = 0.1; a task's own classes only are compared while it learns.
Ours: epochs, batch, rate of the head and AdamW are the stream's, as for all baselines (published:
20 epochs of SGD). The public code also shortens the means of old classes a little; we do not. In
dil every class has a Gaussian for each of its domains. The Gaussians are of the features of then.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

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

    def rate_of(self, name: str) -> float:
        """The head learns at the full rate."""
        return self.ratio if name.startswith("objective.backbone.") else 1.0

    def after_task(self, task: Task) -> None:
        """Keep the Gaussians of the task's classes, and align the head to all."""
        if not self.alignment_epochs:
            return
        labels = torch.from_numpy(np.asarray(task.train.labels))
        classes = labels.unique().tolist()
        self.known += gaussians(self.features_of(task.train), labels, classes)
        self.targets += classes
        head = aligned(
            self.objective.classifier(),
            self.known,
            self.targets,
            epochs=self.alignment_epochs,
            lr=self.alignment_lr,
            temperature=self.temperature,
            generator=self.work.engine.generator(self.work.training_seed(task.number)),
        )
        self.objective.head.start_from(head)
