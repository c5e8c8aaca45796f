"""LwF: on new samples, the logits of what was learned before stay what the old model says.

    penalty = λ T² KL( softmax(old / T) ‖ softmax(new / T) ),   T = 2

over the classes seen so far of images, over the vocabulary at every token of an answer; the old
model is the one that the last task left. Source: Li & Hoiem 2016, with the factor T² of Hinton et
al. 2015, which keeps the size of the gradient when T changes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.heads import distillation
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.streams.task import Task

STRENGTH = 0.3
"""λ. Tuned on images as EWC's (`ewc.STRENGTH`): 0.1: 72.2 on PACS; 0.3: 72.2 and 33.4 on CIFAR-100;
1: 70.5 and 32.8."""


class Lwf(Learner):
    """One LoRA that keeps imitating what it was before the task."""

    id: ClassVar[str] = "lwf"
    title: ClassVar[str] = "LwF"

    def begin(self) -> None:
        """There is no old model yet."""
        super().begin()
        self.old: tuple[AdapterValues, Objective] | None = None

    def before_task(self, task: Task) -> None:
        """Keep a frozen copy as the old model."""
        del task
        if self.seen:
            self.old = self.work.stacked(self.values.flat()), self.objective.as_it_is()

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """The divergence from the old model; zero during the first task."""
        if self.old is None:
            return logits.new_zeros(())
        values, objective = self.old
        taught = self.objective.taught(self.seen)
        if self.objective.reads_classes_of_a_batch:  # logits are those of the batch's classes only
            wanted_classes = torch.tensor(taught, device=inputs.device)
            logits = self.objective.logits(inputs, wanted_classes, self.recall())
        with torch.no_grad():
            wanted = objective.logits(inputs, targets, every(values))
        return STRENGTH * distillation(logits[:, taught], wanted[:, taught])
