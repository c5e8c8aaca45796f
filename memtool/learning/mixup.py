"""Mixup: a model learns from mixtures of two images, and of their labels (Zhang et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.devices import sent
from memtool.engine import Batch

_DRAW = 4
"""Sets the draws of mixup apart from others of the same batch."""


@dataclass(frozen=True, eq=False)
class Mixing:
    """Sample i of a batch has the share `share` of itself and the rest of sample `partners[i]`.

    Without `partners` (n,), which are on the CPU, nothing is mixed.
    """

    share: float = 1.0
    partners: Tensor | None = None

    def inputs(self, images: Tensor) -> Tensor:
        """The mixtures of images uint8 (n, h, w, 3), in the nearest whole numbers."""
        if self.partners is None:
            return images
        own, others = images.float(), images[sent(self.partners, images.device)].float()
        return (self.share * own + (1 - self.share) * others).round().to(torch.uint8)

    def loss(self, of: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
        """The loss `of` labels (n,) and that of the partners' labels, in their shares."""
        found = of(labels)
        if self.partners is None:
            return found
        others = labels[sent(self.partners, labels.device)]
        return self.share * found + (1 - self.share) * of(others)


def mixing(batch: Batch, alpha: float, groups: int = 1, *, of_class: bool = False) -> Mixing:
    """How the samples of a batch are mixed, drawn from its seed: one share for all of them.

    Partners are of the same group, and with `of_class` of the same class. Nothing is mixed with
    `alpha` 0.
    """
    if alpha == 0:
        return Mixing()
    draws = np.random.default_rng([batch.seed, _DRAW])
    size = len(batch.told) // groups
    if of_class:
        labels = batch.told.numpy().reshape(groups, size)
        rows = [group * size + _within(one, draws) for group, one in enumerate(labels)]
    else:
        rows = [group * size + draws.permutation(size) for group in range(groups)]
    partners = torch.from_numpy(np.concatenate(rows))
    return Mixing(float(draws.beta(alpha, alpha)), partners)


def _within(labels: npt.NDArray[np.int64], draws: np.random.Generator) -> npt.NDArray[np.intp]:
    """A permutation (n,) that moves samples only within their class."""
    order = np.arange(len(labels))
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        order[places] = draws.permutation(places)
    return order
