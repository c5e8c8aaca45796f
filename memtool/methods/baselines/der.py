"""DER++: samples of earlier tasks are learned again, and so is what the model said of them.

    loss = loss of the batch + α |z(x') − z'|² / classes + β cross-entropy of (x'', y'')

x' and x'' are two draws of the buffer of ER (`replay.py`), as many as the batch has; z' are the
logits of then. The row is marked as replay. Source: Buzzega et al. 2020.

As published: two draws, the mean square over all classes, α = 0.1 and β = 0.5 (its CIFAR-10 with a
buffer of 200). Ours: samples enter the buffer, and logits are taken, once a task ended (published:
during training); what classes are compared is as in ER. At α = β = 0 it is sequential. A step costs
three. Of images under a head that learns: a vocabulary is too wide to keep.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.learning.objective import Objective
from memtool.methods.baselines.refused import require_own_head
from memtool.methods.baselines.replay import Er
from memtool.streams.task import Task
from memtool.workspace import Workspace


class DerPlusPlus(Er):
    """Replay of samples and logits; `said` (buffer, classes) are these."""

    id: ClassVar[str] = "der++"
    title: ClassVar[str] = "DER++"
    alpha: ClassVar[float] = 0.1
    """Weight of the logits."""
    beta: ClassVar[float] = 0.5
    """Weight of the labels."""

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        require_own_head(work, self.id)
        super().__init__(work, tasks, objective)
        self.said = torch.empty(0)

    def after_task(self, task: Task) -> None:
        """Offer samples to the buffer, with the logits of now."""
        rows, new = self.keep(task)
        if not rows:
            return
        parts = [self.said] if len(self.said) else []
        if new:
            recall = self.recall()
            images = task.train.chosen(new).images
            parts.append(
                self.work.engine.predict(lambda x: self.objective.logits(x, None, recall), images)
            )
        self.said = torch.cat(parts)[rows]

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """Both terms; zero while the buffer is empty."""
        del inputs
        total = logits.new_zeros(())
        if self._arrays is None or not (self.alpha or self.beta):
            return total
        total = total + self.old_classes(logits)
        if self.alpha:
            rows, again, _ = self.draw(len(targets))
            now = self.objective.logits(again, None, self.recall())
            total = total + self.alpha * F.mse_loss(now, self.said[rows].to(now.device))
        if self.beta:
            total = total + self.beta * self.replayed(len(targets))
        return total
