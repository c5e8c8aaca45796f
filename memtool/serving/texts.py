"""Prompts of many requests in one pass of the language model, whatever adapters each is for.

Rows of one model recall together, those of another beside them; an answer draws by its own
generator. So a prompt is answered as it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtool.adapters.side_by_side import side_by_side
from memtool.adapters.values import Recall
from memtool.backbones.answering import Growing, Wish, grow
from memtool.backbones.causal_lm import PAD, CausalLM
from memtool.inference.answers import LEAST
from memtool.methods.attached import AttachedByPrompt, AttachedTexts
from memtool.serving.batcher import Work
from memtool.serving.metrics import Metrics
from memtool.serving.models import Model


@dataclass(frozen=True)
class Said:
    """An answer: its text, why it ended ("stop" or "length"), tokens of prompt and answer.

    `weights` are the adapters that the prompt chose, the greatest share first; empty where nobody
    asked.
    """

    text: str
    ended: str
    asked_tokens: int
    said_tokens: int
    weights: dict[str, float] = field(default_factory=dict)


class Prompt(Work):
    """One prompt, as token ids (1, n); without a wish only its weights are wanted.

    `told(text)` gets what becomes certain of the answer, in the event loop.
    """

    def __init__(
        self,
        model: Model,
        text: str | None,
        tokens: Tensor,
        wish: Wish | None,
        told: Callable[[str], None] | None = None,
    ) -> None:
        """`text` is the prompt where it is one text, whose weights can be told."""
        super().__init__(1)
        self.model, self.text, self.tokens, self.wish, self.told = model, text, tokens, wish, told


Shares = dict[Prompt, dict[str, float]]
"""The weights of prompts, by the names of adapters."""


class PromptRunner:
    """Runs prompts: their weights, then all answers in one pass a token."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def __call__(self, works: Sequence[Prompt]) -> list[Said]:
        """The answers, or the weights, of every prompt."""
        answers, weights = self._answers([work for work in works if work.wish is not None])
        weights |= self._weights([work for work in works if work not in weights])
        found = []
        for work in works:
            answer, shares = answers.get(work), weights.get(work, {})
            text, ended, tokens = (
                ("", "", 0) if answer is None else (answer.text, answer.ended or "", answer.tokens)
            )
            found.append(Said(text, ended, int((work.tokens != PAD).sum()), tokens, shares))
        for one in found:  # not before all went well: else what is run again would count twice
            self._metrics.answered(one.weights)
        return found

    def _weights(self, works: Sequence[Prompt]) -> Shares:
        """The weights of prompts of which no answer told them."""
        found: Shares = {}
        for model, own in _by_model(works).items():
            attached = _attached(model)
            if isinstance(attached, AttachedByPrompt):
                tokens = _padded([work.tokens[0] for work in own]).to(attached.backbone.device)
                with torch.no_grad(), attached.computing():
                    rows = attached.weights_of(tokens).float().cpu()
            else:
                own = [work for work in own if work.text is not None]
                rows = attached.weights([work.text or "" for work in own])
            found |= _shares(attached, own, rows)
        return found

    def _answers(self, works: Sequence[Prompt]) -> tuple[dict[Prompt, Growing], Shares]:
        answers: dict[Prompt, Growing] = {}
        weights: Shares = {}
        for lm in dict.fromkeys(_attached(work.model).backbone for work in works):
            own = [work for work in works if _attached(work.model).backbone is lm]
            grown, told = _grown(lm, _by_model(own))
            answers |= grown
            weights |= told
        return answers, weights


def _shares(attached: AttachedTexts, works: Sequence[Prompt], rows: Tensor) -> Shares:
    """Rows of weights (n, adapters) by the names of the adapters, the greatest first."""
    found: Shares = {}
    for work, row in zip(works, rows.tolist(), strict=True):
        named = sorted(zip(attached.names, row, strict=True), key=lambda one: -one[1])
        found[work] = {name: share for name, share in named if share >= LEAST}
    return found


def _grown(
    lm: CausalLM, groups: Mapping[Model, Sequence[Prompt]]
) -> tuple[dict[Prompt, Growing], Shares]:
    """The answers to prompts of several models on one frozen model, in one pass a token.

    And the weights of those that a prompt chooses for its whole answer.
    """
    works = [work for own in groups.values() for work in own]
    answers = [Growing(lm, work.wish) for work in works if work.wish is not None]
    tokens = _padded([work.tokens[0] for work in works]).to(lm.device)
    sizes = [len(own) for own in groups.values()]

    def told() -> None:
        for work, answer in zip(works, answers, strict=True):
            if work.dropped and answer.ended is None:
                answer.ended = "dropped"
            elif work.told is not None and (text := answer.certain()):
                work.begun = True
                work.loop.call_soon_threadsafe(work.told, text)

    with torch.no_grad(), _attached(works[0].model).computing():
        recalls: list[Recall | None] = []
        tells: dict[Model, Callable[[], Tensor]] = {}
        for model, rows in zip(groups, tokens.split(sizes), strict=True):
            attached = _attached(model)
            if isinstance(attached, AttachedByPrompt):
                own, tells[model] = attached.asked(rows)
                recalls.append(own)
            else:
                recalls.append(attached.recall(rows))
        together = recalls[0] if len(recalls) == 1 else side_by_side(recalls, sizes)
        grow(lm, tokens, together, answers, told)
        weights: Shares = {}
        for model, tell in tells.items():
            weights |= _shares(_attached(model), groups[model], tell().float().cpu())
    return dict(zip(works, answers, strict=True)), weights


def _by_model(works: Sequence[Prompt]) -> dict[Model, list[Prompt]]:
    found: dict[Model, list[Prompt]] = {}
    for work in works:
        found.setdefault(work.model, []).append(work)
    return found


def _attached(model: Model) -> AttachedTexts:
    assert isinstance(model.ready, AttachedTexts)
    return model.ready


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Token ids (n,) of several prompts as one (b, longest), padded on the left."""
    longest = max(map(len, rows))
    found = torch.full((len(rows), longest), PAD)
    for place, row in zip(found, rows, strict=True):
        place[longest - len(row) :] = row
    return found
