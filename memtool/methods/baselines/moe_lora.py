"""MoE-LoRA: as many LoRA experts as tasks, mixed by a router that learns along with them.

    ΔW = Σ_e g_e s B_e A_e,   g = softmax(W q + c),   q = layer norm(class token of the input)

Experts, routers and head learn by cross-entropy and go on from task to task; nothing ties an expert
to a task. A router starts at zero, so at first all experts count the same.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall
from memtool.memories.query import QueryModule
from memtool.methods.baselines.learner import Learner
from memtool.methods.workspace import Workspace


class MoeLora(Learner):
    """Experts under a learned router in every adapted block."""

    id: ClassVar[str] = "moe-lora"
    title: ClassVar[str] = "MoE-LoRA"

    def __init__(self, work: Workspace, tasks: int) -> None:
        """As many experts as tasks."""
        super().__init__(work, tasks)
        self.values = self.fresh(tasks)
        token = "class" if work.backbone.prefix_tokens else "mean"
        prefix = work.backbone.prefix_tokens
        dim = work.backbone.dim
        self.query = QueryModule("identity", dim, token, prefix_tokens=prefix, bias=False)
        self.routers = nn.ModuleDict()
        for block in work.layout.blocks:
            router = nn.Linear(dim, tasks)
            nn.init.zeros_(router.weight)
            nn.init.zeros_(router.bias)
            self.routers[str(block)] = router
        self.to(work.engine.device)

    def coefficients(self, block: int, hidden: Tensor) -> Tensor:
        """Positive coefficients (b, experts) that sum to one, of the block's input (b, n, dim)."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores: Tensor = self.routers[str(block)](self.query(hidden))
            return scores.softmax(dim=1)

    def recall(self) -> Recall:
        """The experts as the router of the block weighs them for every sample."""

        def recall(block: int, hidden: Tensor) -> Mixture | None:
            here = self.values.block(block)
            if here is None:
                return None
            return Mixture.weighted(here, self.coefficients(block, hidden))

        return recall
