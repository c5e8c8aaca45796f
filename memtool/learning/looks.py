"""What a model sees in an input: one vector, before any adapter is chosen.

`FeatureModel` is a model that gives it under any recall: of images the pooled features, of prompts
the mean of the last hidden states over the tokens. What the frozen model sees in prompts may be
more, as `PromptLook` names it, side by side:

    final      the mean of the last hidden states over the tokens
    block:N    the mean of the input of block N, layer-normalised
    blocks     that of every block
    tokens     the square root of how often each token occurs, in `TOKEN_PLACES` places at most
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.values import Recall
from memtool.backbones.answering import by_length, trimmed
from memtool.backbones.causal_lm import PAD, CausalLM
from memtool.backbones.interface import FrozenModel
from memtool.errors import ConfigError
from memtool.streams.task import Images, Texts
from memtool.workspace import Workspace

TOKEN_PLACES = 1024
"""Places that tokens are counted in; those of a larger vocabulary share them."""

MOST_WIDE = 2048
"""Width of a look; what is wider is projected to it at random, always in the same way."""

_SPREAD = 2_654_435_761
"""Knuth's multiplier: neighbours in a vocabulary come to places far from each other."""


class FeatureModel(Protocol):
    """A frozen model that sees one vector in an input."""

    dim: int

    def preprocess(self, inputs: Tensor) -> Tensor:
        """What `features` takes, of a batch as samples are kept."""

    def features(self, inputs: Tensor, recall: Recall | None = None) -> Tensor:
        """What it sees in preprocessed inputs under a recall, (b, dim)."""


class PromptFeatures(nn.Module):
    """A language model as a `FeatureModel`: of prompts (b, n), padded anywhere with PAD."""

    def __init__(self, lm: CausalLM) -> None:
        super().__init__()
        self.lm = lm
        self.dim = lm.dim

    def preprocess(self, inputs: Tensor) -> Tensor:
        """Prompts padded no more than they need."""
        return trimmed(inputs)

    def features(self, inputs: Tensor, recall: Recall | None = None) -> Tensor:
        """The mean (b, dim) of the last hidden states over the tokens, float32."""
        return over_tokens(self.lm.hidden(inputs, recall), inputs)


def feature_model(backbone: FrozenModel) -> Any:
    """A model of images as it is, a language model as `PromptFeatures`."""
    return PromptFeatures(backbone) if isinstance(backbone, CausalLM) else backbone


@dataclass(frozen=True, eq=False)
class Labelled:
    """Samples as a `FeatureModel` takes them, with a label each: prompts stay without answers.

    inputs (n, ...): images, or token ids padded on the left; labels int64 (n,).
    """

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, work: Workspace, samples: Any, labels: npt.NDArray[np.int64]) -> Labelled:
        """Images or texts with other labels than their own."""
        if isinstance(samples, Images):
            return cls(samples.images, labels)
        return cls(work.backbone.encode(samples.prompts).tokens.numpy(), labels)


def over_tokens(hidden: Tensor, prompts: Tensor) -> Tensor:
    """The mean of hidden states (b, n, dim) over the tokens of prompts (b, n), (b, dim) float32."""
    real = (prompts != PAD).unsqueeze(-1)
    return (hidden.float() * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)


@dataclass(frozen=True)
class PromptLook:
    """A look at prompts: at the places that are named, side by side."""

    places: tuple[str, ...] = ("final",)

    def __call__(self, lm: CausalLM, prompts: Tensor) -> Tensor:
        """What prompts (b, n), padded on the left, look like: (b, width), float32.

        Padding is no token, so that a prompt looks the same alone and in any batch. Raises
        ConfigError for a block that the model does not have.
        """
        wanted = self.blocks(lm.depth)
        seen: dict[str, Tensor] = {}

        def keep(block: int, hidden: Tensor) -> None:
            if block in wanted:
                mean = over_tokens(hidden, prompts)
                seen[f"block:{block}"] = F.layer_norm(mean, hidden.shape[-1:])

        if wanted or "final" in self.places:
            seen["final"] = over_tokens(lm.hidden(prompts, keep), prompts)
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
    lm = work.backbone
    return of_each(work, Texts(tuple(prompts), ()), lambda batch: look(lm, batch))


def of_each(work: Workspace, samples: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` (b, ...) of every batch of samples, joined in their order, float32, on the CPU.

    It is given preprocessed images, or the tokens of prompts, those of like lengths together.
    """
    engine, backbone = work.engine, work.backbone
    if isinstance(samples, Images):
        return engine.predict(lambda batch: function(backbone.preprocess(batch)), samples.images)
    tokens = backbone.encode(samples.prompts).tokens
    order = by_length(tokens, engine.settings.eval_batch_size)
    parts = []
    for rows in order:
        with torch.no_grad(), engine.autocast():
            parts.append(function(trimmed(tokens[rows]).to(engine.device)).float().cpu())
    joined = torch.cat(parts)
    return joined[torch.cat(list(order)).argsort()]


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
