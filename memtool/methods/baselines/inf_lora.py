"""InfLoRA: a branch per task whose A is fixed in advance where old tasks do not see it.

The rows of A are the r leading principal directions of the task's inputs to the adapted module,
after what lies in the space of old inputs (DualGPM) was removed; only B learns. An old input x then
has A x ≈ 0, so the new branch hardly changes it. Source: Liang & Li 2024. As there, A is shared by
the sites of one module. Our rows have length one, as ours at random have nearly.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtool.adapters.linear import AdaptedLinear
from memtool.methods.baselines.branches import Branches
from memtool.methods.dual_gpm import DualGPM
from memtool.methods.workspace import Workspace
from memtool.streams.task import Samples, Task


class InfLora(Branches):
    """A branch per task in the inputs' part that old tasks leave free."""

    id: ClassVar[str] = "inf-lora"
    title: ClassVar[str] = "InfLoRA"

    def __init__(self, work: Workspace, tasks: int) -> None:
        super().__init__(work, tasks)
        widths = {site.module: site.in_features for site in work.layout.sites}
        self.space = {module: DualGPM(width) for module, width in widths.items()}

    def before_task(self, task: Task) -> None:
        """Begin a branch with A from the task's inputs, B zero."""
        super().before_task(task)
        layout = self.work.layout
        rows = {
            module: free_directions(self.space[module], second, layout.rank)
            for module, second in self.input_moments(task.train).items()
        }
        flat = torch.zeros(1, layout.numel)
        tensors = layout.unflatten(flat)  # views
        for site in layout.sites:
            tensors[f"{site.name}.lora_A"].copy_(rows[site.module])
        self.values = self.stacked(flat, trainable=True)
        self.values.a.requires_grad_(False)

    def after_task(self, task: Task) -> None:
        """Add the task's inputs, as the trained model has them, to the past."""
        progress = len(self.seen) / self.tasks
        for module, second in self.input_moments(task.train).items():
            self.space[module].update_moment(second, progress)

    def input_moments(self, samples: Samples) -> dict[str, Tensor]:
        """Second moment Σ x xᵀ (d, d), float64, of all tokens that enter each adapted module."""
        moments: dict[str, Tensor] = {}

        def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(module, AdaptedLinear)
            x = arguments[0].detach().flatten(0, -2).float()
            with torch.autocast(x.device.type, enabled=False):
                second = (x.mT @ x).cpu().double()
            moments[module.name] = moments.get(module.name, 0) + second

        adapted = [
            module
            for module in self.backbone.modules()
            if isinstance(module, AdaptedLinear) and module.name in self.space
        ]
        hooks = [module.register_forward_pre_hook(count) for module in adapted]
        try:
            self.features_of(samples)
            if self.text is not None:
                with torch.no_grad(), self.work.engine.autocast():
                    self.text.head(
                        self.backbone, self.recall(), sorted(set(samples.labels.tolist()))
                    )
        finally:
            for hook in hooks:
                hook.remove()
        return moments


def free_directions(space: DualGPM, second: Tensor, rank: int) -> Tensor:
    """The leading `rank` principal directions (rank, d) of inputs outside the past, float64.

    `second` (d, d) is the inputs' second moment. A row is zero where the inputs leave no free
    direction of any energy.
    """
    free = space.project(space.project(second).mT)
    energies, vectors = torch.linalg.eigh((free + free.mT) / 2)
    rows = vectors.flip(1).mT[:rank]
    present = energies.flip(0)[:rank] > 1e-10 * second.trace()
    return rows * present.unsqueeze(1)
