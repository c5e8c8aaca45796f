"""How far an input lies from all that a memory learned, by the moments that it keeps.

The distance of a vector from a task is Mahalanobis' from the nearest of the task's class means, by
the covariance within its classes. When a task is counted, each of its vectors is measured with
itself left out, and how far nearly all of them lie is kept: the task's `reach`. The novelty of an
input is its distance in parts of the reach of the task that is nearest; no image is read for it.
Among many tasks it is the nearest of those that the input recalls most (`TaskReaches`).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtool.devices import exact
from memtool.errors import MemtoolError
from memtool.memories.moments import Moments

LIMIT = 1.0
"""Novelty above which an input is called unlike all that was learned: it is beyond every reach.

docs/mira.md says how often new images of learned tasks are, and how often others.
"""

SHARE = 0.99
"""Of a task's own vectors that lie within its reach."""

ALL_OF, OF_MANY = 8, 4
"""Of so many tasks all say how novel an input is; of more those that it recalls most."""

LEAST = 0.01
"""Of its highest weight, below which an input does not recall a task of many."""

HELD_BYTES = 1 << 30
"""What is held of more than `ALL_OF` tasks."""

_log = logging.getLogger(__name__)

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

    def nearest(self, vectors: Tensor, asked: Tensor | None = None) -> Tensor:
        """How far vectors (groups, n, dim) lie from the nearest task, in parts of its reach.

        (groups, n); all float64 and on the CPU. Only of the tasks that are `asked` (n, tasks).
        """
        each = []
        for factor, means, reach in zip(self.factors, self.means, self.reach, strict=True):
            away = _distances(vectors @ factor, means).amin(dim=-1)
            each.append(away / reach.unsqueeze(-1))
        far = torch.stack(each)
        if asked is not None:
            far = far.masked_fill(~asked.T.unsqueeze(1), torch.inf)
        return far.amin(dim=0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Stay on the CPU, in float64."""
        del fn, recurse
        return self


Read = Callable[[int], Moments | None]
"""The moments of the task at a place; None where nothing is known of it."""


class TaskReaches(nn.Module):
    """The novelty of inputs that have several looks, by the tasks that they recall.

    Of up to `ALL_OF` tasks by all of them. Of more by those that are `asked`, whose moments are
    read when they are: it costs what is recalled. A copy holds all.
    """

    owners: Tensor

    def __init__(self, tasks: int, looks: Sequence[Read], owners: Sequence[int]) -> None:
        """`looks` read the moments of each look; `owners` (t,) are the tasks of the weights."""
        super().__init__()
        self.register_buffer("owners", torch.tensor(owners, dtype=torch.int64), persistent=False)
        self._tasks, self._count, self._looks = tasks, len(looks), tuple(looks)
        self._held: OrderedDict[int, list[Reaches | None]] = OrderedDict()
        self.of_all: nn.ModuleList | None = None
        if tasks <= ALL_OF:
            self.hold_all()

    def hold_all(self) -> None:
        """Read all tasks: nothing is read from now on."""
        if self.of_all is None:
            found = [_reaches(read, range(self._tasks)) for read in self._looks]
            self.of_all = nn.ModuleList(one for one in found if one is not None)
            self._looks = ()
            self._held.clear()

    def __getstate__(self) -> dict[str, Any]:
        """That of a module that reads nothing: what is read belongs to a store that is open."""
        self.hold_all()
        return self.__dict__

    def forward(self, looks: Sequence[Tensor], weights: Tensor) -> Tensor | None:
        """The novelty (n,), float64 on the CPU, of looks (groups, n, dim) under weights (n, t).

        NaN where nothing tells; None where that is so of all inputs.
        """
        asked = None if self._tasks <= ALL_OF else self.asked(weights)
        if self.of_all is None:
            assert asked is not None
            far = self._read_nearest(list(map(exact, looks)), asked)
        elif len(self.of_all) < self._count:
            return None
        else:
            every = [one for one in self.of_all if isinstance(one, Reaches)]
            pairs = zip(every, looks, strict=True)
            far = [reaches.nearest(exact(look), asked) for reaches, look in pairs]
        return torch.stack(list(map(_over_groups, far))).square().mean(dim=0).sqrt()

    def asked(self, weights: Tensor) -> Tensor:
        """Which tasks an input recalls, of weights (n, t): bool (n, tasks), on the CPU.

        The `OF_MANY` with the highest weights, but for those that have less than `LEAST` of the
        highest.
        """
        weights = exact(weights)
        by_task = weights.new_zeros(
            weights.shape[0], self._tasks
        )  # a length is a constant to export
        by_task = by_task.index_add(1, self.owners.cpu(), weights)
        highest, places = by_task.topk(min(OF_MANY, self._tasks), dim=1)
        recalled = highest > LEAST * highest[:, :1].clamp_min(0)
        recalled[:, 0] = True
        return torch.zeros_like(by_task, dtype=torch.bool).scatter(1, places, recalled)

    def _read_nearest(self, looks: Sequence[Tensor], asked: Tensor) -> list[Tensor]:
        """Of every look how far (groups, n) its inputs lie from the nearest task that is asked."""
        found = [look.new_full(look.shape[:2], torch.inf) for look in looks]
        # What is held comes first, before anything that is read takes its place.
        places = asked.any(dim=0).nonzero()[:, 0].tolist()
        for place in sorted(places, key=lambda place: place not in self._held):
            rows = asked[:, place]
            for far, look, reach in zip(found, looks, self._of(place), strict=True):
                here = far.new_tensor(torch.nan) if reach is None else reach.nearest(look[:, rows])
                far[:, rows] = torch.minimum(far[:, rows], here)
        return found

    def _of(self, place: int) -> list[Reaches | None]:
        """The reaches of one task, a look each; none where it cannot be read any more."""
        with _READING:
            if place not in self._held:
                try:
                    self._held[place] = [_reaches(read, [place]) for read in self._looks]
                except MemtoolError as error:
                    _log.warning("no novelty of what recalls a task: %s", error)
                    self._held[place] = [None] * self._count
                while len(self._held) > 1 and sum(map(_nbytes, self._held.values())) > HELD_BYTES:
                    self._held.popitem(last=False)
            self._held.move_to_end(place)
            return self._held[place]


def _reaches(read: Read, places: Sequence[int]) -> Reaches | None:
    """The reaches of tasks; None where one of them does not tell."""
    moments = [read(place) for place in places]
    known = [one for one in moments if one is not None]
    return Reaches.of(known) if len(known) == len(moments) else None


def _nbytes(held: Sequence[Reaches | None]) -> int:
    return sum(one.nbytes for reaches in held if reaches for one in reaches.parameters())


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
