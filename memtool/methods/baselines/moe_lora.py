"""MoE-LoRA: as many LoRA experts as tasks, mixed by a router that learns along with them.

    ΔW = Σ_e g_e s B_e A_e,   g = softmax(W q + c)

q is the layer-normed class token of the block's input (or the mean of its tokens, where there is no
class token that looks at all others), once for an image; of a text every token asks for itself, so
that an answer does not depend on what comes later. Experts, routers and head learn by cross-entropy
and go on from task to task; nothing ties an expert to a task. A router starts at zero, so at first
all experts count the same.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.mixing import Mixture
from memtool.adapters.values import Recall
from memtool.backbones.interface import TwoTowers
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.memories.query import QueryModule
from memtool.workspace import Workspace


class MoeLora(Learner):
    """Experts under a learned router in every adapted block."""

    id: ClassVar[str] = "moe-lora"
    title: ClassVar[str] = "MoE-LoRA"

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        super().__init__(work, tasks, objective)
        self.queries = nn.ModuleDict()
        self.routers = nn.ModuleDict()
        for block in work.layout.blocks:
            dim = work.backbone.block_dim(block)
            if work.reads == "images":
                self.queries[str(block)] = _query(work, dim)
            self.routers[str(block)] = _router(dim, tasks)
        self.to(work.engine.device)

    def begin(self) -> None:
        """As many experts as tasks."""
        self.values = self.fresh(self.tasks)

    def coefficients(self, block: int, hidden: Tensor) -> Tensor:
        """Positive coefficients that sum to one, of the block's input (b, n, dim).

        (b, experts) of images, (b, n, experts) of texts.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            if self.queries:
                query = self.queries[str(block)](hidden)
            else:
                query = F.layer_norm(hidden.float(), hidden.shape[-1:])
            scores: Tensor = self.routers[str(block)](query)
            return scores.softmax(dim=-1)

    def recall(self) -> Recall:
        """The experts as the router of the block weighs them."""

        def recall(block: int, hidden: Tensor) -> Mixture | None:
            here = self.values.block(block)
            if here is None:
                return None
            return Mixture.weighted(here, self.coefficients(block, hidden))

        return recall


def _query(work: Workspace, dim: int) -> QueryModule:
    """What an image asks in a block that is so wide."""
    # A text tower's first token is the same for all texts, and its mask keeps it so.
    prefix = 0 if isinstance(work.backbone, TwoTowers) else work.backbone.prefix_tokens
    token = "class" if prefix else "mean"
    return QueryModule("identity", dim, token, prefix_tokens=prefix, bias=False)


def _router(dim: int, experts: int) -> nn.Linear:
    """Scores of experts from a query (..., dim), all zero at first."""
    linear = nn.Linear(dim, experts)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
