"""Recalled adapters attached to a language model: it answers each prompt through its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.adapters.recalls import chosen
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.causal_lm import CausalLM
from memtool.learning.looks import feature_model
from memtool.methods.attached import AttachedByPrompt, TaskOf
from memtool.methods.modulation.stored import Stored


class RecalledTexts(AttachedByPrompt):
    """One adapter for every prompt: of a task that is told, or that a predictor sees.

    `values` (t, numel) are the adapters as they are used, in the order of `stored`.
    """

    def __init__(
        self, lm: CausalLM, stored: Stored, values: AdapterValues, task_of: TaskOf, precision: str
    ) -> None:
        super().__init__(lm, [record.name for record in stored.records], precision)
        self.values = values
        self.task_of = task_of

    def places(self, prompts: Tensor) -> Tensor:
        """The place of the adapter of every prompt (n,), int64."""
        found: Tensor = self.task_of(feature_model(self.backbone), prompts)
        return found

    def recall(self, prompts: Tensor) -> Recall:
        """The adapter of every prompt."""
        with torch.no_grad():
            return chosen(self.values, self.places(prompts))

    def weights_of(self, prompts: Tensor) -> Tensor:
        """1 for the adapter that a prompt is answered through."""
        return self._whole(self.places(prompts))

    @torch.no_grad()
    def asked(self, prompts: Tensor) -> tuple[Recall, Callable[[], Tensor]]:
        """As `AttachedByPrompt.asked`."""
        places = self.places(prompts)
        return chosen(self.values, places), lambda: self._whole(places)

    def _whole(self, places: Tensor) -> Tensor:
        return F.one_hot(places, len(self.names)).float()
