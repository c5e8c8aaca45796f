"""Random features of features, and ridge regression on them from running moments.

    h = ReLU(W f),   W (width, dim) normal, drawn once

A linear rule on h tells classes apart that no linear rule on f does, and it is still solved from
moments that add up over tasks (RanPAC: McDonnell et al. 2023). The moments are those of h beside
the one-hot label y, Σ (h, y)(h, y)ᵀ. They are kept as a factor R (k, width + classes) with RᵀR
equal to them: k is at most the number of samples, and at most width + classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.devices import exact
from memtool.errors import ConfigError, CorruptError, DataError, MismatchError

PENALTIES = tuple(10.0**power for power in range(-8, 9))
"""λ among which training folds choose, as published."""

FOLDS = 5
"""One of so many samples of a class is held out to choose λ: a cut of 80 to 20."""

_DOUBLE = 8


@dataclass(frozen=True, eq=False)
class Projection:
    """h = ReLU(W f): `weight` W (width, dim), float32."""

    weight: Tensor

    @classmethod
    def drawn(cls, dim: int, width: int, seed: int) -> Projection:
        """W from the standard normal distribution, by a generator of its own."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(width, dim, generator=generator))

    @property
    def width(self) -> int:
        """Width of h."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """Width of f."""
        return self.weight.shape[1]

    def to(self, device: torch.device | str) -> Projection:
        """The same on another device."""
        return Projection(self.weight.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        """ReLU(W f) (..., width) of features f (..., dim), in their type but float32 at least.

        Raises MismatchError for features of another width.
        """
        if features.shape[-1] != self.dim:
            raise MismatchError(
                f"features of width {features.shape[-1]}", expected=f"width {self.dim}"
            )
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(dtype), self.weight.to(dtype)).relu()


class ProjectedMoments:
    """Moments of h = ReLU(W f) beside one-hot labels, as their factor; float64 on the CPU.

    `factor` is R (k, width + classes). `errors` (len(PENALTIES),) are squared errors on held-out
    samples by λ, summed over all that `measure` was given; zero without. W is the `Projection` of
    `seed`.
    """

    SHAPES: ClassVar[Mapping[str, str]] = {
        "factor": "?float64 k w",
        "errors": "?float64 e",
        "drawn": "?int64 n",
        "last": "?d",
    }
    """What `tensors` are called, and their shapes, as `read_tensors` has them."""

    def __init__(self, dim: int, width: int, seed: int, classes: int = 0) -> None:
        """No features yet."""
        self.dim, self.width, self.seed = dim, width, seed
        self.factor = torch.zeros(0, width + classes, dtype=torch.float64)
        self.errors = torch.zeros(len(PENALTIES), dtype=torch.float64)

    @cached_property
    def projection(self) -> Projection:
        """W."""
        return Projection.drawn(self.dim, self.width, self.seed)

    @property
    def classes(self) -> int:
        """Number of classes, seen or not."""
        return self.factor.shape[1] - self.width

    def without(self) -> ProjectedMoments:
        """The same projection, of no features."""
        return ProjectedMoments(self.dim, self.width, self.seed, self.classes)

    def grow(self, classes: int) -> None:
        """Have room for at least that many classes."""
        self.factor = F.pad(self.factor, (0, max(0, classes - self.classes)))

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Count features (n, dim) with integer labels (n,), each below `classes`."""
        self._append(self._rows(features, labels))

    def merge(self, other: ProjectedMoments) -> None:
        """Count what `other` counted as well. Raises MismatchError for another projection."""
        mine, theirs = ((m.dim, m.width, m.seed) for m in (self, other))
        if mine != theirs:
            raise MismatchError(
                "random projections of {} features to {}, seed {}".format(*theirs),
                expected="{} features to {}, seed {}".format(*mine),
                remedy="head.width and --seed as the memory was made with",
            )
        self.grow(other.classes)
        self._append(F.pad(other.factor, (0, self.classes - other.classes)))
        self.errors = self.errors + other.errors

    def measure(self, features: Tensor, labels: Tensor) -> None:
        """Add the errors by λ on one of five of these features (n, dim), learned from the others.

        labels (n,). The fifth, tenth … of every class is held out, in the order given. A rule is
        solved from these features alone, as published; what was counted before plays no part.
        """
        rows = self._rows(features, labels)
        one_hot = rows[:, self.width :]
        place = (one_hot.cumsum(dim=0) * one_hot).sum(dim=1)  # 1, 2, … within the class
        held = place.remainder(FOLDS) == 0
        if not bool(held.any()):
            return
        fitted = ProjectedMoments(self.dim, self.width, self.seed, self.classes)
        fitted._append(rows[~held])
        h, y = rows[held].split([self.width, self.classes], dim=1)
        kernel, centred, targets, mean, prior = fitted._system(small=True)
        values, vectors = torch.linalg.eigh(kernel)
        seen = vectors.T @ (centred @ (h - mean).T)  # (k, held)
        told = vectors.T @ targets  # (k, classes)
        for place_of, penalty in enumerate(PENALTIES):
            shrunk = told / (values.clamp_min(0) + penalty).unsqueeze(1)
            self.errors[place_of] += (y - prior - seen.T @ shrunk).square().sum()

    def ridge(self, strength: float | None) -> tuple[Tensor, Tensor]:
        """Least squares of the one-hot label on h: weight (classes, width), bias (classes,).

        The intercept is not penalised. λ = strength · trace / width of the centred second moment
        of h, so that it is relative to the data; without a strength, that with the least error on
        held-out samples. float64; a bias of −infinity for classes without samples.

        Raises DataError for no samples and where no λ was measured, ConfigError for a strength that
        is not positive or too small.
        """
        if strength is not None and not 0 < strength < math.inf:
            raise ConfigError(f"ridge of {strength}", expected="a positive, finite number")
        small = self.factor.shape[0] <= self.width
        system, centred, targets, mean, prior = self._system(small=small)
        size = centred.square().sum() / self.width
        penalty = self._chosen() if strength is None else float(strength * size)
        penalty = penalty or 1.0  # vectors that are all the same: any penalty gives weight zero
        system.diagonal().add_(penalty)
        solved, failed = torch.linalg.cholesky_ex(system)
        if int(failed):
            raise ConfigError(
                f"a penalty of {penalty:.3g} is too small for this data: its moments are singular "
                "in float64",
                remedy="a larger head.ridge",
            )
        if small:
            weight = torch.cholesky_solve(targets, solved).T @ centred
        else:
            weight = torch.cholesky_solve(centred.T @ targets, solved).T
        seen = prior > 0
        bias = (prior - weight @ mean).masked_fill(~seen, -math.inf)
        return weight.masked_fill(~seen.unsqueeze(1), 0.0), bias

    def tensors(self) -> dict[str, Tensor]:
        """What a blob holds of it: the factor with the fewest rows, errors, and what W was."""
        return {
            "factor": _compressed(self.factor),
            "errors": self.errors,
            "drawn": torch.tensor([self.width, self.seed]),
            "last": self.projection.weight[-1],
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: str) -> ProjectedMoments | None:
        """What `tensors` gave, checked; None of a file without any.

        W is drawn anew and must end as it did. Raises CorruptError that names `where` where it does
        not, or where parts do not fit.
        """
        known = [name for name in cls.SHAPES if name in tensors]
        if not known:
            return None
        if len(known) < len(cls.SHAPES):
            raise CorruptError(f"{where} holds only {', '.join(known)} of a random projection")
        factor, last = tensors["factor"], tensors["last"]
        width, seed = [*tensors["drawn"].tolist(), 0, 0][:2]
        classes = len(tensors["counts"])
        drawable = width > 0 and 0 <= seed < 2**63 and len(tensors["drawn"]) == 2
        fits = factor.shape[1] == width + classes and len(tensors["errors"]) == len(PENALTIES)
        if not drawable or not fits:
            raise CorruptError(
                f"{where} holds moments (h, y) {factor.shape[1]} wide",
                expected=f"a projection {width} wide and {classes} classes",
            )
        made = cls(len(last), width, seed, classes)
        if not torch.equal(made.projection.weight[-1], last):
            raise CorruptError(
                f"{where} is of a random projection that this torch does not draw from seed {seed}",
                remedy="the torch that the memory was made with, or another --store",
            )
        made.factor, made.errors = factor, tensors["errors"]
        return made

    def _rows(self, features: Tensor, labels: Tensor) -> Tensor:
        """(h, y) (n, width + classes) of features (n, dim) and labels (n,)."""
        h = self.projection(exact(features))
        one_hot = F.one_hot(labels.detach().to("cpu").long(), max(1, self.classes))
        return torch.cat([h, one_hot.double()[:, : self.classes]], dim=1)

    def _append(self, rows: Tensor) -> None:
        self.factor = torch.cat([self.factor, rows])
        if self.factor.shape[0] > 2 * self.factor.shape[1]:
            self.factor = _compressed(self.factor)

    def _system(self, *, small: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The matrix to which λ is added, and centred h, y, mean of h and shares of the classes.

        With X the centred rows of h: X Xᵀ (k, k) if `small`, else Xᵀ X (width, width).
        """
        h, y = self.factor.split([self.width, self.classes], dim=1)
        counts = y.square().sum(dim=0).round()
        total = counts.sum()
        if float(total) == 0:
            raise DataError("statistics of no vectors", remedy="add some before solving")
        ones = y.sum(dim=1)  # what became of the constant one
        mean = h.T @ ones / total
        centred = h - ones.unsqueeze(1) * mean
        system = centred @ centred.T if small else centred.T @ centred
        prior = counts / total
        return system, centred, y - ones.unsqueeze(1) * prior, mean, prior

    def _chosen(self) -> float:
        """The λ with the least error."""
        if not bool(self.errors.any()):
            raise DataError(
                "no λ was measured on held-out samples: no class of a task has five",
                remedy="--set head.penalty=trace",
            )
        return PENALTIES[int(self.errors.argmin())]


@dataclass(frozen=True)
class ProjectionBytes:
    """Bytes in float64: `kept` by the factors of all tasks, in the store too; `solving` beside.

    Solving takes the factor of all samples, the same centred, and a system twice.
    """

    kept: int
    solving: int

    @property
    def total(self) -> int:
        """Both."""
        return self.kept + self.solving

    @classmethod
    def of(cls, width: int, classes: int, samples: Sequence[int]) -> ProjectionBytes:
        """Of tasks with so many samples."""
        columns = width + classes
        kept = sum(min(count, columns) for count in samples) * columns
        rows = min(sum(samples), 2 * columns)
        side = rows if rows <= width else width
        return cls(kept * _DOUBLE, (2 * rows * columns + 2 * side**2) * _DOUBLE)


def _compressed(factor: Tensor) -> Tensor:
    """A factor of the same moments that has as few rows as columns, or fewer."""
    return torch.linalg.qr(factor, mode="r").R
