"""MOS: adapters of tasks that stay near each other, and are found again by what they predict.

    while task b learns, after every step:  θ_b ← (1 − α) θ_b + α mean_{k<b} θ_k
    in a test:  b_0 = 1;  b_{i+1} = task of the best class under adapter b_i, until it stays
    probability = that under adapter 1 + that under the adapter found

Heads of all tasks are aligned by class Gaussians (`aligned.py`). Nothing is replayed. Source: Sun
et al. 2025 ("Model surgery").

As published: α = 0.1, merging after every step, at most 4 rounds of retrieval, the sum over both
stages, alignment. Ours: LoRA, both A and B merged, from a common start (published: the
up-projection of bottleneck adapters of width 16); stream's rank, epochs and AdamW (published: 20
epochs of SGD); alignment with SLCA's numbers; no contrastive term, which the public code has and
the paper's text does not describe. The pages were not at hand when this was written: it follows
what we know of paper and code. In dil cells as in `apart.py`. A test image runs once a task.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memtool.adapters.values import AdapterValues
from memtool.methods.baselines.apart import ApartWithHeads
from memtool.streams.task import Task


class Mos(ApartWithHeads):
    """Merged adapters, retrieved by their own predictions."""

    id: ClassVar[str] = "mos"
    title: ClassVar[str] = "MOS"
    momentum: ClassVar[float] = 0.1
    """α: how far a step goes to the mean of the earlier adapters."""
    rounds: ClassVar[int] = 4
    """Most changes of the adapter in a test."""

    def begin(self) -> None:
        """Nothing to merge with yet."""
        super().begin()
        self.mean: AdapterValues | None = None

    def before_task(self, task: Task) -> None:
        """What the steps go toward."""
        super().before_task(task)
        if self.kept:
            self.mean = self.work.stacked(torch.stack(self.kept).mean(dim=0, keepdim=True))

    @torch.no_grad()
    def after_step(self) -> None:
        """Go toward the mean of the earlier adapters."""
        if self.mean is None or not self.momentum:
            return
        for own, mean in zip(self.values.parameters(), self.mean.parameters(), strict=True):
            own.lerp_(mean, self.momentum)

    def scores(self, task: Task) -> Tensor:
        """The sum of the probabilities of both stages."""
        logits = torch.stack([self.head(each) for each in self.test_features(task)])
        rows = torch.arange(logits.shape[1])
        found = retrieved(logits, self.cell_task, self.rounds)
        both = logits[0].softmax(dim=1) + logits[found, rows].softmax(dim=1)
        return self.of_classes(both)


def retrieved(logits: Tensor, cell_task: Tensor, rounds: int) -> Tensor:
    """The adapter (n,) that each sample ends at, of logits (t, n, cells) under every adapter.

    It begins at the first, and goes to the task of the best cell until that is the adapter's own.
    """
    told = cell_task[logits.argmax(dim=2)]  # (t, n): the task that each adapter names
    rows = torch.arange(logits.shape[1])
    found = torch.zeros_like(told[0])
    for _ in range(rounds):
        found = told[found, rows]
    return found
