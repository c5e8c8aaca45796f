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
from memtool.backbones.interface import TextBackbone
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
        # A text tower's first token is the same for all texts, and its mask keeps it so.
        looks_at_mean = isinstance(work.backbone, TextBackbone) or not work.backbone.prefix_tokens
        token = "mean" if looks_at_mean else "class"
        prefix = 0 if isinstance(work.backbone, TextBackbone) else work.backbone.prefix_tokens
        self.queries = nn.ModuleDict()
        self.routers = nn.ModuleDict()
        for block in work.layout.blocks:
            dim = work.backbone.block_dim(block)
            self.queries[str(block)] = QueryModule(
                "identity", dim, token, prefix_tokens=prefix, bias=False
            )
            self.routers[str(block)] = router(dim, tasks)
        self.to(work.engine.device)

    def coefficients(self, block: int, hidden: Tensor) -> Tensor:
        """Positive coefficients (b, experts) that sum to one, of the block's input (b, n, dim)."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores: Tensor = self.routers[str(block)](self.queries[str(block)](hidden))
            return scores.softmax(dim=1)

    def recall(self) -> Recall:
        """The experts as the router of the block weighs them for every sample."""

        def recall(block: int, hidden: Tensor) -> Mixture | None:
            here = self.values.block(block)
            if here is None:
                return None
            return Mixture.weighted(here, self.coefficients(block, hidden))

        return recall


def router(dim: int, experts: int) -> nn.Linear:
    """Scores of experts from a query (..., dim), all zero at first."""
    linear = nn.Linear(dim, experts)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
