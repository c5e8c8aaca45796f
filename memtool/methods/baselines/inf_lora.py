"""InfLoRA: a branch per task whose A is fixed in advance where old tasks do not see it.

The rows of A are the r leading principal directions of the task's inputs to the adapted module,
after what lies in the space of old inputs (DualGPM) was removed; only B learns. An old input x then
has A x ≈ 0, so the new branch hardly changes it. Source: Liang & Li 2024. As there, A is shared by
the sites of one module. Our rows have length one, as ours at random have nearly; theirs 1/√3.

How much of old inputs is kept clear of is `past.energy`, by `past.rule`: "squares" is the rule of
their code, whose shares are 0.95 (CIFAR-100, DomainNet) or 0.98 (ImageNet-R) and rise to 1.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from memtool.learning.past_inputs import PastInputs
from memtool.methods.baselines.branches import Branches
from memtool.streams.task import Task


class InfLora(Branches):
    """A branch per task in the inputs' part that old tasks leave free."""

    id: ClassVar[str] = "inf-lora"
    title: ClassVar[str] = "InfLoRA"

    def begin(self) -> None:
        """The first branch, and an empty past of every adapted layer."""
        super().begin()
        past = self.work.config.past
        self.inputs = PastInputs(self.work.layout, past.energy, rule=past.rule)

    def before_task(self, task: Task) -> None:
        """Begin a branch with A from the task's inputs, B zero."""
        super().before_task(task)
        self.values = self.work.stacked(self.inputs.free_branch(self.moments(task)), trainable=True)
        self.values.a.requires_grad_(False)

    def after_task(self, task: Task) -> None:
        """Add the task's inputs, as the trained model has them, to the past."""
        self.inputs.add(self.moments(task), len(self.seen) / self.tasks)

    def moments(self, task: Task) -> dict[str, Tensor]:
        """The second moments of what enters the adapted modules while they read a task."""
        found: dict[str, Tensor] = self.objective.input_moments(
            self.inputs, task.train, self.recall()
        )
        return found
