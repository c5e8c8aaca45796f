"""Running counts, sums and second moments of labelled vectors, and the linear rules they give.

Ridge regression onto the one-hot label, linear discriminant analysis and the nearest class mean
need no more of the data than these moments. They add up, so vectors may come in any order and any
batches, class after class, and the rules are those of all vectors at once: nothing is replayed and
nothing forgotten. All of it is float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from memtool.devices import exact
from memtool.errors import ConfigError, CorruptError, DataError, MismatchError
from memtool.tensor_bytes import read_tensors

# Below this share of the raw second moment, a centred one is what rounding left of it.
_ROUNDING = 1e-12


class LinearRule(NamedTuple):
    """Scores x · weightᵀ + bias: weight (groups, classes, dim), bias (groups, classes), float64."""

    weight: Tensor
    bias: Tensor


class Moments:
    """Moments of vectors (dim,) by class, for several independent groups with the same labels.

    counts (classes,), sums (groups, classes, dim), and second (groups, dim, dim) = Σ x xᵀ over all
    classes. A block of a backbone, or a head, is a group. `reach` (groups,) says how far from their
    class means nearly all of the vectors lie, where that was measured (`memories.novelty`).
    """

    def __init__(self, groups: int, dim: int, classes: int = 0) -> None:
        """No vectors yet."""
        self.counts = torch.zeros(classes, dtype=torch.float64)
        self.sums = torch.zeros(groups, classes, dim, dtype=torch.float64)
        self.second = torch.zeros(groups, dim, dim, dtype=torch.float64)
        self.reach: Tensor | None = None

    @property
    def groups(self) -> int:
        """Number of independent groups."""
        return self.sums.shape[0]

    @property
    def classes(self) -> int:
        """Number of classes, seen or not."""
        return self.sums.shape[1]

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.sums.shape[2]

    def grow(self, classes: int) -> None:
        """Have room for at least that many classes."""
        new = max(0, classes - self.classes)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(new)])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(self.groups, new, self.dim)], dim=1)

    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Count vectors (groups, n, dim) with integer labels (n,), each below `classes`.

        Raises MismatchError for shapes or labels that do not fit, DataError for numbers that are
        not finite; nothing is counted then.
        """
        vectors = exact(vectors)
        labels = labels.detach().to("cpu")
        fits = vectors.ndim == 3 and vectors.shape[::2] == (self.groups, self.dim)
        if not fits or labels.shape != vectors.shape[1:2]:
            raise MismatchError(
                f"vectors {tuple(vectors.shape)} with labels {tuple(labels.shape)}",
                expected=f"({self.groups}, n, {self.dim}) and (n,)",
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise MismatchError(f"labels of type {labels.dtype}", expected="integers")
        if len(labels) == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.classes:
            raise MismatchError(
                f"labels from {low} to {high}",
                expected=f"labels from 0 to {self.classes - 1}",
                remedy="grow the statistics before a task with new classes",
            )
        if not bool(vectors.isfinite().all()):
            raise DataError(
                "vectors that are not finite (NaN or infinity)",
                expected="finite numbers; one other would spoil the statistics for good",
            )
        labels = labels.long()
        self.reach = None
        self.counts += torch.bincount(labels, minlength=self.classes)
        self.sums.index_add_(1, labels, vectors)
        self.second += vectors.mT @ vectors

    def merge(self, other: Moments) -> None:
        """Count what `other` counted as well. Raises MismatchError when groups or width differ."""
        if (self.groups, self.dim) != (other.groups, other.dim):
            raise MismatchError(
                f"statistics of {other.groups} x {other.dim}",
                expected=f"{self.groups} x {self.dim} (groups x width)",
            )
        self.reach = None
        self.grow(other.classes)
        self.counts[: other.classes] += other.counts
        self.sums[:, : other.classes] += other.sums
        self.second += other.second

    def means(self) -> Tensor:
        """Class means (groups, classes, dim); zero for a class without vectors."""
        return self.sums / self.counts.clamp(min=1).unsqueeze(-1)

    def nearest_mean(self) -> LinearRule:
        """Scores of which the largest belongs to the nearest class mean.

        −|x − m|²/2 without the terms that all classes share: (m − m̄)·x − (m − m̄)·(m + m̄)/2, taken
        from the overall mean m̄ so that float32 can hold it.
        """
        means, overall = self.means(), self._overall_mean()
        weight = means - overall
        return self._rule(weight, -(weight * (means + overall)).sum(dim=-1) / 2)

    def ridge(self, strength: float) -> LinearRule:
        """Least squares onto the one-hot label, with an intercept that is not penalised.

        The penalty is strength · trace / dim of the centred second moment, so `strength` is
        relative to the data and holds for any number of vectors, fewer than `dim` included.
        """
        if not 0 < strength < math.inf:
            raise ConfigError(f"ridge of {strength}", expected="a positive, finite number")
        overall = self._overall_mean()
        scatter = self.second - self.counts.sum() * overall.mT @ overall
        # Vectors that are all the same leave no trace; any penalty then gives weight zero.
        penalty = _mean_diagonal(scatter).maximum(_ROUNDING * _mean_diagonal(self.second))
        penalty = torch.where(penalty > 0, strength * penalty, 1.0)
        targets = self.sums - self.counts.unsqueeze(-1) * overall
        weight = _solve(scatter + _diagonal(penalty, self.dim), targets, f"ridge {strength}")
        bias = self.counts / self.counts.sum() - (weight * overall).sum(dim=-1)
        return self._rule(weight, bias)

    def lda(self, shrinkage: float, *, equal_priors: bool) -> LinearRule:
        """Log posteriors under Gaussian classes of one covariance, up to a term all classes share.

        The covariance is the pooled within-class one, (1 − shrinkage) Σ + shrinkage · trace / dim ·
        I; its pseudo-inverse is used at shrinkage 0. Priors are the shares of the counts, or equal.
        Raises DataError when no class has two different vectors.
        """
        if not 0 <= shrinkage <= 1:
            raise ConfigError(f"shrinkage of {shrinkage}", expected="a number from 0 to 1")
        means, overall = self.means(), self._overall_mean()
        within = self.second - (self.counts.unsqueeze(-1) * means).mT @ means
        size = _mean_diagonal(within)
        if bool((size <= _ROUNDING * _mean_diagonal(self.second)).any()):
            raise DataError(
                "no class has two different vectors, so there is no covariance within classes",
                remedy="more samples, or ncm or ridge",
            )
        within = (1 - shrinkage) * within + _diagonal(shrinkage * size, self.dim)
        within = within / self.counts.sum()
        centred = means - overall
        if shrinkage > 0:
            weight = _solve(within, centred, f"shrinkage {shrinkage}")
        else:
            weight = centred @ torch.linalg.pinv(within, hermitian=True)
        bias = -(weight * (means + overall)).sum(dim=-1) / 2
        if not equal_priors:
            bias = bias + torch.log(self.counts / self.counts.sum())
        return self._rule(weight, bias)

    SHAPES: ClassVar[Mapping[str, str]] = {
        "counts": "float64 c",
        "sums": "float64 g c d",
        "second": "float64 g d d",
        "reach": "?float64 g",
    }
    """What `tensors` are called, and their shapes, as `read_tensors` has them."""

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of them."""
        tensors = {"counts": self.counts, "sums": self.sums, "second": self.second}
        if self.reach is not None:
            tensors["reach"] = self.reach
        return tensors

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return save({name: tensor.contiguous() for name, tensor in self.tensors().items()})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Moments:
        """What `to_bytes` wrote; `where` names it in errors. Raises CorruptError otherwise."""
        return cls.from_tensors(read_tensors(data, where, **cls.SHAPES), where)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: str) -> Moments:
        """What `tensors` gave, checked as `from_bytes` does."""
        counts, sums = tensors["counts"], tensors["sums"]
        if sums.shape[0] == 0 or sums.shape[2] == 0 or bool((counts < 0).any()):
            raise CorruptError(f"{where} holds moments of nothing, shape {tuple(sums.shape)}")
        if not all(bool(one.isfinite().all()) for one in (counts, sums, tensors["second"])):
            raise CorruptError(f"{where} holds moments that are not finite")
        moments = cls(sums.shape[0], sums.shape[2], 0)
        moments.counts, moments.sums, moments.second = counts, sums, tensors["second"]
        moments.reach = tensors.get("reach")
        if moments.reach is not None and not bool((moments.reach > 0).all()):
            raise CorruptError(f"{where} holds vectors that lie nowhere: reach {moments.reach}")
        return moments

    def _overall_mean(self) -> Tensor:
        """The mean (groups, 1, dim) of all vectors. Raises DataError when there is none."""
        if float(self.counts.sum()) == 0:
            raise DataError("statistics of no vectors", remedy="add some before solving")
        return self.sums.sum(dim=1, keepdim=True) / self.counts.sum()

    def _rule(self, weight: Tensor, bias: Tensor) -> LinearRule:
        """The rule, with a score of −infinity for classes without vectors."""
        seen = self.counts > 0
        return LinearRule(
            weight.masked_fill(~seen.unsqueeze(-1), 0.0), bias.masked_fill(~seen, -math.inf)
        )


def _mean_diagonal(matrix: Tensor) -> Tensor:
    """Trace over width (groups,) of matrices (groups, dim, dim)."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def _diagonal(size: Tensor, dim: int) -> Tensor:
    """Diagonal matrices size · I (groups, dim, dim) of sizes (groups,)."""
    return size[:, None, None] * torch.eye(dim, dtype=torch.float64)


def _solve(matrix: Tensor, rows: Tensor, setting: str) -> Tensor:
    """Products rows · matrix⁻¹ (groups, c, dim); matrices (groups, dim, dim) positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise ConfigError(
            f"{setting} is too small for this data: its moments are singular in float64",
            remedy="a larger one",
        )
    return torch.cholesky_solve(rows.mT, factor).mT
