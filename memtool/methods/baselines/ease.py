"""EASE: an adapter per task, their features side by side, prototypes completed by likeness.

    logit of cell i = Σ_j w_ij cos(p_ij, φ_j(x)),   w_ij = 1 for its own task's adapter j, else α

φ_j are the features under adapter j, p_ij the mean of the cell's training images in them. Adapters
that came after the cell's task never saw its images; there

    p_ij = Σ_k softmax_k(cos(p_io, p_ko)) p_kj

over the cells k of task j, o the cell's own task. Nothing is replayed. Source: Zhou et al. 2024.

As published: α = 0.1, no frozen features beside the adapters' (the β of the public code is 0). With
one task it is the nearest class mean by cosine under one adapter: APER without its frozen half.
Ours: LoRA at the stream's rank, epochs and optimiser (published: bottleneck adapters of width 64 in
ViT-B/16, 20 epochs of SGD at 0.025); trained under a linear head, which is then left; in dil, which
the paper has not, cells as in `apart.py`. A test image runs once for every task.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.methods.baselines.apart import Apart
from memtool.streams.task import Images, Task


class Ease(Apart):
    """`prototypes[j]` (cells, dim) are those of all cells in the features under adapter j."""

    id: ClassVar[str] = "ease"
    title: ClassVar[str] = "EASE"
    alpha: ClassVar[float] = 0.1
    """Weight of the features under adapters of other tasks."""

    def begin(self) -> None:
        """No prototypes yet."""
        super().begin()
        self.prototypes: list[Tensor] = []

    def after_task(self, task: Task) -> None:
        """Prototypes of the new cells everywhere, and of old ones in the new features."""
        super().after_task(task)
        means = [self.means(value, task.train) for value in self.kept]
        *before, own = means
        old = self.cell_task[: len(self.cell_task) - len(own)]
        completed = torch.stack(
            [
                completion(self.prototypes[o][cell], means[o], own)
                for cell, o in enumerate(old.tolist())
            ]
            or [own.new_empty(0, own.shape[1])]
        ).view(-1, own.shape[1])
        self.prototypes = [
            torch.cat([had, new]) for had, new in zip(self.prototypes, before, strict=True)
        ]
        self.prototypes.append(torch.cat([completed, own]))

    def means(self, value: Tensor, samples: Images) -> Tensor:
        """Class means (k, dim) of images under an adapter, float64, by ascending class."""
        features = self.features_under(value, samples).double()
        labels = torch.from_numpy(np.asarray(samples.labels))
        return torch.stack([features[labels == one].mean(dim=0) for one in labels.unique()])

    def scores(self, task: Task) -> Tensor:
        """The weighted cosines; the highest cell of a class."""
        features = self.test_features(task).double()
        total = features.new_zeros(features.shape[1], len(self.cell_task))
        for place, (found, prototypes) in enumerate(zip(features, self.prototypes, strict=True)):
            weight = torch.where(self.cell_task == place, 1.0, self.alpha)
            total += weight * (F.normalize(found, dim=1) @ F.normalize(prototypes, dim=1).t())
        return self.of_classes(total)


def completion(old: Tensor, new_there: Tensor, new_here: Tensor) -> Tensor:
    """The prototype (dim,) that an old class would have among the new features.

    `old` (dim,) and `new_there` (k, dim) are where both are known, `new_here` (k, dim) is where the
    old one is not.
    """
    likeness = F.cosine_similarity(old[None], new_there, dim=1).softmax(dim=0)
    return likeness @ new_here
