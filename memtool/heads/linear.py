"""Linear classifiers: one that is trained and grows with the classes, one that was solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtool.errors import ConfigError, MismatchError
from memtool.heads.random_projection import Projection


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Logits x · weightᵀ + bias: weight (classes, dim), bias (classes,), float32.

    A bias of −infinity marks a class that was never seen; its logit is −infinity. With a projection
    x is what it makes of the features, else the features themselves.
    """

    weight: Tensor
    bias: Tensor
    projection: Projection | None = None

    @property
    def classes(self) -> int:
        """Number of classes, seen or not."""
        return self.weight.shape[0]

    def to(self, device: torch.device | str) -> LinearClassifier:
        """The same on another device."""
        projection = None if self.projection is None else self.projection.to(device)
        return LinearClassifier(self.weight.to(device), self.bias.to(device), projection)

    def of_classes(self, classes: Sequence[int]) -> LinearClassifier:
        """The same with a bias of −infinity for every class that it was not trained on."""
        bias = torch.full_like(self.bias, -torch.inf)
        bias[list(classes)] = self.bias[list(classes)]
        return LinearClassifier(self.weight, bias, self.projection)

    def __call__(self, features: Tensor, allowed: Sequence[int] | None = None) -> Tensor:
        """Logits (batch, classes) of features (batch, dim), float32 also under autocast.

        Solved weights are large and cancel; bfloat16 would lose the difference. `allowed` as in
        `mask_logits`.
        """
        if self.projection is not None:
            features = self.projection(features)
        if features.shape[-1] != self.weight.shape[1]:
            raise MismatchError(
                f"features of width {features.shape[-1]}", expected=f"width {self.weight.shape[1]}"
            )
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(features.to(self.weight.dtype), self.weight, self.bias)
        return logits if allowed is None else mask_logits(logits, allowed)


class LinearHead(nn.Module):
    """A trained linear layer on features (batch, dim) that grows with the classes.

    It starts at zero: every class equally likely, nothing random, and a convex problem to solve.
    """

    def __init__(self, dim: int, classes: int) -> None:
        """Raises ConfigError for less than one feature or class."""
        super().__init__()
        if dim < 1 or classes < 1:
            raise ConfigError(f"a head of {dim} features, {classes} classes", expected="at least 1")
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.bias = nn.Parameter(torch.zeros(classes))

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.weight.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.weight.shape[0]

    def grow(self, new_classes: int) -> None:
        """Append zero rows for new classes; the old rows stay bit for bit.

        The parameters are new objects: make the optimiser afterwards.
        """
        if new_classes < 0:
            raise ConfigError(f"growth by {new_classes} classes", expected="0 or more")
        self.weight = self._longer(self.weight, new_classes)
        self.bias = self._longer(self.bias, new_classes)

    def start_from(self, classifier: LinearClassifier) -> None:
        """Take over weights (classes, dim); classes that it never saw keep the weights here."""
        if classifier.weight.shape != self.weight.shape:
            raise MismatchError(
                f"a classifier of shape {tuple(classifier.weight.shape)}",
                expected=str(tuple(self.weight.shape)),
            )
        seen = classifier.bias.isfinite()
        with torch.no_grad():
            self.weight[seen] = classifier.weight[seen].to(self.weight)
            self.bias[seen] = classifier.bias[seen].to(self.bias)

    def classifier(self) -> LinearClassifier:
        """A copy of the present weights."""
        return LinearClassifier(
            self.weight.detach().float().clone(), self.bias.detach().float().clone()
        )

    def forward(self, features: Tensor, allowed: Sequence[int] | None = None) -> Tensor:
        """Logits (batch, classes) of features (batch, dim); `allowed` as in `mask_logits`."""
        logits = F.linear(features, self.weight, self.bias)
        return logits if allowed is None else mask_logits(logits, allowed)

    @staticmethod
    def _longer(parameter: nn.Parameter, rows: int) -> nn.Parameter:
        new = parameter.new_zeros(rows, *parameter.shape[1:])
        return nn.Parameter(torch.cat([parameter.detach(), new]))


def mask_logits(logits: Tensor, allowed: Sequence[int]) -> Tensor:
    """Logits (..., classes) with −infinity for every class that is not among `allowed`.

    Raises MismatchError when `allowed` is empty or names a class that is not there.
    """
    classes = logits.shape[-1]
    if not allowed or not all(0 <= index < classes for index in allowed):
        raise MismatchError(
            f"logits masked to classes {list(allowed)[:10]}",
            expected=f"one or more of 0 to {classes - 1}",
        )
    masked = torch.ones(classes, dtype=torch.bool, device=logits.device)
    masked[torch.as_tensor(list(allowed), device=logits.device)] = False
    return logits.masked_fill(masked, float("-inf"))
