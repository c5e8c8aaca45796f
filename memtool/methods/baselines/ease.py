"""EASE: an adapter per task, their features side by side, prototypes completed by likeness.

    logit of cell i = Σ_j w_ij cos(p_ij, φ_j(x)),   w_ij = 1 for its own task's adapter, of T tasks
                                                           α / (T − 1) for every other

φ_j are the features under adapter j, p_ij the mean of the cell's training images in them. Adapters
that came after the cell's task never saw its images; there

    p_ij = Σ_k softmax_k(cos(p_io, p_ko)) p_kj

over the cells k that were seen under adapter j, of task j and later ones, o the cell's own task; it
is done anew after every task. Nothing is replayed. Source: Zhou et al. 2024, compared term by term
with the code of its authors in the toolbox PILOT.

As there: α = 0.1, divided among the other adapters; no frozen features beside (its β is 0); cells
of all later tasks complete, where the paper has those of task j. With one task it is the nearest
class mean by cosine under one adapter: APER without its frozen half. Ours: LoRA at the stream's
rank, epochs, batch and optimiser (there bottleneck adapters of width 64 in ViT-B/16, 20 epochs of
SGD at 0.025 on batches of 48); trained under a linear head, which is then left (there under one of
cosines with a learned scale); in dil, which the paper has not, cells as in `apart.py`. A test image
runs once for every task.
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
    """Weight of the features under all adapters of other tasks together."""

    def begin(self) -> None:
        """No prototypes yet."""
        super().begin()
        self.prototypes: list[Tensor] = []

    def after_task(self, task: Task) -> None:
        """Prototypes of the new cells everywhere, and of old ones where they were never seen."""
        super().after_task(task)
        means = [self.means(value, task.train) for value in self.kept]
        old = len(self.cell_task) - len(means[-1])
        self.prototypes.append(means[-1].new_zeros(old, means[-1].shape[1]))
        self.prototypes = [
            torch.cat([had, new]) for had, new in zip(self.prototypes, means, strict=True)
        ]
        for adapter, here in enumerate(self.prototypes):
            seen = self.cell_task >= adapter
            for cell, own in enumerate(self.cell_task.tolist()):
                if own < adapter:
                    there = self.prototypes[own]
                    here[cell] = completion(there[cell], there[seen], here[seen])

    def means(self, value: Tensor, samples: Images) -> Tensor:
        """Class means (k, dim) of images under an adapter, float64, by ascending class."""
        features = self.features_under(value, samples).double()
        labels = torch.from_numpy(np.asarray(samples.labels))
        return torch.stack([features[labels == one].mean(dim=0) for one in labels.unique()])

    def scores(self, task: Task) -> Tensor:
        """The weighted cosines; the highest cell of a class."""
        features = self.test_features(task).double()
        total = features.new_zeros(features.shape[1], len(self.cell_task))
        other = self.alpha / max(1, len(self.kept) - 1)
        for place, (found, prototypes) in enumerate(zip(features, self.prototypes, strict=True)):
            weight = torch.where(self.cell_task == place, 1.0, other)
            total += weight * (F.normalize(found, dim=1) @ F.normalize(prototypes, dim=1).t())
        return self.of_classes(total)


def completion(old: Tensor, new_there: Tensor, new_here: Tensor) -> Tensor:
    """The prototype (dim,) that an old class would have among the new features.

    `old` (dim,) and `new_there` (k, dim) are where both are known, `new_here` (k, dim) is where the
    old one is not.
    """
    likeness = F.cosine_similarity(old[None], new_there, dim=1).softmax(dim=0)
    return likeness @ new_here
