"""TUNA: adapters of tasks, one of them chosen by entropy, beside a universal one merged of all.

    while task b learns:  + λ Σ_sites Σ_{k<b} |B_kᵀ B_b|²
    universal:  for every number the sign of the sum, and the largest size among those that have it
    in a test:  logits under the adapter of least entropy + logits under the universal one

Heads of all tasks are aligned by class Gaussians (`aligned.py`), as in MOS. Nothing is replayed.
Source: Wang et al. 2025 ("Integrating task-specific and universal adapters"); the merge is the
election of Huang et al. 2024 (EMR-merging).

Ours: LoRA from a common start, whose numbers are merged as they are (published: bottleneck adapters
of ViT-B/16); stream's rank, epochs and AdamW; λ = 1e-3, not tuned; alignment with SLCA's numbers.
The pages were not at hand when this was written: it follows what we know of the paper. In dil cells
as in `apart.py`. A test image runs once for every task and once more.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memtool.adapters.values import AdapterValues
from memtool.methods.baselines.apart import ApartWithHeads
from memtool.streams.task import Task


class Tuna(ApartWithHeads):
    """The surest adapter and the universal one, together."""

    id: ClassVar[str] = "tuna"
    title: ClassVar[str] = "TUNA"
    strength: ClassVar[float] = 1e-3
    """λ of the orthogonality."""

    def begin(self) -> None:
        """Nothing to be orthogonal to yet."""
        super().begin()
        self.past: AdapterValues | None = None

    def before_task(self, task: Task) -> None:
        """What the new adapter is pressed to be orthogonal to."""
        super().before_task(task)
        if self.kept:
            self.past = self.work.stacked(torch.stack(self.kept))

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """The overlap of B with the earlier ones; zero during the first task."""
        del inputs, targets
        total = logits.new_zeros(())
        if self.past is None or not self.strength:
            return total
        with torch.autocast(total.device.type, enabled=False):
            for old, b in zip(self.past.b, self.values.b, strict=True):  # (t, r, out), (1, r, out)
                total = total + (old @ b.transpose(1, 2)).square().sum()
        return self.strength * total

    def scores(self, task: Task) -> Tensor:
        """The sum of the logits of both."""
        logits = torch.stack([self.head(each) for each in self.test_features(task)])
        rows = torch.arange(logits.shape[1])
        universal = self.features_under(elected(torch.stack(self.kept)), task.test)
        both = logits[surest(logits), rows] + self.head(universal)
        return self.of_classes(both)


def surest(logits: Tensor) -> Tensor:
    """The adapter (n,) whose prediction has the least entropy, of logits (t, n, cells)."""
    log_p = logits.log_softmax(dim=2)
    entropy = -(log_p.exp() * log_p).sum(dim=2)
    return entropy.argmin(dim=0)


def elected(values: Tensor) -> Tensor:
    """The universal value (numel,) of values (t, numel): elected sign, largest size that has it."""
    sign = values.sum(dim=0).sign()
    return sign * (values * sign).amax(dim=0).clamp_min(0)
