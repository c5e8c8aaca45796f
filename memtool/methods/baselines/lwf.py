"""LwF: on the new images, the logits of old classes stay what the old model says.

    penalty = λ T² KL( softmax(old / T) ‖ softmax(new / T) ),   over the classes seen so far, T = 2

with the old model the one that the last task left. Source: Li & Hoiem 2016, with the factor T² of
Hinton et al. 2015, which keeps the size of the gradient when T changes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memtool.adapters.values import AdapterValues
from memtool.heads import CosineHead, LinearClassifier, distillation
from memtool.methods.baselines.learner import Learner
from memtool.methods.recall import every
from memtool.methods.workspace import Workspace
from memtool.streams.task import Task

STRENGTH = 0.3
"""λ. Tuned as EWC's (`ewc.STRENGTH`): 0.1: 72.2 on PACS; 0.3: 72.2 and 33.4 on CIFAR-100; 1: 70.5
and 32.8."""


class Lwf(Learner):
    """One LoRA that keeps imitating what it was before the task."""

    id: ClassVar[str] = "lwf"
    title: ClassVar[str] = "LwF"

    def __init__(self, work: Workspace, tasks: int) -> None:
        super().__init__(work, tasks)
        self.old: tuple[AdapterValues, LinearClassifier | CosineHead] | None = None

    def before_task(self, task: Task) -> None:
        """Keep a frozen copy as the old model."""
        del task
        if self.seen:
            self.old = self.work.stacked(self.values.flat()), self.classifier()

    def penalty(self, images: Tensor, logits: Tensor) -> Tensor:
        """The divergence from the old model; zero during the first task."""
        if self.old is None:
            return logits.new_zeros(())
        values, head = self.old
        classes = sorted({one for task in self.seen for one in task.classes})
        if self.text is not None:  # logits are then those of the batch's classes only
            now = self.text.head(self.backbone, self.recall(), classes)
            logits = now(self.features(images))
        with torch.no_grad():
            pixels = self.backbone.preprocess(images)
            wanted = head(self.backbone.features(pixels, every(values)))
        return STRENGTH * distillation(logits[:, classes], wanted[:, classes])
