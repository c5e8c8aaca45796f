"""TreeLoRA: a LoRA that learns on, each block of it drawn toward the old task that is most like it.

    penalty = − λ · r/R · loss · S / |S|,   S = Σ_blocks ⟨A_block, g_{k(block), block}⟩

g_t are the means of A over the last epoch of task t, which stand for its gradients; r of R is the
step of the epoch. What a step adds are the directions of S alone: loss and |S| are constants.
Which task k a block is drawn to, a bandit finds: least |mean of A so far − g_k|₁, averaged over the
steps in which k was chosen, less √(log 2R(r+1)(r+2) / 2n) for a task chosen n times. It searches in
a tree of the tasks, one level a block, halved at the median of the likeness of g_t − g_{t−1} to
their mean; a block chooses among the tasks of its node, and the next one in the half chosen.
Source: Qian et al. 2025, "TreeLoRA: efficient continual learning via layer-wise LoRAs guided by a
hierarchical gradient-similarity tree" (ICML). With one task, or λ = 0, it is sequential LoRA.

As published (their code, TRACE): λ = 0.5, A in place of gradients, the factors above. Ours: rank,
epochs and optimiser of the stream (published: 1e-4, a cosine, batches of 8, 1 to 3 epochs a task).
Theirs draws tasks from a softmax of the bounds, weighed by the halves of the tree's root alone;
here the search goes down the tree by the least bound, and draws nothing. Theirs divides by S, so
that it turns away where S is negative; here by |S|. Theirs counts A once more for every block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memtool.learning.learner import Learner
from memtool.streams.task import Task


@dataclass(frozen=True, eq=False)
class Node:
    """Tasks, and the two halves that the next block chooses from; none below a leaf."""

    tasks: tuple[int, ...]
    halves: tuple[Node, ...] = ()

    @classmethod
    def of(cls, directions: Sequence[Tensor], tasks: Sequence[int], level: int = 0) -> Node:
        """The tree of tasks with `directions[block]` (t, numbers)."""
        if len(tasks) < 2 or level >= len(directions):
            return cls(tuple(tasks))
        rows = directions[level][list(tasks)]
        likeness = rows @ rows.mean(dim=0)
        order = likeness.argsort(descending=True, stable=True).tolist()
        half = (len(order) + 1) // 2
        parts = ([tasks[i] for i in order[:half]], [tasks[i] for i in order[half:]])
        return cls(tuple(tasks), tuple(cls.of(directions, part, level + 1) for part in parts))

    def search(self, bounds: Tensor) -> list[int]:
        """The task that each block chooses, by `bounds` (t, blocks): the least of its node."""
        node, found = self, list[int]()
        for block in bounds.unbind(dim=1):
            found.append(node.tasks[int(block[list(node.tasks)].argmin())])
            node = next((half for half in node.halves if found[-1] in half.tasks), node)
        return found


class TreeLora(Learner):
    """One LoRA, drawn to what it was on the tasks that are most like the new one."""

    id: ClassVar[str] = "treelora"
    title: ClassVar[str] = "TreeLoRA"
    strength: ClassVar[float] = 0.5
    """λ, at the end of an epoch."""

    rounds: int
    round: int
    sums: list[Tensor]
    last: list[Tensor]
    chosen: list[int]
    distances: Tensor
    counts: Tensor

    def begin(self) -> None:
        """No tasks to be drawn to."""
        super().begin()
        self.past: list[list[Tensor]] = []
        self.tree = Node(())

    def before_task(self, task: Task) -> None:
        """A tree of the tasks so far, and a bandit that knows nothing of this one."""
        self.rounds = math.ceil(len(task.train) / self.work.config.train.batch_size)
        if self.past:
            steps = [[a - b for a, b in zip(*two, strict=True)] for two in self._neighbours()]
            whole = [torch.stack(rows) for rows in zip(self.past[0], *steps, strict=True)]
            self.tree = Node.of(whole, range(len(self.past)))
        self.last = []
        self._begin_epoch()

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """What draws; zero during the first task."""
        if not self.past or not self.strength:
            return logits.new_zeros(())
        self.chosen = self.tree.search(self._bounds())
        with torch.autocast(logits.device.type, enabled=False):
            rows = zip(self._directions(), self.chosen, strict=True)
            drawn = torch.stack([(a * self.past[k][at]).sum() for at, (a, k) in enumerate(rows)])
            along = drawn.sum() / drawn.sum().detach().abs().clamp_min(1e-5)
            loss = self.objective.loss(logits, inputs, targets).detach()
        return -self.strength * (self.round + 1) / self.rounds * loss * along

    @torch.no_grad()
    def after_step(self) -> None:
        """Count A, and how far it was from what it was drawn to."""
        own = [a.detach() for a in self._directions()]
        self.round += 1
        self.sums = [s + a for s, a in zip(self.sums, own, strict=True)] if self.sums else own
        for block, task in enumerate(self.chosen):
            away = self.sums[block] / self.round - self.past[task][block]
            self.distances[task, block] += away.abs().sum().cpu()
            self.counts[task, block] += 1
        if self.round >= self.rounds:
            self.last = [total / self.round for total in self.sums]
            self._begin_epoch()

    def after_task(self, task: Task) -> None:
        """Keep the means of A over the last epoch, or what there was of one."""
        del task
        self.past.append(self.last or [total / self.round for total in self.sums])

    def _begin_epoch(self) -> None:
        self.round = 0
        self.sums, self.chosen = [], []
        shape = (len(self.past), len(self.work.layout.blocks))
        self.distances, self.counts = torch.zeros(shape), torch.zeros(shape)

    def _neighbours(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """What A was on every later task, and on the one before it."""
        return [*zip(self.past[1:], self.past[:-1], strict=True)]

    def _directions(self) -> list[Tensor]:
        """A of every adapted block, (numbers,)."""
        blocks = [self.values.block(block) for block in self.work.layout.blocks]
        return [
            torch.cat([one.a.flatten() for one in block.modules.values()])
            for block in blocks
            if block is not None
        ]

    def _bounds(self) -> Tensor:
        """Lower confidence bounds (t, blocks) of the distances; never chosen: the lowest."""
        width = math.log(2 * self.rounds * (self.round + 1) * (self.round + 2))
        mean = self.distances / self.counts.clamp_min(1)
        return mean - (width / (2 * self.counts)).sqrt()
