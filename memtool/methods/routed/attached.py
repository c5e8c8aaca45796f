"""A routed memory attached to its model: it classifies images, or answers prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.answering import RecallOf, answers, by_length
from memtool.backbones.causal_lm import CausalLM
from memtool.backbones.interface import Backbone
from memtool.errors import ConfigError
from memtool.methods.attached import (
    AttachedByPrompt,
    AttachedImages,
    HeadModule,
    Output,
    require_texts,
    unknown,
)
from memtool.methods.routed.memory import RoutedMemory, Routing, of_prompts


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
        return self.routing.recalled(self.backbone, prompts)

    def weights_of(self, prompts: Tensor) -> Tensor:
        """What the rule gives for what prompts look like; means where blocks have their own."""
        return of_prompts(self.routing.weighed(self.backbone, prompts))

    def asked(self, prompts: Tensor) -> tuple[Recall, Callable[[], Tensor]]:
        """As `AttachedByPrompt.asked`."""
        recall, weights = self.routing.asked(self.backbone, prompts)
        return recall, lambda: of_prompts(weights())

    @torch.no_grad()
    def answered(
        self,
        prompts: Sequence[str],
        *,
        batch: int = 16,
        most: int | None = None,
        beams: int = 1,
    ) -> tuple[list[str], Tensor]:
        """As `AttachedTexts.answered`; prompts are looked at once for both."""
        require_texts(prompts)
        self.require_beams(beams)
        told: list[Callable[[], Tensor]] = []

        def choose(tokens: Tensor) -> Recall:
            recall, weights = self.asked(tokens)
            told.append(weights)
            return recall

        with self.computing():
            recall = RecallOf(choose)
            texts = answers(self.backbone, prompts, recall, batch=batch, most=most, beams=beams)
        found = torch.zeros(len(prompts), len(self.routing.values))
        if told:
            rows = torch.cat([*by_length(self.backbone.encode(prompts).tokens, batch)])
            found[rows] = torch.cat([weights()[::beams] for weights in told]).cpu()
        return texts, found

    def require_beams(self, beams: int) -> None:
        """As `AttachedTexts.require_beams`: beams change places, and a mean so far cannot."""
        if beams > 1 and not self.routing.steady:
            raise ConfigError(
                f"{beams} beams under memory.look_at=prefix, where a token sees the mean so far",
                expected="1: token by token",
                remedy="--beams 1, or a memory of another memory.scope",
            )
