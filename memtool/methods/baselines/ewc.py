"""EWC: a quadratic penalty holds the parameters that mattered to old tasks.

    penalty = λ/2 Σ_i F_i (θ_i − θ*_i)²

θ are A, B and the head, where one learns along; θ* is where the last task left them; F, summed over
the tasks, is the mean over a task's samples of the squared gradient of log p of the target (the
diagonal of the empirical Fisher matrix): of the label of an image, of the answer to a prompt.
Source: Kirkpatrick et al. 2017, with the one anchor of Huszár 2018.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from memtool.adapters.recalls import every
from memtool.errors import ConfigError
from memtool.learning.known import is_fixed
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.streams.task import Task
from memtool.workspace import Workspace

STRENGTH = 100.0
"""λ. Tuned on ViT-Tiny, 200 training images a task, one seed, final average accuracy of the linear
head in %, on PACS by domain and CIFAR-100 in five tasks: 10: 72.0 and 34.8; 100: 73.5 and 37.0;
1,000: 67.5 and 33.6. More holds too much (PACS, 1e5: 51.0)."""


class Ewc(Learner):
    """One LoRA whose important parameters are held."""

    id: ClassVar[str] = "ewc"
    title: ClassVar[str] = "EWC"

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        if work.reads == "images" and is_fixed(work.config):
            raise ConfigError(
                f"EWC under head.kind {work.config.head.kind}",
                expected="a head that is trained along: its Fisher information counts the head's",
            )
        super().__init__(work, tasks, objective)
        self.importance = [torch.zeros_like(parameter) for parameter in self.held()]
        self.anchor = [parameter.detach().clone() for parameter in self.held()]

    def held(self) -> list[nn.Parameter]:
        """The parameters that learn: A and B, then those of the head."""
        return [*self.values.parameters(), *_learned(self.objective)]

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """The quadratic form; zero during the first task."""
        del inputs, targets
        total = logits.new_zeros(())
        for parameter, weight, anchor in zip(
            self.held(), self.importance, self.anchor, strict=True
        ):
            total = total + (weight * (parameter - anchor).square()).sum()
        return STRENGTH / 2 * total

    def after_task(self, task: Task) -> None:
        """Add the task's Fisher diagonal and move the anchor here."""
        for total, new in zip(self.importance, self.fisher(task), strict=True):
            total += new
        self.anchor = [parameter.detach().clone() for parameter in self.held()]

    def fisher(self, task: Task) -> list[Tensor]:
        """Mean over the samples of a task of the squared gradient of the log-likelihood, as `held`.

        A batch of b samples runs as one group per sample, each with a copy of adapter and head, so
        that the gradients of the copies are those of the samples.
        """
        engine = self.work.engine
        size = self.work.config.train.batch_size
        inputs, targets = self.objective.arrays(task.train)
        flat = self.values.flat()
        totals = [torch.zeros_like(parameter) for parameter in self.held()]
        for low in range(0, len(targets), size):
            batch = torch.from_numpy(np.array(inputs[low : low + size])).to(engine.device)
            wanted = torch.from_numpy(np.array(targets[low : low + size])).to(engine.device)
            copies = self.work.stacked(flat.repeat(len(wanted), 1), trainable=True)
            objective = self.objective.copied(len(wanted)).to(engine.device)
            objective.begin(task)
            with engine.autocast():
                logits = objective.logits(batch, wanted, every(copies))
                loss = objective.losses(logits, batch, wanted).sum()
            loss.backward()
            gradients = [*copies.parameters(), *_learned(objective)]
            for total, copy in zip(totals, gradients, strict=True):
                assert copy.grad is not None
                total += copy.grad.square().sum(dim=0).view_as(total)
        return [total / len(targets) for total in totals]


def _learned(objective: Objective) -> list[nn.Parameter]:
    """The parameters of an objective's head."""
    return [parameter for parameter in objective.parameters() if parameter.requires_grad]
