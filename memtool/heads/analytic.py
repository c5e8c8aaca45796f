"""Analytic heads: classifiers solved from running statistics of the features.

Class counts, class sums and the shared second moment are exact over tasks in any order and any
batches, so the head after the last task is the one that all data at once would give: nothing is
replayed and nothing forgotten, as long as the features of old classes stay what they were.
"""

from __future__ import annotations

from torch import Tensor

from memtool.errors import MismatchError
from memtool.heads.linear import LinearClassifier
from memtool.memories.moments import LinearRule, Moments
from memtool.memories.novelty import reach


class FeatureStatistics:
    """Counts, class sums and shared second moment of features; float64 on the CPU."""

    def __init__(self, dim: int, classes: int = 0) -> None:
        """No features yet."""
        self._moments = Moments(1, dim, classes)

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self._moments.dim

    @property
    def classes(self) -> int:
        """Number of classes, seen or not."""
        return self._moments.classes

    @property
    def counts(self) -> Tensor:
        """Features counted by class (classes,)."""
        return self._moments.counts

    @property
    def sums(self) -> Tensor:
        """Sums of the features by class (classes, dim)."""
        return self._moments.sums[0]

    @property
    def second(self) -> Tensor:
        """Second moment of the features of all classes (dim, dim)."""
        return self._moments.second[0]

    @property
    def moments(self) -> Moments:
        """The moments themselves, of one group."""
        return self._moments

    def keep_reach(self, features: Tensor, labels: Tensor) -> None:
        """Measure how far the features (n, dim) lie that were counted, with these labels (n,).

        Counting more forgets it again.
        """
        self._moments.reach = reach(self._moments, features.unsqueeze(0), labels)

    def grow(self, new_classes: int) -> None:
        """Have room for so many more classes."""
        if new_classes < 0:
            raise MismatchError(f"growth by {new_classes} classes", expected="0 or more")
        self._moments.grow(self.classes + new_classes)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Count features (n, dim) with integer labels (n,), each below `classes`.

        Raises MismatchError for shapes or labels that do not fit, DataError for numbers that are
        not finite; nothing is counted then.
        """
        self._moments.add(features.unsqueeze(0), labels)

    def merge(self, other: FeatureStatistics) -> None:
        """Count what `other` counted as well; the classes become those of the longer of the two."""
        self._moments.merge(other._moments)

    def ncm(self) -> LinearClassifier:
        """The nearest class mean, as linear scores."""
        return _classifier(self._moments.nearest_mean())

    def ridge(self, strength: float = 1e-2) -> LinearClassifier:
        """Ridge regression onto the one-hot label, with a free intercept.

        The penalty is strength · trace / dim of the centred second moment.
        """
        return _classifier(self._moments.ridge(strength))

    def lda(self, shrinkage: float = 1e-2, *, equal_priors: bool = False) -> LinearClassifier:
        """Linear discriminant analysis: log posteriors up to a term that all classes share.

        The pooled covariance is shrunk toward trace / dim · I by `shrinkage` from 0 to 1. Raises
        DataError when no class has two different features.
        """
        return _classifier(self._moments.lda(shrinkage, equal_priors=equal_priors))

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return self._moments.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> FeatureStatistics:
        """What `to_bytes` wrote. Raises CorruptError for anything else."""
        moments = Moments.from_bytes(data, where)
        if moments.groups != 1:
            raise MismatchError(
                f"statistics of {moments.groups} groups",
                expected="one group: the features of a head, not the queries of blocks",
            )
        statistics = cls(moments.dim)
        statistics._moments = moments
        return statistics


def _classifier(rule: LinearRule) -> LinearClassifier:
    return LinearClassifier(rule.weight[0].float(), rule.bias[0].float())
