"""MOS: adapters of tasks that stay near each other, and are found again by what they predict.

    while task b learns:  + λ mean_i −log softmax_i(M m_i / τ)     M: class means before, batch f
        after every step:  θ_b ← (1 − α) θ_b + α mean_{k<b} θ_k
    in a test:  z_c = cos(f_1, p_c), b_0 = the task of the best z;
                b_{i+1} = task of the best class under adapter b_i, until it stays
    probability = softmax(T z) + softmax of the logits under the adapter found

f_1 are the features under the first adapter, p_c the mean of class c in them, T how many tasks
there are. An adapter starts from the one before; heads of all tasks are aligned by class Gaussians
(`aligned.py`) from the second task on. Nothing is replayed. Source: Sun et al. 2025 ("Model
surgery"), compared term by term with the code of its authors in the toolbox PILOT.

As there: α = 0.1, merging after every step, at most 4 adapters asked, the sum of both stages, 30
epochs of alignment at 0.005 on plain logits; the contrastive term, by which every feature of a
batch and every class mean, each under the adapter of its task, is told from all others, with λ =
0.1, τ = 0.8 and features as long as they are, in the first task too. Ours: LoRA, both A and B
merged (published: bottleneck adapters of width 16); stream's rank, epochs, batch and AdamW, the
head at the adapter's rate (published: 20 epochs of SGD at 0.03, the head at a tenth); 256 draws a
class (there 240). That code also merges in every block's forward pass, in tests too, which we do
not. With one task and without the term it is sequential LoRA, scored by its head and its class
means. In dil cells as in `apart.py`. A test image runs once a task.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.adapters.recalls import dropping
from memtool.adapters.values import AdapterValues
from memtool.methods.baselines.apart import ApartWithHeads
from memtool.streams.task import Task


class Mos(ApartWithHeads):
    """Merged adapters, retrieved by their own predictions."""

    id: ClassVar[str] = "mos"
    title: ClassVar[str] = "MOS"
    momentum: ClassVar[float] = 0.1
    """α: how far a step goes to the mean of the earlier adapters."""
    contrast: ClassVar[float] = 0.1
    """λ of the contrastive term."""
    closeness: ClassVar[float] = 0.8
    """τ: what its products are divided by."""
    rounds: ClassVar[int] = 4
    """Most adapters that are asked in a test."""
    alignment_epochs: ClassVar[int] = 30
    alignment_lr: ClassVar[float] = 0.005
    temperature: ClassVar[float | None] = None
    first_alignment: ClassVar[int] = 2

    def begin(self) -> None:
        """Nothing to merge with, and no class known, yet."""
        super().begin()
        self.mean: AdapterValues | None = None
        self.features = self.centres = torch.empty(0, self.work.backbone.dim)
        self.prototypes = torch.empty(0, self.work.backbone.dim)

    def before_task(self, task: Task) -> None:
        """Start from the last adapter; what the steps go toward, and what they tell apart."""
        super().before_task(task)
        if self.kept:
            self.values = self.work.stacked(self.kept[-1][None], trainable=True)
            self.mean = self.work.stacked(torch.stack(self.kept).mean(dim=0, keepdim=True))
            self.centres = torch.stack([one.mean for one in self.known]).float()

    def forward(self, inputs: Tensor, targets: Tensor | None = None, seed: int = 0) -> Tensor:
        """As `Learner.forward`; it keeps the features for the contrastive term."""
        del targets
        recall = dropping(self.recall(), self.objective.dropout, seed, inputs.device)
        self.features = self.objective.features(inputs, recall)
        logits: Tensor = self.objective.head(self.features)
        return logits.float()

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """The contrastive term of the batch that ran last."""
        del inputs, targets
        if not self.contrast:
            return logits.new_zeros(())
        with torch.autocast(logits.device.type, enabled=False):
            own = self.features.to(logits.dtype)
            rows = torch.cat([self.centres.to(own), own])
            return self.contrast * apart(rows, self.closeness)

    @torch.no_grad()
    def after_step(self) -> None:
        """Go toward the mean of the earlier adapters."""
        if self.mean is None or not self.momentum:
            return
        for own, mean in zip(self.values.parameters(), self.mean.parameters(), strict=True):
            own.lerp_(mean, self.momentum)

    def after_task(self, task: Task) -> None:
        """As above; and the means of the task's classes under the first adapter."""
        super().after_task(task)
        features = self.features_under(self.kept[0], task.train)
        labels = torch.from_numpy(np.asarray(task.train.labels))
        means = [features[labels == one].mean(dim=0) for one in labels.unique()]
        self.prototypes = torch.cat([self.prototypes, torch.stack(means)])

    def scores(self, task: Task) -> Tensor:
        """The sum of the probabilities of both stages."""
        features = self.test_features(task)
        logits = torch.stack([self.head(each) for each in features])
        near = F.normalize(features[0], dim=1) @ F.normalize(self.prototypes, dim=1).T
        begun = self.cell_task[near.argmax(dim=1)]
        found = retrieved(logits, self.cell_task, begun, self.rounds)
        rows = torch.arange(logits.shape[1])
        both = (len(self.kept) * near).softmax(dim=1) + logits[found, rows].softmax(dim=1)
        return self.of_classes(both)


def apart(rows: Tensor, closeness: float) -> Tensor:
    """The mean −log p of each row (n, dim) among all, by products over `closeness`; a scalar."""
    return F.cross_entropy(rows @ rows.t() / closeness, torch.arange(len(rows), device=rows.device))


def retrieved(logits: Tensor, cell_task: Tensor, begun: Tensor, rounds: int) -> Tensor:
    """The adapter (n,) that each sample ends at, of logits (t, n, cells) under every adapter.

    It begins at `begun` (n,), and goes to the task of the best cell until that is the adapter's
    own, or so many were asked.
    """
    told = cell_task[logits.argmax(dim=2)]  # (t, n): the task that each adapter names
    rows = torch.arange(logits.shape[1])
    found = begun
    for _ in range(rounds - 1):
        found = told[found, rows]
    return found
