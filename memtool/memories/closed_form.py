"""Keys in closed form: what the queries of every task looked like decides what finds its adapter.

A block's queries are counted once per task, exactly and without replay; from the moments follow
keys by linear discriminant analysis, by ridge regression or by the mean query. Keys have one entry
more than the queries counted here: the bias that meets the constant 1 of `QueryModule`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from memtool.errors import ConfigError, DataError, MismatchError, did_you_mean
from memtool.memories.moments import LinearRule, Moments
from memtool.memories.novelty import reach
from memtool.memories.similarity import SIMILARITIES

SHRINKAGE = 1e-3
"""Of the covariance of what tells tasks apart toward a multiple of the identity; ridge as well."""


ROUNDING = 1e-9
"""Share of the queries' energy below which their differences are roundings of float32."""


class QueryStatistics:
    """Moments of the queries of every task, for each of `blocks` memories; float64 on the CPU.

    Tasks are numbered from 0, come in any order and in any number of batches. What is counted as a
    task may as well be a part of one, such as a class: see `pooled`.
    """

    def __init__(self, blocks: int, dim: int) -> None:
        """No queries yet; `dim` is the width of a query without the constant 1."""
        self._moments = Moments(blocks, dim)

    @property
    def blocks(self) -> int:
        """Number of memories (L)."""
        return self._moments.groups

    @property
    def dim(self) -> int:
        """Width of a query without the constant 1 (d)."""
        return self._moments.dim

    @property
    def tasks(self) -> int:
        """Number of tasks (T): one more than the largest index added."""
        return self._moments.classes

    @property
    def counts(self) -> Tensor:
        """Queries counted by task (T,)."""
        return self._moments.counts

    @property
    def sums(self) -> Tensor:
        """Sums of the queries (L, T, d)."""
        return self._moments.sums

    @property
    def second(self) -> Tensor:
        """Second moments of the queries of all tasks (L, d, d)."""
        return self._moments.second

    @property
    def moments(self) -> Moments:
        """The moments themselves; a task is a class."""
        return self._moments

    def keep_reach(self, queries: Tensor, places: Tensor) -> None:
        """Measure how far the queries (L, n, d) lie that were counted, each of task `places` (n,).

        Counting more forgets it again.
        """
        self._moments.reach = reach(self._moments, queries, places)

    def add(self, task_index: int, queries: Tensor) -> None:
        """Count queries (L, n, d) of a task.

        Raises MismatchError for another shape, DataError for numbers that are not finite.
        """
        if task_index < 0:
            raise MismatchError(f"task index {task_index}", expected="an index from 0")
        if queries.ndim != 3:
            raise MismatchError(
                f"queries of shape {tuple(queries.shape)}",
                expected=f"({self.blocks}, n, {self.dim})",
            )
        self._moments.grow(task_index + 1)
        self._moments.add(queries, torch.full(queries.shape[1:2], task_index))

    @classmethod
    def joined(cls, parts: Iterable[QueryStatistics]) -> QueryStatistics:
        """Those of several memories' tasks, one after another: the tasks of part 0 come first.

        Of each part only its counts and sums are kept. Raises MismatchError for parts of another
        width or number of memories, or for none.
        """
        whole: QueryStatistics | None = None
        counts, sums = list[Tensor](), list[Tensor]()
        for part in parts:
            whole = cls(part.blocks, part.dim) if whole is None else whole
            seconds = Moments(part.blocks, part.dim)
            seconds.second = part.second
            whole._moments.merge(seconds)
            counts.append(part.counts)
            sums.append(part.sums)
        if whole is None:
            raise MismatchError("statistics of no task", expected="at least one")
        whole._moments.counts, whole._moments.sums = torch.cat(counts), torch.cat(sums, dim=1)
        return whole

    def pooled(self) -> QueryStatistics:
        """The same queries as those of a single task."""
        whole = QueryStatistics(self.blocks, self.dim)
        moments = whole._moments
        moments.counts = self.counts.sum(dim=0, keepdim=True)
        moments.sums = self.sums.sum(dim=1, keepdim=True)
        moments.second = self.second.clone()
        return whole

    def merge(self, other: QueryStatistics) -> None:
        """Count what `other` counted as well."""
        self._moments.merge(other._moments)

    def mean_keys(self) -> Tensor:
        """Mean queries (L, T, d + 1) of the tasks, float32; the last entry is the mean of the 1s.

        They are points among the queries and fit every similarity as they are.
        """
        self._check()
        means = self._moments.means()
        return torch.cat([means, torch.ones_like(means[..., :1])], dim=-1).float()

    def lda_keys(self, shrinkage: float = 1e-2, *, equal_priors: bool = True) -> Tensor:
        """Keys (L, T, d + 1), float32, with [q, 1]·k = log p(task | q) + a term tasks share.

        Gaussian queries of one covariance, shrunk toward trace / d · I. See `for_similarity`.
        """
        self._check()
        return _homogeneous(self._moments.lda(shrinkage, equal_priors=equal_priors))

    def ridge_keys(self, ridge: float = 1e-2) -> Tensor:
        """Keys (L, T, d + 1), float32, with [q, 1]·k ≈ 1 for the task of q, 0 for the others.

        Least squares onto the task's one-hot indicator, penalised by ridge · trace / d: the dot
        products are nearly one-hot coefficients, and always sum to one. See `for_similarity`.
        """
        self._check()
        return _homogeneous(self._moments.ridge(ridge))

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return self._moments.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> QueryStatistics:
        """What `to_bytes` wrote. Raises CorruptError for anything else."""
        return cls.of(Moments.from_bytes(data, where))

    @classmethod
    def of(cls, moments: Moments) -> QueryStatistics:
        """Those with these moments; a class is a task."""
        statistics = cls(moments.groups, moments.dim)
        statistics._moments = moments
        return statistics

    def _check(self) -> None:
        """Every task must have queries, or its key would be arbitrary."""
        missing = [task for task, count in enumerate(self.counts.tolist()) if count == 0]
        if missing or self.tasks == 0:
            raise DataError(
                f"no queries of task indices {missing}" if missing else "no queries of any task",
                remedy="add the queries of every task before asking for keys",
            )


def same_for_every_input(statistics: Sequence[QueryStatistics]) -> tuple[int, ...]:
    """The places of memories whose queries are the same whatever the input, of all tasks counted.

    A single input tells nothing: then there is none.
    """
    if not statistics or sum(int(part.counts.sum()) for part in statistics) < 2:
        return ()
    whole = QueryStatistics.joined([part.pooled() for part in statistics]).pooled()
    mean = whole.sums / whole.counts.sum()
    scatter = whole.second - whole.counts.sum() * mean.mT @ mean
    size = scatter.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    energy = whole.second.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return tuple(torch.nonzero(size <= ROUNDING * energy).flatten().tolist())


def for_similarity(keys: Tensor, name: str) -> Tensor:
    """Keys (L, t, d_k), made for dot products, so that the named similarity gives those scores.

    "dot": unchanged. "scaled-dot": times √d_k. "euclidean": −|q − k'|² equals the wanted score but
    for a term that all keys of a block share, which softmax, topk and affine do not see; it uses
    the last entry, the one that meets the constant 1. "cosine" forgets how long a key is, and the
    others are no dot products either: errors as `require_dot`. For keys of `lda_keys` and
    `ridge_keys`; mean queries are points, not directions, and stay as they are.
    """
    require_dot(name)
    match name:
        case "scaled-dot":
            return keys * math.sqrt(keys.shape[-1])
        case "euclidean":
            # −|q − w/2|² − (1 − c)² = q·w − |q|² − |w/2|² − (1 − c)², so c must make the last two
            # terms equal b up to a constant C that keeps every square root real.
            half, bias = keys[..., :-1].double() / 2, keys[..., -1].double()
            wanted = bias + half.square().sum(dim=-1)
            root = (wanted.amax(dim=-1, keepdim=True) - wanted).sqrt()
            return torch.cat([half, (1 - root).unsqueeze(-1)], dim=-1).to(keys.dtype)
    return keys


def require_dot(name: str) -> None:
    """Raise ConfigError for a similarity that gives no dot product, whatever its keys are."""
    if name not in SIMILARITIES:
        raise ConfigError(f"unknown similarity {name!r}", expected=did_you_mean(name, SIMILARITIES))
    if name not in ("dot", "scaled-dot", "euclidean"):
        raise ConfigError(
            f"closed-form keys for similarity {name!r}",
            expected="a similarity that sees the length of a key: dot, scaled-dot, euclidean",
            remedy="--set consolidate.keys=mean-query, or --set memory.similarity=scaled-dot",
        )


def _homogeneous(rule: LinearRule) -> Tensor:
    """Weights and bias as keys (L, T, d + 1), float32."""
    return torch.cat([rule.weight, rule.bias.unsqueeze(-1)], dim=-1).float()
