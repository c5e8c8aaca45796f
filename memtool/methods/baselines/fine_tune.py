"""Sequential fine-tuning: all weights learn, task after task, and nothing is protected."""

from __future__ import annotations

import copy
from typing import ClassVar

from memtool.adapters.values import Recall
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.workspace import Workspace

RATE = 0.02
"""Learning rate of pre-trained weights, relative to that of adapters and heads, which start at
zero: X-TAIL's 1e-5 to our 5e-4."""


class FineTune(Learner):
    """A copy of the backbone whose own weights learn; there are no adapters."""

    id: ClassVar[str] = "fine-tune"
    title: ClassVar[str] = "fine-tuning"

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        super().__init__(work, tasks, objective)
        # In float32, also of a language model: small steps get lost in bfloat16.
        self.objective.backbone = copy.deepcopy(work.backbone).float().requires_grad_(True)

    def begin(self) -> None:
        """There is nothing beside the backbone."""

    def recall(self) -> Recall | None:
        """No adapters."""
        return None

    def rate_of(self, name: str) -> float:
        """A head learns at the full rate."""
        return RATE if name.startswith("objective.backbone.") else 1.0
