"""Batches of token ids, and the greedy answers of a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.causal_lm import PAD, CausalLM


@dataclass(frozen=True)
class RecallOf:
    """The recall of a batch of prompts (b, n), padded on the left; it stays while answering."""

    choose: Callable[[Tensor], Recall | None]

    def __call__(self, prompts: Tensor) -> Recall | None:
        """What is recalled for them."""
        return self.choose(prompts)


def without_answers(tokens: Tensor, answers: Tensor) -> Tensor:
    """Tokens (b, n) with padding in the place of the last `answers` (b,) of each sample."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.masked_fill(places >= tokens.shape[1] - answers.unsqueeze(1), PAD)


def trimmed(tokens: Tensor) -> Tensor:
    """Tokens (b, n) without the columns on the left where all are padding."""
    return tokens[:, int((tokens != PAD).any(dim=0).int().argmax()) :]


def by_length(tokens: Tensor, batch: int) -> Sequence[Tensor]:
    """Indices of samples by batches, those of like lengths together, so that little is padded."""
    return (tokens != PAD).sum(dim=1).argsort(stable=True).split(batch)


@torch.no_grad()
def answers(
    lm: CausalLM,
    prompts: Sequence[str],
    recall: Recall | RecallOf | None = None,
    *,
    batch: int = 16,
    most: int | None = None,
    beams: int = 1,
) -> list[str]:
    """The most probable answers of a language model to prompts, without white space around them.

    `recall` is one for all, or a `RecallOf`; `most` and `beams` as in `CausalLM.generate`.
    """
    if not prompts:
        return []
    tokens = lm.encode(prompts).tokens
    found = [""] * len(prompts)
    for rows in by_length(tokens, batch):
        asked = trimmed(tokens[rows]).to(lm.device)
        rows_of = asked.repeat_interleave(beams, dim=0)
        chosen = recall(rows_of) if isinstance(recall, RecallOf) else recall
        generated = lm.generate(asked, chosen, most=most, beams=beams)
        for row, ids in zip(rows.tolist(), generated, strict=True):
            found[row] = lm.decode(ids).strip()
    return found
