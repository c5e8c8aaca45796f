"""ER: every step also learns from images, or texts, of earlier tasks that were kept.

    loss = loss of the batch + loss of as many samples drawn of the buffer

Once the buffer holds something, a head that learns tells both apart among all classes so far.
`replay.buffer` samples are kept, each seen one as likely as any other (reservoir sampling by the
seed). The row is marked: no other baseline here keeps data. Source: Chaudhry et al. 2019.

Ours: samples enter the buffer when their task ends, each counted once (published: in training).
While the buffer is empty only the classes of the task are compared, as with every baseline here: at
`replay.buffer` 0 it is sequential. Under a head that knows all classes in advance the batch stays
compared as the head says. A step costs two.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.devices import sent
from memtool.engine import Batch
from memtool.learning.adapt import class_mask
from memtool.learning.learner import Learner
from memtool.learning.objective import Arrays, Objective
from memtool.streams.task import Task
from memtool.workspace import Workspace


class Reservoir:
    """At most `size` of all that was offered, each of it equally likely (Vitter 1985, R)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.offered = 0
        self._random = np.random.default_rng([seed, 4])

    def offer(self, count: int) -> dict[int, int]:
        """Offer so many more: places of the buffer, and which of these (from 0) each holds now."""
        taken: dict[int, int] = {}
        for index in range(count):
            place = self.offered
            if self.offered >= self.size:
                place = int(self._random.integers(self.offered + 1))
            if place < self.size:
                taken[place] = index
            self.offered += 1
        return taken


class Er(Learner):
    """One LoRA that learns old samples along; `buffer` are those (None: none)."""

    id: ClassVar[str] = "er"
    title: ClassVar[str] = "ER"
    replay: ClassVar[bool] = True

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        super().__init__(work, tasks, objective)
        size = work.config.replay.buffer
        self.label = f"{self.title} (replays {size} samples)"
        self.reservoir = Reservoir(size, work.seed)
        self.buffer: Any = None
        self._arrays: Arrays | None = None
        self._draws = work.engine.generator(work.seed)

    def before_task(self, task: Task) -> None:
        """Make the buffer ready to draw from."""
        if self.buffer is not None:
            self._arrays = self.objective.arrays(self.buffer)
        self._draws = self.work.engine.generator(self.work.training_seed(task.number))
        classes = sorted({one for each in (*self.seen, task) for one in each.classes})
        count, device = len(self.work.stream.class_names), self.work.engine.device
        self._mask = class_mask(classes, count).to(device)

    def after_task(self, task: Task) -> None:
        """Offer the task's samples to the buffer."""
        self.keep(task)

    def keep(self, task: Task) -> tuple[list[int], list[int]]:
        """Offer a task's samples; which rows of the buffer and then of the task it is made of now.

        Rows of the task count on from those of the buffer.
        """
        taken = self.reservoir.offer(len(task.train))
        old = 0 if self.buffer is None else len(self.buffer)
        new = sorted(taken.values())
        among = {index: old + place for place, index in enumerate(new)}
        filled = min(self.reservoir.size, self.reservoir.offered)
        rows = [among[taken[place]] if place in taken else place for place in range(filled)]
        if rows:
            parts = [] if self.buffer is None else [self.buffer]
            chosen = task.train.chosen(new)
            self.buffer = type(task.train).joined([*parts, chosen]).chosen(rows)
        return rows, new

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """So many of the buffer, with repeats: which, inputs ready to run, and targets, (k,)."""
        assert self._arrays is not None
        inputs, targets = self._arrays
        rows = torch.randint(len(targets), (count,), generator=self._draws)
        seed = int(torch.randint(2**62, (1,), generator=self._draws))
        device = self.work.engine.device
        told = torch.from_numpy(targets[rows.numpy()])
        chosen = sent(self.objective.narrowed(torch.from_numpy(inputs[rows.numpy()])), device)
        batch = Batch(chosen, sent(told, device), told, torch.ones(count, device=device), seed)
        return rows, self.objective.prepared(batch), self.objective.targets(batch)

    def replayed(self, count: int) -> Tensor:
        """The loss of so many of the buffer, among all classes so far."""
        _, inputs, targets = self.draw(count)
        logits = self.objective.logits(inputs, targets, self.recall())
        if self.objective.of_texts:
            found: Tensor = self.objective.loss(logits, inputs, targets)
            return found
        return F.cross_entropy(logits + self._mask, sent(targets, logits.device))

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """The loss of as many of the buffer; zero while it is empty."""
        del inputs
        if self._arrays is None:
            return logits.new_zeros(())
        return self.old_classes(logits) + self.replayed(len(targets))

    def old_classes(self, logits: Tensor) -> Tensor:
        """What comparing the batch with the old classes too adds to its cross-entropy."""
        if self.objective.of_texts or self.objective.is_fixed:
            return logits.new_zeros(())
        more = (logits + self._mask).logsumexp(1) - (logits + self.objective.mask).logsumexp(1)
        return more.mean()
