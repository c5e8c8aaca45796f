"""A head that knows all classes in advance and is never trained: cosines to one vector a class.

    logit_c = scale · ⟨f / |f|, p_c⟩,   |p_c| = 1

p_c is what a text tower says about the class, or, where a backbone has none, the prototype of the
class: the mean of the normalised frozen features of its training images, normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.devices import exact, sent
from memtool.errors import DataError, MismatchError
from memtool.heads.linear import LinearClassifier, mask_logits


@dataclass(frozen=True, eq=False)
class CosineHead:
    """Prototypes (classes, dim), float32, each of length one, and the scale of the logits.

    The scale may be a tensor that learns. A prototype of zeros marks a class that is not known; its
    logit is −infinity.
    """

    prototypes: Tensor
    scale: float | Tensor

    @classmethod
    def of_classes(
        cls, directions: Tensor, labels: Sequence[int] | Tensor, classes: int, scale: float
    ) -> CosineHead:
        """Known classes `labels` (k,) by any vectors `directions` (k, dim), among `classes`."""
        index = sent(torch.as_tensor(labels, dtype=torch.int64), directions.device)
        with torch.autocast(directions.device.type, enabled=False):
            known = F.normalize(directions.float(), dim=1)
            nothing = known.new_zeros(classes, known.shape[1])
            return cls(nothing.index_copy(0, index, known), scale)

    @property
    def classes(self) -> int:
        """Number of classes, known or not."""
        return self.prototypes.shape[0]

    def linear(self) -> LinearClassifier:
        """Linear scores that rank the classes of any feature as this head does, on the CPU.

        They are the logits times the length of the feature, so probabilities differ.
        """
        known = self.prototypes.detach().cpu().any(dim=1)
        bias = torch.zeros(len(known)).masked_fill(~known, -torch.inf)
        return LinearClassifier(float(self.scale) * self.prototypes.detach().float().cpu(), bias)

    def to(self, device: torch.device | str) -> CosineHead:
        """The same on another device."""
        return CosineHead(self.prototypes.to(device), self.scale)

    def __call__(self, features: Tensor, allowed: Sequence[int] | None = None) -> Tensor:
        """Logits (..., classes) of features (..., dim), float32 also under autocast.

        `allowed` as in `mask_logits`. Raises MismatchError for features of another width.
        """
        if features.shape[-1] != self.prototypes.shape[1]:
            raise MismatchError(
                f"features of width {features.shape[-1]}",
                expected=f"width {self.prototypes.shape[1]}",
            )
        with torch.autocast(features.device.type, enabled=False):
            cosines = F.linear(F.normalize(features.float(), dim=-1), self.prototypes)
        unknown = ~self.prototypes.any(dim=1)
        logits = (self.scale * cosines).masked_fill(unknown, -torch.inf)
        return logits if allowed is None else mask_logits(logits, allowed)


def prototype_head(features: Tensor, labels: Tensor, classes: int, scale: float) -> CosineHead:
    """The head of class prototypes from features (n, dim) with labels (n,), each below `classes`.

    Classes without a feature stay unknown. Raises DataError for a feature that is zero or not
    finite: it has no direction.
    """
    wide = exact(features)
    norms = wide.norm(dim=1, keepdim=True)
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise DataError("a feature is zero or not finite", expected="features with a direction")
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels.cpu(), wide / norms)
    known = labels.unique().cpu()
    return CosineHead.of_classes(sums[known], known, classes, scale)
