"""O-LoRA: the input directions of a new LoRA are pressed to be orthogonal to those of the old ones.

    penalty = λ Σ_sites Σ_{old t} Σ_{ij} |A_t Aᵀ|_{ij}

Source: Wang et al. 2023.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memtool.adapters.values import AdapterValues
from memtool.methods.baselines.branches import Branches

STRENGTH = 0.03
"""λ. Tuned as EWC's (`ewc.STRENGTH`), where it hardly matters: none: 75.0 on PACS and 33.6 on
CIFAR-100; 0.003: 74.2; 0.03: 74.5 and 33.2; 0.1: 74.2; 0.5: 72.5. The least of these takes 85 % of
the overlap away on PACS (22.1 to 3.3), and without it nothing is (23.5)."""


class OLora(Branches):
    """A branch per task under the orthogonality penalty."""

    id: ClassVar[str] = "o-lora"
    title: ClassVar[str] = "O-LoRA"

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """The overlap with the frozen branches; zero during the first task."""
        del inputs, targets, logits
        return STRENGTH * overlap(self.past, self.values)


def overlap(past: AdapterValues | None, new: AdapterValues) -> Tensor:
    """Σ |A_t Aᵀ| over the adapters t of `past`, the sites and the pairs of ranks; `new` has one.

    Zero where there is no past.
    """
    total = new.scaling.new_zeros(())
    if past is None:
        return total
    with torch.autocast(total.device.type, enabled=False):
        for old, a in zip(past.a, new.a, strict=True):  # (t, sites, r, d), (1, sites, r, d)
            total = total + (old @ a.transpose(-1, -2)).abs().sum()
    return total
