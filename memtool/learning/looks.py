"""What a frozen model sees in an input: one vector, before any adapter is chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtool.backbones.answering import by_length, trimmed
from memtool.backbones.causal_lm import PAD, CausalLM
from memtool.streams.task import Images
from memtool.workspace import Workspace


def look_at_prompts(lm: CausalLM, prompts: Tensor) -> Tensor:
    """The mean of the last hidden states over the tokens of prompts (b, n): (b, dim), float32.

    Padding is no token, so that a prompt looks the same alone and in any batch.
    """
    real = (prompts != PAD).unsqueeze(-1)
    hidden = lm.hidden(prompts).float()
    return (hidden * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)


def looks(work: Workspace, samples: Any) -> Tensor:
    """What the frozen model sees in samples: (n, dim), float32, on the CPU.

    Of images the pooled features, of texts `look_at_prompts`.
    """
    if isinstance(samples, Images):
        return work.features(samples.images)
    lm, engine = work.backbone, work.engine
    tokens = lm.encode(samples.prompts).tokens
    found = torch.empty(len(tokens), lm.dim)
    for rows in by_length(tokens, engine.settings.eval_batch_size):
        with torch.no_grad(), engine.autocast():
            found[rows] = look_at_prompts(lm, trimmed(tokens[rows]).to(engine.device)).cpu()
    return found
