"""A new LoRA for every task, summed with the frozen ones of tasks before: ΔW = Σ_t s B_t A_t."""

from __future__ import annotations

import torch
from torch import Tensor

from memtool.adapters.mixing import Mixture
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues, BlockValues, ModuleValues, Recall
from memtool.learning.learner import Learner
from memtool.streams.task import Task


class Branches(Learner):
    """`past` are the frozen branches (None during the first task), `values` the one that learns.

    The sum of the branches is their merge: it is one adapter of rank t · r, for every input.
    """

    past: AdapterValues | None

    def begin(self) -> None:
        """The first branch."""
        super().begin()
        self.past = None

    def before_task(self, task: Task) -> None:
        """Freeze what was learned, and begin a branch that changes nothing yet."""
        del task
        if self.seen:
            self.past = self.work.stacked(flat_of_all(self.past, self.values))
            self.values = self.fresh(1)

    def recall(self) -> Recall | None:
        """All branches, for every input."""
        return summed(self.past, self.values)


def flat_of_all(past: AdapterValues | None, new: AdapterValues) -> Tensor:
    """The flat values (t, numel) of all branches."""
    return new.flat() if past is None else torch.cat([past.flat(), new.flat()])


def summed(past: AdapterValues | None, new: AdapterValues) -> Recall:
    """The sum of all branches, for every sample."""
    if past is None:
        return every(new)

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        old, added = past.block(block), new.block(block)
        if old is None or added is None:
            return None
        joined = BlockValues(
            {name: _joined(old.modules[name], added.modules[name]) for name in old.modules},
            torch.cat([old.scaling, added.scaling]),
        )
        return Mixture.weighted(joined, hidden.new_ones(len(hidden), len(joined)))

    return recall


def _joined(old: ModuleValues, new: ModuleValues) -> ModuleValues:
    b = tuple(torch.cat(pair) for pair in zip(old.b, new.b, strict=True))
    return ModuleValues(old.sites, torch.cat([old.a, new.a]), b)
