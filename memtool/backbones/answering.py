"""Batches of token ids, and the greedy answers of a language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memtool.adapters.values import Recall
from memtool.backbones.causal_lm import PAD, CausalLM


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
    recall: Recall | None = None,
    *,
    batch: int = 16,
    most: int | None = None,
) -> list[str]:
    """The greedy answers of a language model to prompts, without white space around them.

    `most` as in `CausalLM.generate`.
    """
    if not prompts:
        return []
    tokens = lm.encode(prompts).tokens
    found = [""] * len(prompts)
    for rows in by_length(tokens, batch):
        generated = lm.generate(trimmed(tokens[rows]).to(lm.device), recall, most=most)
        for row, ids in zip(rows.tolist(), generated, strict=True):
            found[row] = lm.decode(ids).strip()
    return found
