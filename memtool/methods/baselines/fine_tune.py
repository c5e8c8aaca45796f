"""Sequential fine-tuning: all weights learn, task after task, and nothing is protected."""

from __future__ import annotations

import copy
from typing import ClassVar

from memtool.adapters.values import Recall
from memtool.methods.baselines.learner import Learner
from memtool.methods.workspace import Workspace

RATE = 0.02
"""Learning rate of pre-trained weights, relative to that of adapters and heads, which start at
zero: X-TAIL's 1e-5 to our 5e-4."""


class FineTune(Learner):
    """A copy of the backbone whose own weights learn; adapters stay out of it."""

    id: ClassVar[str] = "fine-tune"
    title: ClassVar[str] = "fine-tuning"

    def __init__(self, work: Workspace, tasks: int) -> None:
        super().__init__(work, tasks)
        self.backbone = copy.deepcopy(work.backbone).requires_grad_(True)
        self.values.requires_grad_(False)

    def recall(self) -> Recall | None:
        """No adapters."""
        return None

    def rate_of(self, name: str) -> float:
        """The head learns at the full rate."""
        return RATE if name.startswith("backbone.") else 1.0
