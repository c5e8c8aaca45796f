"""EWC: a quadratic penalty holds the parameters that mattered to old tasks.

    penalty = λ/2 Σ_i F_i (θ_i − θ*_i)²

θ are A, B and the head; θ* is where the last task left them; F, summed over the tasks, is the mean
over a task's samples of the squared gradient of log p(label | image) (the diagonal of the empirical
Fisher matrix). Source: Kirkpatrick et al. 2017, with the one anchor of Huszár 2018.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.errors import ConfigError
from memtool.heads import LinearHead
from memtool.methods.adapt import AdapterTraining
from memtool.methods.baselines.learner import Learner
from memtool.methods.workspace import Workspace
from memtool.streams.task import Samples, Task

STRENGTH = 100.0
"""λ. Tuned on ViT-Tiny, 200 training images a task, one seed, final average accuracy of the linear
head in %, on PACS by domain and CIFAR-100 in five tasks: 10: 72.0 and 34.8; 100: 73.5 and 37.0;
1,000: 67.5 and 33.6. More holds too much (PACS, 1e5: 51.0)."""


class Ewc(Learner):
    """One LoRA whose important parameters are held."""

    id: ClassVar[str] = "ewc"
    title: ClassVar[str] = "EWC"

    def __init__(self, work: Workspace, tasks: int) -> None:
        super().__init__(work, tasks)
        if not isinstance(self.head, LinearHead):
            raise ConfigError(
                f"EWC under head.kind {work.config.head.kind}",
                expected="a head that is trained along: its Fisher information counts the head's",
            )
        self.importance = [torch.zeros_like(parameter) for parameter in self.held()]
        self.anchor = [parameter.detach().clone() for parameter in self.held()]

    def held(self) -> list[nn.Parameter]:
        """The parameters that learn: A and B, then weight and bias of the head."""
        assert isinstance(self.head, LinearHead)
        return [*self.values.parameters(), self.head.weight, self.head.bias]

    def penalty(self, images: Tensor, logits: Tensor) -> Tensor:
        """The quadratic form; zero during the first task."""
        del images
        total = logits.new_zeros(())
        for parameter, weight, anchor in zip(
            self.held(), self.importance, self.anchor, strict=True
        ):
            total = total + (weight * (parameter - anchor).square()).sum()
        return STRENGTH / 2 * total

    def after_task(self, task: Task) -> None:
        """Add the task's Fisher diagonal and move the anchor here."""
        for total, new in zip(self.importance, self.fisher(task.train, task.classes), strict=True):
            total += new
        self.anchor = [parameter.detach().clone() for parameter in self.held()]

    def fisher(self, samples: Samples, classes: tuple[int, ...]) -> list[Tensor]:
        """Mean over the samples of the squared gradient of the log-likelihood, as `held`.

        A batch of b samples runs as one group per sample, each with a copy of adapter and head, so
        that the gradients of the copies are those of the samples.
        """
        assert isinstance(self.head, LinearHead)
        engine = self.work.engine
        size = self.work.config.train.batch_size
        flat = self.values.flat()
        totals = [torch.zeros_like(parameter) for parameter in self.held()]
        for low in range(0, len(samples), size):
            images = torch.from_numpy(np.array(samples.images[low : low + size]))
            labels = torch.from_numpy(np.array(samples.labels[low : low + size]))
            copies = self.work.stacked(flat.repeat(len(labels), 1), trainable=True)
            module = AdapterTraining(self.backbone, copies, self.head.classifier(), classes)
            module.to(engine.device)
            with engine.autocast():
                logits = module(images.to(engine.device))[:, 0]
                loss = F.cross_entropy(logits, labels.to(engine.device), reduction="sum")
            loss.backward()
            gradients = [*copies.parameters(), module.weight, module.bias]
            for total, copy in zip(totals, gradients, strict=True):
                assert copy.grad is not None
                total += copy.grad.square().sum(dim=0).view_as(total)
        return [total / len(samples) for total in totals]
