"""How far an input lies from all that a memory learned, by the moments that it keeps.

The distance of a vector from a task is Mahalanobis' from the nearest of the task's class means, by
the covariance within its classes. When a task is counted, each of its vectors is measured with
itself left out, and how far nearly all of them lie is kept: the task's `reach`. The novelty of an
input is its distance in parts of the reach of the task that is nearest; no image is read for it.
Among many tasks it is the nearest of those that the input recalls most (`TaskReaches`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtool.devices import exact
from memtool.memories.moments import Moments

LIMIT = 1.0
"""Novelty above which an input is called unlike all that was learned: it is beyond every reach.

docs/mira.md says how often new images of learned tasks are, and how often others.
"""

SHARE = 0.99
"""Of a task's own vectors that lie within its reach."""

ALL_OF, OF_MANY = 8, 4
"""Of so many tasks all say how novel an input is; of more those that it recalls most."""

HELD = 64
"""Tasks whose moments are held, of more than `ALL_OF`."""

_READING = threading.RLock()
"""Threads that ask one memory read in turn."""

SHRINKAGE = 1e-2
"""Of the covariance toward trace / dim · I, as for the discriminant head."""


def reach(task: Moments, vectors: Tensor, labels: Tensor) -> Tensor | None:
    """How far from their class means (groups,) nearly all vectors lie that a task counted.

    vectors (groups, n, dim) and labels (n,) are those that the moments are of. Every one is
    measured as if it had not been counted, so that few vectors in many dimensions do not seem
    nearer than new ones would be. None where there are too few, or only equal ones.
    """
    factor = _whitening(task)
    total, counts = task.counts.sum(), task.counts[labels]
    if factor is None or bool((counts < 2).all()):
        return None
    alone = counts > 1
    away = (exact(vectors) - task.means()[:, labels])[:, alone] @ factor
    size = counts[alone] / (counts[alone] - 1)
    squared = away.square().sum(dim=-1)
    # What a vector adds to the covariance, taken out again (Sherman and Morrison).
    left = 1 - (1 - SHRINKAGE) / total * size * squared
    if not bool((left > 0).all()):
        return None
    return (size * (squared / left).sqrt()).quantile(SHARE, dim=-1)


class Reaches(nn.Module):
    """How far tasks reach, ready to be asked: `forward(vectors)` is the novelty of vectors.

    For every task what makes its covariance the identity (groups, dim, dim), its class means under
    that (groups, classes, dim) and its reach (groups,), all float64: they stay on the CPU wherever
    the module goes, and what is asked comes to them.
    """

    def __init__(self, factors: Sequence[Tensor], means: Sequence[Tensor], reach: Tensor) -> None:
        """`reach` is (tasks, groups)."""
        super().__init__()
        self.factors = nn.ParameterList(nn.Parameter(one, requires_grad=False) for one in factors)
        self.means = nn.ParameterList(nn.Parameter(one, requires_grad=False) for one in means)
        self.reach = nn.Parameter(reach, requires_grad=False)

    @classmethod
    def of(cls, tasks: Sequence[Moments]) -> Reaches | None:
        """Those of tasks with these moments; None where a task has none, or there is no task."""
        factors, means = [], []
        for task in tasks:
            factor = _whitening(task)
            if factor is None or task.reach is None:
                return None
            factors.append(factor)
            means.append(task.means()[:, task.counts > 0] @ factor)
        if not factors:
            return None
        reach = torch.stack([task.reach for task in tasks if task.reach is not None])
        return cls(factors, means, reach)

    def forward(self, vectors: Tensor) -> Tensor:
        """The novelty (n,), float64 and on the CPU, of vectors (groups, n, dim) of any device."""
        return _over_groups(self.nearest(exact(vectors)))

    def nearest(self, vectors: Tensor) -> Tensor:
        """How far vectors (groups, n, dim) lie from the nearest task, in parts of its reach.

        (groups, n); all float64 and on the CPU.
        """
        nearest = []
        for factor, means, reach in zip(self.factors, self.means, self.reach, strict=True):
            away = _distances(vectors @ factor, means).amin(dim=-1)
            nearest.append(away / reach.unsqueeze(-1))
        return torch.stack(nearest).amin(dim=0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Stay on the CPU, in float64."""
        del fn, recurse
        return self


Read = Callable[[int], Moments | None]
"""The moments of the task at a place; None where nothing is known of it."""


class TaskReaches(nn.Module):
    """The novelty of inputs that have several looks, by the tasks that they recall.

    Of up to `ALL_OF` tasks by all of them. Of more by the `OF_MANY` that have the highest weights
    of the input, whose moments are read when they are asked for: it costs what is recalled.
    """

    owners: Tensor

    def __init__(self, tasks: int, looks: Sequence[Read], owners: Sequence[int]) -> None:
        """`looks` read the moments of each look; `owners` (t,) are the tasks of the weights."""
        super().__init__()
        self.register_buffer("owners", torch.tensor(owners, dtype=torch.int64), persistent=False)
        self._tasks, self._looks = tasks, tuple(looks)
        self._held: OrderedDict[int, list[Reaches | None]] = OrderedDict()
        self.of_all: nn.ModuleList | None = None
        if tasks <= ALL_OF:
            self.hold_all()

    def hold_all(self) -> None:
        """Read all tasks, and ask all from now on: nothing is read while inputs are looked at."""
        found = [self._reaches(read, range(self._tasks)) for read in self._looks]
        self.of_all = nn.ModuleList(one for one in found if one is not None)

    @staticmethod
    def _reaches(read: Read, places: Sequence[int]) -> Reaches | None:
        moments = [read(place) for place in places]
        known = [one for one in moments if one is not None]
        return Reaches.of(known) if len(known) == len(moments) else None

    def forward(self, looks: Sequence[Tensor], weights: Tensor) -> Tensor | None:
        """The novelty (n,), float64 on the CPU, of looks (groups, n, dim) under weights (n, t).

        NaN where nothing tells; None where that is so of all inputs.
        """
        if self.of_all is not None:
            if len(self.of_all) < len(looks):
                return None
            far = [reach(look) for reach, look in zip(self.of_all, looks, strict=True)]
        else:
            places = self.asked(weights)
            far = [_over_groups(one) for one in self._nearest(list(map(exact, looks)), places)]
        return torch.stack(far).square().mean(dim=0).sqrt()

    def asked(self, weights: Tensor) -> Tensor:
        """The places (n, k) of the tasks that have the highest weights (n, t), on the CPU."""
        by_task = weights.new_zeros(len(weights), self._tasks)
        by_task = by_task.index_add(1, self.owners, weights)
        return by_task.topk(min(OF_MANY, self._tasks), dim=1).indices.cpu()

    def _nearest(self, looks: Sequence[Tensor], places: Tensor) -> list[Tensor]:
        """Of every look how far (groups, n) its inputs lie from the nearest of their tasks."""
        found = [look.new_full(look.shape[:2], torch.inf) for look in looks]
        for place in places.unique().tolist():
            rows = (places == place).any(dim=1)
            for far, look, reach in zip(found, looks, self._of(place), strict=True):
                here = far.new_tensor(torch.nan) if reach is None else reach.nearest(look[:, rows])
                far[:, rows] = torch.minimum(far[:, rows], here)
        return found

    def _of(self, place: int) -> list[Reaches | None]:
        """The reaches of one task, a look each."""
        with _READING:
            if place not in self._held:
                self._held[place] = [self._reaches(read, [place]) for read in self._looks]
                if len(self._held) > HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(place)
            return self._held[place]


def _over_groups(nearest: Tensor) -> Tensor:
    """The root mean square (n,) over looks (groups, n)."""
    return nearest.square().mean(dim=0).sqrt()


def _distances(vectors: Tensor, means: Tensor) -> Tensor:
    """Euclidean (groups, n, classes); one way to compute them, however many there are."""
    return torch.cdist(vectors, means, compute_mode="donot_use_mm_for_euclid_dist")


def novelty(vectors: Tensor, tasks: Sequence[Moments]) -> Tensor | None:
    """The novelty (n,) of vectors (groups, n, dim), given the moments of every task's.

    Groups are several looks at one input: root mean square over them, each with the task that is
    nearest to it. None where a task has no reach, or there is no task.
    """
    reaches = Reaches.of(tasks)
    return None if reaches is None else reaches(vectors)


def _whitening(task: Moments) -> Tensor | None:
    """What makes the covariance within classes (groups, dim, dim) the identity; None for none."""
    means, total = task.means(), task.counts.sum()
    if float(total) == 0:
        return None
    within = task.second - (task.counts.unsqueeze(-1) * means).mT @ means
    size = within.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    if not bool((size > 1e-12 * task.second.diagonal(dim1=-2, dim2=-1).mean(dim=-1)).all()):
        return None
    identity = torch.eye(task.dim, dtype=torch.float64)
    shrunk = ((1 - SHRINKAGE) * within + SHRINKAGE * size[:, None, None] * identity) / total
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if bool(failed.any()):
        return None
    return torch.linalg.cholesky(torch.cholesky_inverse(factor))
