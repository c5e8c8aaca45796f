"""What a model sees in an input: one vector, before any adapter is chosen.

`FeatureModel` is a model that gives it under any recall: of images the pooled features, of prompts
the mean of the last hidden states over the tokens. What is seen in prompts may be more, as
`PromptLook` names it, side by side:

    final      the mean of the last hidden states over the tokens
    block:N    the mean of the input of block N, layer-normalised
    blocks     that of every block
    tokens     the square root of how often each token occurs, in `TOKEN_PLACES` places at most

or, in `token_looks`, the inputs of every block at single tokens, or their means so far. Images and
prompts are looked at by the frozen model, or under the adapters of the first task (`Under`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.mixing import Mixture
from memtool.adapters.recalls import equally
from memtool.adapters.stock import Stock
from memtool.adapters.values import Recall
from memtool.backbones.answering import by_length, trimmed
from memtool.backbones.causal_lm import PAD, CausalLM
from memtool.backbones.interface import FrozenModel
from memtool.devices import at_hand, in_float32
from memtool.errors import ConfigError, MismatchError
from memtool.sections import MemorySettings
from memtool.streams.task import Images, Texts
from memtool.workspace import Workspace

TOKEN_PLACES = 1024
"""Places that tokens are counted in; those of a larger vocabulary share them."""

MOST_WIDE = 2048
"""Width of a look; what is wider is projected to it at random, always in the same way."""

PART_WIDE = 512
"""Width of what a block sees to itself, where every block does; narrowed likewise."""

_SPREAD = 2_654_435_761
"""Knuth's multiplier: neighbours in a vocabulary come to places far from each other."""


Under = Literal["frozen", "first"]
"""What a pass runs under: no adapter, or those of the first task."""


def looked_under(settings: MemorySettings) -> tuple[Under, ...]:
    """What the passes run under that keys look through; none where every block has its own."""
    if settings.scope != "model":
        return ()
    named: dict[str, tuple[Under, ...]] = {
        "frozen": ("frozen",),
        "first-adapter": ("first",),
        "both": ("frozen", "first"),
    }
    return named[settings.look_under]


class FeatureModel(Protocol):
    """A frozen model that sees one vector in an input."""

    @property
    def dim(self) -> int:
        """Entries of the vector."""

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
        """Prompts padded no more than they need; as they are where they are not `at_hand`."""
        return trimmed(inputs) if at_hand(inputs) else inputs

    def features(self, inputs: Tensor, recall: Recall | None = None) -> Tensor:
        """The mean (b, dim) of the last hidden states over the tokens, float32."""
        return over_tokens(self.lm.hidden(inputs, recall), inputs)


def feature_model(backbone: FrozenModel) -> Any:
    """A model of images as it is, a language model as `PromptFeatures`."""
    return PromptFeatures(backbone) if isinstance(backbone, CausalLM) else backbone


def narrowed_for(model: FeatureModel) -> Callable[[Tensor], Tensor]:
    """What becomes of inputs before they go to the device of a model: prompts are trimmed."""
    return trimmed if isinstance(model, PromptFeatures) else lambda inputs: inputs


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
    """A look at prompts: at the places that are named, side by side.

    With `apart` every block has a memory of its own: of the place `blocks` it sees its own input,
    the other places they all see. Each place is then narrowed alone. The places are looked at in
    every one of the `passes`, but for tokens, which are the same in all; `first` are the adapters
    of the first task, the equal mixture of which is looked under.
    """

    places: tuple[str, ...] = ("final",)
    apart: bool = False
    passes: tuple[Under, ...] = ("frozen",)
    first: Stock | None = field(default=None, compare=False)

    @classmethod
    def of(cls, settings: MemorySettings) -> PromptLook:
        """The look of a memory. That of tokens sees the blocks at each of them."""
        if settings.scope != "model":
            return cls(("blocks",) if settings.scope == "token" else settings.places, apart=True)
        return cls(settings.places, passes=looked_under(settings))

    def __call__(self, lm: CausalLM, prompts: Tensor) -> Tensor:
        """What prompts (b, n), padded on the left, look like: (b, width), float32.

        Padding is no token, so that a prompt looks the same alone and in any batch. Raises
        ConfigError for a block that the model does not have; MismatchError without a `first`.
        """
        wanted = self.blocks(lm.depth)
        passes = self.passes if self.runs else ()
        return self._joined(lm, prompts, [self._pass(lm, prompts, one, wanted) for one in passes])

    def passing(self, lm: CausalLM, prompts: Tensor) -> Callable[[int, Tensor], Tensor | None]:
        """The same in a pass that recalls, for a look that ends at a block (`seen_at`).

        It is given the inputs (b, n, dim) of blocks as they are reached, where an answer may stand
        in the place of padding, and gives what prompts look like at that block; None at any other.
        """
        wanted, seen = self.blocks(lm.depth), dict[str, Tensor]()

        def keep(block: int, hidden: Tensor) -> Tensor | None:
            if block not in wanted:
                return None
            seen[f"block:{block}"] = _of_block(hidden, prompts)
            return None if len(seen) < len(wanted) else self._joined(lm, prompts, [seen])

        return keep

    def seen_at(self, depth: int) -> int | None:
        """The block of a model of so many at whose input all is seen, as of `MemorySettings`."""
        if self.apart or self.passes != ("frozen",) or "final" in self.places:
            return None
        return max(self.blocks(depth), default=None)

    def _joined(self, lm: CausalLM, prompts: Tensor, passes: list[dict[str, Tensor]]) -> Tensor:
        """The places of every pass side by side, with what needs no pass."""
        if "tokens" in self.places:
            shares = _token_shares(prompts, lm.ids(prompts), len(lm.embed.weight))
            passes = [{**seen, "tokens": shares} for seen in passes[:1] or [{}]] + passes[1:]
        named = self._named(lm.depth)
        parts = [seen[place] for seen in passes for place in named if place in seen]
        if self.apart:
            return torch.cat([narrowed(part, PART_WIDE) for part in parts], dim=1)
        return narrowed(torch.cat(parts, dim=1), MOST_WIDE)

    def _pass(
        self, lm: CausalLM, prompts: Tensor, under: Under, wanted: set[int]
    ) -> dict[str, Tensor]:
        """The places of one pass, by name, each (b, dim)."""
        recall = self._recall(under, prompts.device)
        seen: dict[str, Tensor] = {}

        def keep(block: int, hidden: Tensor) -> Mixture | None:
            if block in wanted:
                seen[f"block:{block}"] = _of_block(hidden, prompts)
            return None if recall is None else recall(block, hidden)

        seen["final"] = over_tokens(lm.hidden(prompts, keep), prompts)
        return seen

    def _recall(self, under: Under, device: torch.device) -> Recall | None:
        if under == "frozen":
            return None
        if self.first is None:
            raise no_first_adapter()
        return equally(self.first.take(range(len(self.first)), device), "delta")

    def width(self, lm: CausalLM) -> int:
        """Entries of what it sees under a model."""
        return self.width_of(lm.depth, lm.dim, len(lm.embed.weight))

    def width_of(self, depth: int, dim: int, words: int) -> int:
        """The same of a model of so many blocks that are `dim` wide, and so many tokens."""
        wide = {"tokens": min(words, TOKEN_PLACES)}
        named = self._named(depth)
        later = [place for place in named if place != "tokens"] * (len(self.passes) - 1)
        widths = [wide.get(place, dim) for place in (*named, *later)]
        if self.apart:
            return sum(min(PART_WIDE, one) for one in widths)
        return min(MOST_WIDE, sum(widths))

    def own(self, lm: CausalLM) -> tuple[int, int] | None:
        """How many blocks have a memory, and how many entries each sees alone; None: one sees all.

        These entries come first, block by block.
        """
        return (lm.depth, min(PART_WIDE, lm.dim)) if self.apart else None

    @property
    def runs(self) -> bool:
        """Whether the model runs for it."""
        return self.places != ("tokens",)

    def blocks(self, depth: int) -> set[int]:
        """The blocks that it looks at, of a model of so many."""
        return blocks_in(self._named(depth), depth, remedy="blocks,tokens")

    def _named(self, depth: int) -> list[str]:
        """The places one by one, each once."""
        places = sorted(self.places, key=lambda one: one != "blocks") if self.apart else self.places
        return each_place(places, depth)


def _of_block(hidden: Tensor, prompts: Tensor) -> Tensor:
    """What is seen of the input (b, n, dim) of a block: (b, dim), float32."""
    return F.layer_norm(over_tokens(hidden, prompts), hidden.shape[-1:])


def is_seen_before(begin: int, seen_at: int | None) -> bool:
    """Whether adapters that begin in a block change nothing of a look that ends at one.

    So the pass that recalls sees the same on its way, and none has to run ahead. None: the look
    does not end at a block.
    """
    return seen_at is not None and seen_at <= begin


def no_first_adapter() -> MismatchError:
    """A look under adapters that nobody gave."""
    return MismatchError(
        "a look under the adapters of the first task, and none is there",
        remedy="memtool consolidate",
    )


def columns_of(own: tuple[int, int] | None, width: int) -> Tensor:
    """The entries of a look of this width that each memory sees: (memories, d).

    Those that it sees alone, as `PromptLook.own` says, and all behind them. Raises MismatchError
    where there are not as many.
    """
    if own is None:
        return torch.arange(width).unsqueeze(0)
    blocks, each = own
    if blocks * each > width:
        raise MismatchError(
            f"a look of {width} entries for {blocks} blocks that see {each} each",
            expected=f"at least {blocks * each}",
            remedy="memtool verify",
        )
    shared = torch.arange(blocks * each, width).expand(blocks, -1)
    return torch.cat([torch.arange(blocks * each).view(blocks, each), shared], dim=1)


def each_place(places: Sequence[str], depth: int) -> list[str]:
    """Places one by one, each once: `blocks` is every block of a model of so many."""
    found: list[str] = []
    for place in places:
        found += [f"block:{n}" for n in range(depth)] if place == "blocks" else [place]
    return list(dict.fromkeys(found))


def blocks_in(places: Sequence[str], depth: int, *, remedy: str) -> set[int]:
    """The blocks among places, of a model of so many.

    Raises ConfigError for one that it does not have; `remedy` is another `memory.look_at`.
    """
    named = {int(place[6:]) for place in places if place.startswith("block:")}
    if beyond := sorted(block for block in named if block >= depth):
        raise ConfigError(
            f"a look at block {beyond[0]} of a model of {depth} blocks",
            expected=f"block:0 to block:{depth - 1}",
            remedy=f"--set memory.look_at={remedy}",
        )
    return named


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
    order, parts = [], []
    for rows, batch in batches(work, backbone.encode(samples.prompts).tokens):
        with torch.no_grad(), engine.autocast():
            parts.append(function(batch).float().cpu())
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def token_looks(
    work: Workspace, prompts: Sequence[str], most: int, *, prefix: bool = False
) -> Tensor:
    """What every block sees at some tokens of prompts: (tokens, blocks · d), float32, on the CPU.

    At most `most` tokens, spread evenly over all of the prompts; the input of each block at a
    token, or with `prefix` its mean up to there, layer-normalised, narrowed as a `PromptLook` of
    the blocks apart, and side by side.
    """
    lm = work.backbone
    tokens = lm.encode(prompts).tokens
    places = (tokens != PAD).nonzero()
    places = places[
        torch.linspace(0, len(places) - 1, min(most, len(places)), dtype=torch.float64).long()
    ]
    wanted = torch.full(tokens.shape, -1)
    wanted[places[:, 0], places[:, 1]] = torch.arange(len(places))
    found = torch.empty(lm.depth, len(places), min(PART_WIDE, lm.dim))
    for rows, batch in batches(work, tokens):
        here = wanted[rows][:, -batch.shape[1] :]
        _look_at_tokens(work, batch, here, found, SoFar(batch) if prefix else None)
    return torch.cat([*found], dim=1)


def _look_at_tokens(
    work: Workspace, batch: Tensor, wanted: Tensor, found: Tensor, so_far: SoFar | None
) -> None:
    """Put what blocks see at the tokens (b, n) that have a row in `found` (blocks, rows, d)."""
    chosen, rows = (wanted >= 0).to(batch.device), wanted[wanted >= 0]

    def keep(block: int, hidden: Tensor) -> None:
        seen = hidden if so_far is None else so_far(block, hidden)
        found[block, rows] = token_states(seen[chosen]).cpu()

    with torch.no_grad(), work.engine.autocast():
        work.backbone.hidden(batch, keep)


class SoFar:
    """The means of the inputs of every block over the tokens so far, in one run over prompts.

    Tokens that are generated behind the prompts go on from them; padding before them is none.
    """

    def __init__(self, prompts: Tensor) -> None:
        """Prompts (b, n), padded on the left; what stands behind their first token counts."""
        self._real = (prompts != PAD).int().cummax(dim=1).values.unsqueeze(-1)
        self._known: dict[int, tuple[int, Tensor, Tensor]] = {}

    def __call__(self, block: int, hidden: Tensor) -> Tensor:
        """The means (b, n, dim), float32 at least, at the tokens that run now."""
        wide = in_float32(hidden)
        nothing = wide.new_zeros(len(wide), 1, 1)
        done, sums, counts = self._known.get(block, (0, nothing, nothing))
        real = self._real[:, done : done + wide.shape[1]].to(wide.dtype)
        real = F.pad(real, (0, 0, 0, wide.shape[1] - real.shape[1]), value=1.0)
        sums, counts = sums + (wide * real).cumsum(dim=1), counts + real.cumsum(dim=1)
        last = sums[:, -1:].clone(), counts[:, -1:].clone()  # a view would keep all of them
        self._known[block] = done + wide.shape[1], *last
        return sums / counts.clamp_min(1)


def token_states(hidden: Tensor) -> Tensor:
    """What a block sees at single tokens, of its input (..., dim): (..., d), float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return narrowed(F.layer_norm(hidden.float(), hidden.shape[-1:]), PART_WIDE)


def batches(work: Workspace, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of tokens (n, length): indices of samples of like lengths, and their tokens on the device."""
    for rows in by_length(tokens, work.engine.settings.eval_batch_size):
        yield rows, trimmed(tokens[rows]).to(work.engine.device)


def _token_shares(prompts: Tensor, ids: Tensor, words: int) -> Tensor:
    """Square roots of the shares of tokens (b, places), as long as a layer-normalised vector."""
    places = min(words, TOKEN_PLACES)
    if words > places:
        ids = (ids * _SPREAD) % 2**32 * places // 2**32
    real = (prompts != PAD).float()
    counts = real.new_zeros(len(prompts), places).scatter_add_(1, ids, real)
    return (places * counts / real.sum(dim=1, keepdim=True).clamp_min(1)).sqrt()


def narrowed(seen: Tensor, most: int) -> Tensor:
    """What was seen (..., width), at most so wide; distances stay nearly as they are."""
    width = seen.shape[-1]
    if width <= most:
        return seen
    with torch.autocast(seen.device.type, enabled=False):
        return seen @ directions(width, most, seen.device).to(seen.dtype)


@lru_cache(maxsize=8)
def directions(width: int, narrow: int, device: torch.device) -> Tensor:
    """Random directions (width, narrow), always the same ones."""
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(width, narrow, generator=generator, dtype=torch.float32, device="cpu")
    return (drawn / narrow**0.5).to(device)
