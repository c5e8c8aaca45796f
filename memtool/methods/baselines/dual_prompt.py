"""DualPrompt: keys and values in attention, some for all tasks, others for each; a key finds these.

    blocks 0, 1     G: 5 keys and 5 values, which learn on from task to task
    blocks 2, 3, 4  E_t: 20 keys and 20 values of task t, which stay when t was learned
    penalty = λ (1 − cos(q(x), k_t))
    in a test       E of the task whose key k has the highest cos(q(x), k)

q(x) is the feature of the frozen model. Source: Wang et al. 2022, DualPrompt: Complementary
Prompting for Rehearsal-free Continual Learning: lengths, blocks, and λ = 1. As in the public code
keys and values are learned as such, after the frozen projections, and start uniform in [0, 0.01),
those of a later task as the task before left its own; it has length 5 in all blocks for CIFAR-100,
and so has the toolbox PILOT, with λ = 0.1, a start in ±1 and Adam at 0.001 for 5 epochs.

Otherwise than there: every image of a test has the task of its own key (the code, that of most of
its batch), and the rate falls along a cosine. Of a model with fewer blocks those that it has.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from memtool.adapters.prefix import Prefix
from memtool.methods.baselines.prompted import Prompted, cosines
from memtool.streams.task import Task

GENERAL = (0, 1)
"""Blocks of the prompts of all tasks."""

EXPERT = (2, 3, 4)
"""Blocks of the prompts of a task."""

GENERAL_LENGTH = 5
EXPERT_LENGTH = 20

PULL = 1.0
"""λ."""


class DualPrompt(Prompted):
    """`general` (blocks, 2, p, dim); `experts` the same of every task, with its key in `keys`."""

    id: ClassVar[str] = "dual-prompt"
    title: ClassVar[str] = "DualPrompt"

    def begin(self) -> None:
        """Prompts of all tasks; there is no task yet."""
        self.general_blocks, self.expert_blocks = self.there(*GENERAL), self.there(*EXPERT)
        general = (len(self.general_blocks), 2, GENERAL_LENGTH, self.dim)
        self.general = nn.Parameter(self.drawn(*general, low=0.0, high=0.01))
        self.experts, self.keys = nn.ParameterList(), nn.ParameterList()

    def before_task(self, task: Task) -> None:
        """Freeze what belongs to other tasks; a key, and prompts that go on from the last ones."""
        del task
        self.experts.requires_grad_(False)
        self.keys.requires_grad_(False)
        size = 2 * len(self.expert_blocks) * EXPERT_LENGTH
        start = self.drawn(1 + size, self.dim, low=0.0, high=0.01)
        self.keys.append(nn.Parameter(start[0].clone()))
        shape = (len(self.expert_blocks), 2, EXPERT_LENGTH)
        first = start[1:].unflatten(0, shape)
        before = self.experts[-1].detach() if len(self.experts) else first
        self.experts.append(nn.Parameter(before.clone()))

    def task_of(self, query: Tensor) -> Tensor:
        """The task (b,) of images: the one that learns, or in a test that of the nearest key."""
        if self.training:
            return query.new_full((len(query),), len(self.keys) - 1, dtype=torch.int64)
        return cosines(query, torch.stack([*self.keys])).argmax(dim=1)

    def prefix(self, query: Tensor) -> Prefix:
        """Those of all tasks, then those of the image's task."""
        attended = {
            block: general.expand(len(query), -1, -1, -1)
            for block, general in zip(self.general_blocks, self.general, strict=True)
        }
        if len(self.keys):
            own = torch.stack([*self.experts])[self.task_of(query)]
            attended |= dict(zip(self.expert_blocks, own.unbind(1), strict=True))
        return Prefix(attended=attended)

    def penalty(self, inputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """How far the images of a batch are from the key of the task."""
        del inputs, targets, logits
        return PULL * (1 - cosines(self.query, self.keys[-1][None])).mean()
