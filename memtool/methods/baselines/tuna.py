"""TUNA: adapters of tasks, one of them chosen by entropy, beside a universal one merged of all.

    while task b learns:  + λ Σ_sites Σ_{k<b} |B_kᵀ B_b|²
    universal:  for every number the sign of the sum, and the largest size among those that have it
    in a test:  probabilities under the adapter of least entropy + those under the universal one

Heads of all tasks are aligned by class Gaussians (`aligned.py`), as in MOS, from the second task
on. Nothing is replayed. Source: Wang et al. 2025 ("Integrating task-specific and universal
adapters"); the merge is the election of Huang et al. 2024 (EMR-merging). Written beside two public
copies of its authors' code; the toolbox PILOT does not have it.

As there: an adapter starts from the one before, numbers are merged as they are, probabilities are
added, 30 epochs of alignment at 0.005. Ours: LoRA (there bottleneck adapters of width 16 in
ViT-B/16); stream's rank, epochs, batch and AdamW (there SGD at 0.01 or 0.02, 10 to 15 epochs); a
linear head under cross-entropy (there cosines times 20, in alignment and tests too); 256 draws a
class. The term is the sum of squares above, λ = 1e-3 (there the size of the mean product of rows of
length one, times 1e-3 e^−t in task t, and none at all for CIFAR-100). In dil cells as in
`apart.py`. A test image runs once for every task and once more.
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
    alignment_epochs: ClassVar[int] = 30
    alignment_lr: ClassVar[float] = 0.005
    temperature: ClassVar[float | None] = None
    first_alignment: ClassVar[int] = 2

    def begin(self) -> None:
        """Nothing to be orthogonal to yet."""
        super().begin()
        self.past: AdapterValues | None = None

    def before_task(self, task: Task) -> None:
        """Start from the last adapter; and what the new one is pressed to be orthogonal to."""
        super().before_task(task)
        if self.kept:
            self.values = self.work.stacked(self.kept[-1][None], trainable=True)
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
        """The sum of the probabilities of both."""
        logits = torch.stack([self.head(each) for each in self.test_features(task)])
        rows = torch.arange(logits.shape[1])
        universal = self.features_under(elected(torch.stack(self.kept)), task.test)
        own = logits[surest(logits), rows]
        return self.of_classes(own.softmax(dim=1) + self.head(universal).softmax(dim=1))


def surest(logits: Tensor) -> Tensor:
    """The adapter (n,) whose prediction has the least entropy, of logits (t, n, cells)."""
    log_p = logits.log_softmax(dim=2)
    entropy = -(log_p.exp() * log_p).sum(dim=2)
    return entropy.argmin(dim=0)


def elected(values: Tensor) -> Tensor:
    """The universal value (numel,) of values (t, numel): elected sign, largest size that has it."""
    sign = values.sum(dim=0).sign()
    return sign * (values * sign).amax(dim=0).clamp_min(0)
