"""What a frozen model sees in an input: one vector, before any adapter is chosen.

Of images the pooled features. Of prompts what `PromptLook` names, side by side:

    final      the mean of the last hidden states over the tokens
    block:N    the mean of the input of block N, layer-normalised
    blocks     that of every block
    tokens     the square root of how often each token occurs, in `TOKEN_PLACES` places at most
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.backbones.answering import by_length, trimmed
from memtool.backbones.causal_lm import PAD, CausalLM
from memtool.errors import ConfigError
from memtool.streams.task import Images
from memtool.workspace import Workspace

TOKEN_PLACES = 1024
"""Places that tokens are counted in; those of a larger vocabulary share them."""

MOST_WIDE = 2048
"""Width of a look; what is wider is projected to it at random, always in the same way."""

_SPREAD = 2_654_435_761
"""Knuth's multiplier: neighbours in a vocabulary come to places far from each other."""


@dataclass(frozen=True)
class PromptLook:
    """A look at prompts: at the places that are named, side by side."""

    places: tuple[str, ...] = ("final",)

    def __call__(self, lm: CausalLM, prompts: Tensor) -> Tensor:
        """What prompts (b, n), padded on the left, look like: (b, width), float32.

        Padding is no token, so that a prompt looks the same alone and in any batch. Raises
        ConfigError for a block that the model does not have.
        """
        real = (prompts != PAD).unsqueeze(-1)
        count = real.sum(dim=1).clamp_min(1)
        wanted = self.blocks(lm.depth)
        seen: dict[str, Tensor] = {}

        def mean(hidden: Tensor) -> Tensor:
            return (hidden.float() * real).sum(dim=1) / count

        def keep(block: int, hidden: Tensor) -> None:
            if block in wanted:
                seen[f"block:{block}"] = F.layer_norm(mean(hidden), hidden.shape[-1:])

        if wanted or "final" in self.places:
            seen["final"] = mean(lm.hidden(prompts, keep))
        if "tokens" in self.places:
            seen["tokens"] = _token_shares(prompts, len(lm.embed.weight))
        return _narrow(torch.cat([seen[place] for place in self._named(lm.depth)], dim=1))

    def width(self, lm: CausalLM) -> int:
        """Entries of what it sees under a model."""
        words = len(lm.embed.weight)
        widths = {"tokens": min(words, TOKEN_PLACES)}
        return min(MOST_WIDE, sum(widths.get(place, lm.dim) for place in self._named(lm.depth)))

    def blocks(self, depth: int) -> set[int]:
        """The blocks that it looks at, of a model of so many."""
        named = {int(place[6:]) for place in self._named(depth) if place.startswith("block:")}
        if beyond := sorted(block for block in named if block >= depth):
            raise ConfigError(
                f"a look at block {beyond[0]} of a model of {depth} blocks",
                expected=f"block:0 to block:{depth - 1}",
                remedy="--set memory.look_at=blocks,tokens",
            )
        return named

    def _named(self, depth: int) -> list[str]:
        """The places one by one, each once."""
        found: list[str] = []
        for place in self.places:
            found += [f"block:{n}" for n in range(depth)] if place == "blocks" else [place]
        return list(dict.fromkeys(found))


FINAL = PromptLook()
"""What is seen where nothing else is named."""


def looks(work: Workspace, samples: Any, look: PromptLook = FINAL) -> Tensor:
    """What the frozen model sees in samples: (n, dim), float32, on the CPU.

    Of images the pooled features, of texts what `look` sees in their prompts.
    """
    if isinstance(samples, Images):
        return work.features(samples.images)
    return looks_of(work, samples.prompts, look)


def looks_of(work: Workspace, prompts: Sequence[str], look: PromptLook = FINAL) -> Tensor:
    """What `look` sees in prompts: (n, width), float32, on the CPU."""
    lm, engine = work.backbone, work.engine
    tokens = lm.encode(prompts).tokens
    found = torch.empty(len(tokens), look.width(lm))
    for rows in by_length(tokens, engine.settings.eval_batch_size):
        with torch.no_grad(), engine.autocast():
            found[rows] = look(lm, trimmed(tokens[rows]).to(engine.device)).float().cpu()
    return found


def _token_shares(prompts: Tensor, words: int) -> Tensor:
    """Square roots of the shares of tokens (b, places), as long as a layer-normalised vector."""
    places = min(words, TOKEN_PLACES)
    ids = prompts.clamp_min(0)
    if words > places:
        ids = (ids * _SPREAD) % 2**32 * places // 2**32
    real = (prompts != PAD).float()
    counts = real.new_zeros(len(prompts), places).scatter_add_(1, ids, real)
    return (places * counts / real.sum(dim=1, keepdim=True).clamp_min(1)).sqrt()


def _narrow(seen: Tensor) -> Tensor:
    """What was seen, at most `MOST_WIDE` wide; distances stay nearly as they are."""
    width = seen.shape[1]
    if width <= MOST_WIDE:
        return seen
    with torch.autocast(seen.device.type, enabled=False):
        return seen @ _directions(width, MOST_WIDE, seen.device)


@lru_cache(maxsize=2)
def _directions(width: int, narrow: int, device: torch.device) -> Tensor:
    """Random directions (width, narrow), always the same ones."""
    drawn = torch.randn(width, narrow, generator=torch.Generator().manual_seed(width))
    return (drawn / narrow**0.5).to(device)
