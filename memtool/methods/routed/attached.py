"""A routed memory attached to its model: it classifies images, or answers prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.answering import by_length, trimmed
from memtool.backbones.causal_lm import CausalLM
from memtool.backbones.interface import Backbone
from memtool.methods.attached import (
    AttachedImages,
    AttachedTexts,
    HeadModule,
    Output,
    require_texts,
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


class RoutedTexts(AttachedTexts):
    """Whole adapters on a language model, mixed by the prompt and kept while it answers."""

    def __init__(self, lm: CausalLM, memory: RoutedMemory, precision: str) -> None:
        super().__init__(lm, precision)
        self.routing: Routing = memory.routing
        self._names = tuple(record.name for record in memory.records)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order of their weights."""
        return self._names

    def recall(self, prompts: Tensor) -> Recall:
        """The mixture of every prompt."""
        with torch.no_grad():
            looks = self.routing.look(self.backbone, prompts)
            return self.routing.recall(self.routing.weights(looks))

    @torch.no_grad()
    def weights(self, prompts: Sequence[str]) -> Tensor:
        """The weights (n, adapters) that prompts choose."""
        require_texts(prompts)
        found = torch.zeros(len(prompts), len(self.routing.values))
        if not prompts:
            return found
        tokens = self.backbone.encode(prompts).tokens
        for rows in by_length(tokens, 16):
            asked = trimmed(tokens[rows]).to(self.backbone.device)
            with self.computing():
                seen = self.routing.look(self.backbone, asked)
            found[rows] = self.routing.weights(seen).cpu()
        return found
