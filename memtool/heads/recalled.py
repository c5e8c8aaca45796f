"""The head that retrieval ends in: one for all tasks, or every task's own, mixed as its adapter.

With a head per task the classifier is recalled like the adapter: p(y | x) = Σ_t a_t p_t(y | x),
with p_t the softmax of task t's head and a_t the sum of the coefficients of its adapters. For
coefficients that are posteriors of the task this is Bayes' rule. Negative ones subtract, as they
do in the mixture of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from memtool.devices import at_hand, without_autocast
from memtool.errors import CorruptError, MismatchError
from memtool.heads.linear import LinearClassifier
from memtool.heads.prototype import CosineHead
from memtool.heads.random_projection import Projection
from memtool.tensor_bytes import read_tensors

LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True, eq=False)
class RecalledHead:
    """Stacked heads: weight (h, classes, dim), bias (h, classes).

    `owners` (t,) says to which head each adapter belongs; None: one head for all (h = 1). A bias
    of −inf marks a class that the head never saw. With a `projection` all heads are linear in what
    it makes of the features, and dim is its width. With `of_directions` features are brought to
    length one before.
    """

    weight: Tensor
    bias: Tensor
    owners: Tensor | None
    projection: Projection | None = None
    of_directions: bool = False

    @classmethod
    def of_cosines(cls, head: CosineHead) -> RecalledHead:
        """One head for all tasks, with the logits of a head that reads directions; on the CPU."""
        return replace(cls.shared(head.linear()), of_directions=True)

    @classmethod
    def shared(cls, classifier: LinearClassifier) -> RecalledHead:
        """One classifier for all tasks."""
        return cls(classifier.weight[None], classifier.bias[None], None, classifier.projection)

    @classmethod
    def of_tasks(
        cls, classifiers: Sequence[LinearClassifier], owners: Sequence[int]
    ) -> RecalledHead:
        """A classifier per task; `owners[i]` is the place of adapter i's task.

        All have one projection, or none.
        """
        if max(owners) >= len(classifiers):
            raise MismatchError(
                f"adapters of task place {max(owners)}", expected=f"{len(classifiers)} heads"
            )
        return cls(
            torch.stack([one.weight for one in classifiers]),
            torch.stack([one.bias for one in classifiers]),
            torch.tensor(owners),
            classifiers[0].projection,
        )

    @property
    def classes(self) -> int:
        """Number of classes, seen or not."""
        return self.weight.shape[1]

    def to(self, device: torch.device | str) -> RecalledHead:
        """The same on another device."""
        owners = None if self.owners is None else self.owners.to(device)
        projection = None if self.projection is None else self.projection.to(device)
        weight, bias = self.weight.to(device), self.bias.to(device)
        return RecalledHead(weight, bias, owners, projection, self.of_directions)

    def __call__(
        self, features: Tensor, coefficients: Tensor, allowed: Sequence[int] | None = None
    ) -> Tensor:
        """Scores (b, classes) of features (b, dim) under coefficients (b, t); the highest wins.

        Logits for a shared head, mixed probabilities for heads of tasks. Classes that are not
        `allowed` get −inf or 0. float32, also under autocast.
        """
        with without_autocast(features):
            if self.owners is None:
                return self._logits(features, allowed)[:, 0]
            head, weights = self._asked(coefficients)
            logits = head._logits(features, allowed)
            known = torch.isfinite(logits).any(dim=-1, keepdim=True)
            probabilities = torch.where(known, logits, 0).softmax(dim=-1) * known
            return torch.einsum("bt,btc->bc", weights, probabilities)

    def log_probabilities(
        self, features: Tensor, coefficients: Tensor, allowed: Sequence[int] | None = None
    ) -> Tensor:
        """Log-probabilities (b, classes), for a cross-entropy that learns the coefficients.

        Heads of tasks are mixed in the logarithm, log p = log softmax Σ_t a_t log p_t: the same for
        one-hot coefficients, and a bounded loss with a gradient for all others, negative ones too.
        """
        with without_autocast(features):
            if self.owners is None:
                return self._logits(features, allowed)[:, 0].log_softmax(dim=-1)
            head, weights = self._asked(coefficients)
            logits = head._logits(features, allowed)
            known = torch.isfinite(logits).any(dim=-1, keepdim=True)
            each = torch.where(known, logits, 0).log_softmax(dim=-1)
            each = each.clamp_min(math.log(LEAST_PROBABILITY)) * known
            mixed = torch.einsum("bt,btc->bc", weights, each)
            if allowed is not None:
                mixed = mixed + self._mask(allowed)
            return mixed.log_softmax(dim=-1)

    def _mask(self, allowed: Sequence[int]) -> Tensor:
        mask = torch.full_like(self.bias[0], -torch.inf)
        mask[list(allowed)] = 0.0
        return mask

    def _weights(self, coefficients: Tensor) -> Tensor:
        """The coefficients (b, t) summed by task: (b, h)."""
        assert self.owners is not None
        # Not by its length, which is a constant in a program of torch.export.
        summed = self.weight.new_zeros(coefficients.shape[0], len(self.weight))
        return summed.index_add(1, self.owners, coefficients.to(summed.dtype))

    def _asked(self, coefficients: Tensor) -> tuple[RecalledHead, Tensor]:
        """The heads that have a weight for an input of the batch, and these weights (b, heads).

        All of them where coefficients learn, as one of zero has a slope, too; and where the weights
        are not `at_hand`.
        """
        weights = self._weights(coefficients)
        learns = coefficients.requires_grad and torch.is_grad_enabled()
        if learns or not at_hand(weights):
            return self, weights
        used = weights.any(dim=0).nonzero()[:, 0]
        if len(used) == len(self.weight):
            return self, weights
        some = replace(self, weight=self.weight[used], bias=self.bias[used])
        return some, weights[:, used]

    def _logits(self, features: Tensor, allowed: Sequence[int] | None) -> Tensor:
        """Logits (b, heads, classes)."""
        if self.of_directions:
            features = F.normalize(features.float(), dim=-1)
        if self.projection is not None:
            features = self.projection(features)
        if features.shape[-1] != self.weight.shape[-1]:
            raise MismatchError(
                f"features of width {features.shape[-1]}", expected=f"width {self.weight.shape[-1]}"
            )
        flat = F.linear(features.float(), self.weight.flatten(0, 1), self.bias.flatten())
        logits = flat.unflatten(-1, self.bias.shape)
        return logits if allowed is None else logits + self._mask(allowed)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores of `__call__` as probabilities (b, classes)."""
        if self.owners is None:
            return scores.softmax(dim=-1)
        kept = scores.clamp_min(0)
        return kept / kept.sum(dim=-1, keepdim=True).clamp_min(LEAST_PROBABILITY)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        if self.owners is not None:
            tensors["owners"] = self.owners.contiguous()
        if self.projection is not None:
            tensors["projection"] = self.projection.weight.contiguous()
        return save({name: tensor.cpu() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> RecalledHead:
        """What `to_bytes` wrote; `where` names it in errors. Raises CorruptError."""
        tensors = read_tensors(
            data, where, weight="h c d", bias="h c", owners="?int64 t", projection="?d f"
        )
        weight, owners = tensors["weight"], tensors.get("owners")
        if weight.numel() == 0 or (owners is None and len(weight) != 1):
            raise CorruptError(f"{where} holds weights of shape {tuple(weight.shape)}")
        if owners is not None and not bool(((owners >= 0) & (owners < len(weight))).all()):
            raise CorruptError(f"{where} names owners that are none of its {len(weight)} heads")
        drawn = tensors.get("projection")
        projection = None if drawn is None else Projection(drawn)
        return cls(weight, tensors["bias"], owners, projection)
