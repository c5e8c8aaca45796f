"""Analytic heads: classifiers solved from running statistics of the features.

Class counts, class sums and the shared second moment are exact over tasks in any order and any
batches, so the head after the last task is the one that all data at once would give: nothing is
replayed and nothing forgotten, as long as the features of old classes stay what they were.
"""

from __future__ import annotations

from safetensors.torch import save
from torch import Tensor

from memtool.errors import ConfigError, MismatchError
from memtool.heads.linear import LinearClassifier
from memtool.heads.random_projection import ProjectedMoments
from memtool.memories.moments import LinearRule, Moments
from memtool.memories.novelty import reach
from memtool.tensor_bytes import read_tensors


class FeatureStatistics:
    """Counts, class sums and shared second moment of features; float64 on the CPU.

    `projected` are moments of a random projection of them, where a head needs these.
    """

    def __init__(
        self, dim: int, classes: int = 0, projected: ProjectedMoments | None = None
    ) -> None:
        """No features yet; `projected` of no features either."""
        self._moments = Moments(1, dim, classes)
        self.projected = projected

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
        if self.projected is not None:
            self.projected.grow(self.classes)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Count features (n, dim) with integer labels (n,), each below `classes`.

        Raises MismatchError for shapes or labels that do not fit, DataError for numbers that are
        not finite; nothing is counted then.
        """
        self._moments.add(features.unsqueeze(0), labels)
        if self.projected is not None:
            self.projected.add(features, labels)

    def merge(self, other: FeatureStatistics) -> None:
        """Count what `other` counted as well; the classes become those of the longer of the two.

        Raises MismatchError where one of the two counted a random projection and the other not.
        """
        if (self.projected is None) != (other.projected is None):
            raise MismatchError(
                "features of some tasks were counted under a random projection, others not",
                remedy="another --store: head.kind rp-ridge is for a memory from its first task on",
            )
        if self.projected is not None and other.projected is not None:
            self.projected.merge(other.projected)
        self._moments.merge(other._moments)

    def ncm(self) -> LinearClassifier:
        """The nearest class mean, as linear scores."""
        return _classifier(self._moments.nearest_mean())

    def ridge(self, strength: float = 1e-2) -> LinearClassifier:
        """Ridge regression onto the one-hot label, with a free intercept.

        The penalty is strength · trace / dim of the centred second moment.
        """
        return _classifier(self._moments.ridge(strength))

    def rp_ridge(self, strength: float | None = 1e-2) -> LinearClassifier:
        """`ridge` on a random projection; without a strength its penalty is that of least error.

        Raises ConfigError where no projection of these features was counted.
        """
        if self.projected is None:
            raise ConfigError(
                "features that were not counted under a random projection",
                expected="a memory whose first task was consolidated with head.kind rp-ridge",
                remedy="--set head.kind=ridge, or a new --store",
            )
        weight, bias = self.projected.ridge(strength)
        return LinearClassifier(weight.float(), bias.float(), self.projected.projection)

    def lda(self, shrinkage: float = 1e-2, *, equal_priors: bool = False) -> LinearClassifier:
        """Linear discriminant analysis: log posteriors up to a term that all classes share.

        The pooled covariance is shrunk toward trace / dim · I by `shrinkage` from 0 to 1. Raises
        DataError when no class has two different features.
        """
        return _classifier(self._moments.lda(shrinkage, equal_priors=equal_priors))

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        projected = {} if self.projected is None else self.projected.tensors()
        tensors = {**self._moments.tensors(), **projected}
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> FeatureStatistics:
        """What `to_bytes` wrote. Raises CorruptError for anything else."""
        tensors = read_tensors(data, where, **Moments.SHAPES, **ProjectedMoments.SHAPES)
        moments = Moments.from_tensors(tensors, where)
        if moments.groups != 1:
            raise MismatchError(
                f"statistics of {moments.groups} groups",
                expected="one group: the features of a head, not the queries of blocks",
            )
        statistics = cls(moments.dim, projected=ProjectedMoments.from_tensors(tensors, where))
        statistics._moments = moments
        return statistics


def _classifier(rule: LinearRule) -> LinearClassifier:
    return LinearClassifier(rule.weight[0].float(), rule.bias[0].float())
