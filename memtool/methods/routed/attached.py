"""A routed memory attached to its model: it classifies images, or answers prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.causal_lm import CausalLM
from memtool.backbones.interface import Backbone
from memtool.methods.attached import (
    AttachedByPrompt,
    AttachedImages,
    HeadModule,
    Output,
    unknown,
)
from memtool.methods.routed.memory import RoutedMemory, Routing


class RoutedImages(AttachedImages):
    """Whole adapters on an image model, mixed by what the frozen model sees."""

    def __init__(self, backbone: Backbone, memory: RoutedMemory, precision: str) -> None:
        super().__init__(backbone, precision)
        self.routing: Routing = memory.routing
        assert memory.head is not None
        self.head = HeadModule(memory.head)

    def seen(self, pixels: Tensor) -> Output:
        """As `AttachedImages.seen`: two passes, the first without adapters."""
        weights = self.routing.weights(self.backbone.features(pixels))
        features = self.backbone.features(pixels, self.routing.recall(weights))
        logits, probabilities = self.head(features, weights)
        return Output(logits, probabilities, weights, unknown(features))


class RoutedTexts(AttachedByPrompt):
    """Whole adapters on a language model, mixed by the prompt and kept while it answers."""

    def __init__(self, lm: CausalLM, memory: RoutedMemory, precision: str) -> None:
        super().__init__(lm, [record.name for record in memory.records], precision)
        self.routing: Routing = memory.routing

    def recall(self, prompts: Tensor) -> Recall:
        """The mixture of every prompt."""
        with torch.no_grad():
            return self.routing.recall(self.weights_of(prompts))

    def weights_of(self, prompts: Tensor) -> Tensor:
        """What the rule gives for what prompts look like."""
        return self.routing.weights(self.routing.look(self.backbone, prompts))
