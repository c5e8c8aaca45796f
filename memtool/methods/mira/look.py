"""What a memory over images looks at before it recalls, and what its head reads beside.

    places   block:N, the input of a block, pooled; blocks, that of every block; final, the features
    under    the frozen model, or the model under the adapters of the first task, which never change

What is seen stands side by side, each part pooled and normalised alone, as texts are looked at
(`memtool.learning.looks`). Keys and head may want the same pass; it runs once. Where no adapter
sits before the last place of a look at the frozen model, the pass that recalls sees the same on its
way, and none runs ahead (`Passing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor, nn

from memtool.adapters.mixing import Mixture
from memtool.adapters.recalls import equally
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.interface import Backbone
from memtool.devices import without_autocast
from memtool.errors import ConfigError
from memtool.learning.looks import (
    MOST_WIDE,
    Under,
    blocks_in,
    directions,
    each_place,
    is_seen_before,
    looked_under,
    no_first_adapter,
)
from memtool.memories.query import pooled, require_token
from memtool.sections import MemorySettings
from memtool.settings import HeadSettings


class Passes(Protocol):
    """An image model, or one from a block on (`Onward`), for passes over the same inputs."""

    def features(self, inputs: Tensor, recall: Recall | None = None) -> Tensor:
        """Pooled features (b, dim)."""

    def hidden(self, inputs: Tensor, block: int, recall: Recall | None = None) -> Tensor:
        """The input (b, tokens, dim) of a block."""


def read_beside(head: HeadSettings) -> tuple[Under, ...]:
    """What the features are of that the head reads beside the recalled ones."""
    return tuple(under for under in get_args(Under) if under == head.beside)


def needs_first(settings: MemorySettings, head: HeadSettings) -> bool:
    """Whether anything is seen under the adapters of the first task."""
    return "first" in {*looked_under(settings), *read_beside(head)}


def passes_of(
    settings: MemorySettings, head: HeadSettings, depth: int, begin: int = 0
) -> dict[Under, float]:
    """The share of the blocks of a model that runs in every pass before the recall, by its under.

    Keys and head share a pass. Adapters begin in the block `begin`: where all is seen by then,
    keys need none.
    """
    looked, read = looked_under(settings), read_beside(head)
    if is_seen_before(begin, settings.seen_at(depth)):
        looked = ()
    places = each_place(settings.places, depth)
    last = max([*blocks_in(places, depth, remedy="final"), depth * ("final" in places)])
    shares = dict.fromkeys(looked, last / depth)
    return {**shares, **dict.fromkeys(read, 1.0)}


def width_of(settings: MemorySettings, backbone: Backbone, blocks: Sequence[int]) -> int:
    """Entries of a query, without the constant, of a memory in each of `blocks`, or of one for all.

    Raises ConfigError for a block or a class token that is not there, and where memories in blocks
    differ in width.
    """
    require_token(settings.token, backbone.prefix_tokens)
    if settings.scope == "model":
        return min(MOST_WIDE, len(looked_under(settings)) * _wide(settings, backbone))
    of_width: dict[int, list[int]] = {}
    for block in blocks:
        of_width.setdefault(backbone.block_dim(block), []).append(block)
    if len(of_width) > 1:
        (alike, *_) = sorted(of_width.values(), key=len, reverse=True)
        raise ConfigError(
            f"memory.scope {settings.scope} over {backbone.name}, whose adapted blocks are "
            f"{', '.join(map(str, sorted(of_width)))} wide",
            expected="blocks of one width, or one memory for all",
            remedy=f"--set memory.scope=model, or --set memory.blocks={','.join(map(str, alike))}",
        )
    return next(iter(of_width))


def _wide(settings: MemorySettings, backbone: Backbone) -> int:
    """Entries of all that one pass shows: features, and inputs of blocks."""
    places = each_place(settings.places, backbone.depth)
    blocks = blocks_in(places, backbone.depth, remedy="final")
    return sum(map(backbone.block_dim, blocks)) + backbone.dim * ("final" in places)


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of a batch: the `query` (b, width) of one memory, features `beside` (b, f).

    None where every block has a memory, or nothing stands beside; or the query is seen by `later`,
    in the pass that recalls.
    """

    query: Tensor | None
    beside: Tensor | None
    later: ImageLook | None = None

    def passing(self) -> Passing | None:
        """What sees the query of one pass, where that is seen later."""
        return None if self.later is None else Passing(self.later)

    def widened(self, features: Tensor) -> Tensor:
        """Features (b, dim), and behind them those beside."""
        return features if self.beside is None else torch.cat([features, self.beside], dim=1)


class ImageLook(nn.Module):
    """The passes before a memory recalls: `forward(backbone, pixels)` says what they show.

    `first` are the adapters of the first task, the equal mixture of which is looked under.
    """

    narrow: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        settings: MemorySettings,
        head: HeadSettings | None = None,
        first: AdapterValues | None = None,
    ) -> None:
        """Raises ConfigError for a block that is not there; MismatchError without a `first`."""
        super().__init__()
        self.under = looked_under(settings)
        self.beside = () if head is None else read_beside(head)
        depth = backbone.depth
        self.places = tuple(each_place(settings.places, depth)) if self.under else ()
        self.blocks = blocks_in(self.places, depth, remedy="final")
        self.prefix_tokens = backbone.prefix_tokens
        self.token, self.mix = settings.token, settings.mix
        self.norm = settings.query_norm == "layer"
        self.first = first if "first" in (*self.under, *self.beside) else None
        if self.first is None and "first" in (*self.under, *self.beside):
            raise no_first_adapter()
        wide = len(self.under) * _wide(settings, backbone) if self.places else 0
        narrow = None
        if wide > MOST_WIDE:
            narrow = directions(wide, MOST_WIDE, torch.device("cpu")).clone()
        self.register_buffer("narrow", narrow, persistent=False)
        self.features_width = backbone.dim * (1 + len(self.beside))
        self._seen_at = settings.seen_at(depth)

    def forward(
        self,
        backbone: Passes,
        pixels: Tensor,
        *,
        begin: int = 0,
        query: bool = True,
        beside: bool = True,
    ) -> Seen:
        """What is seen of preprocessed pixels, or of the inputs of a model from a block on.

        Without `query` or `beside` only the other.

        The pass that follows has adapters from the block `begin` on.
        """
        passing = query and is_seen_before(begin, self._seen_at)
        asked = self.under if query and not passing else ()
        read = self.beside if beside else ()
        parts: list[Tensor] = []
        features: dict[Under, Tensor] = {}
        for under in dict.fromkeys((*asked, *read)):
            wanted = self.places if under in asked else ()
            seen = self._pass(backbone, pixels, under, wanted, whole=under in read)
            if under in asked:
                parts += [self._pooled(place, seen[place]) for place in self.places]
            if under in read:
                features[under] = seen["final"]
        found = [features[under] for under in read]
        whole = torch.cat(found, dim=1) if found else None
        return Seen(self._joined(parts), whole, self if passing else None)

    def _pass(
        self,
        backbone: Passes,
        pixels: Tensor,
        under: Under,
        places: Sequence[str],
        *,
        whole: bool,
    ) -> dict[str, Tensor]:
        """The places of one pass, by name: hidden states (b, n, dim), and the features (b, dim)."""
        wanted = self.blocks if places else ()
        recall = self._recall(under)
        seen: dict[str, Tensor] = {}

        def keep(block: int, hidden: Tensor) -> Mixture | None:
            if block in wanted:
                seen[f"block:{block}"] = hidden
            return None if recall is None else recall(block, hidden)

        if whole or "final" in places:
            seen["final"] = backbone.features(pixels, keep)
        elif len(wanted) == 1 and recall is None:
            (last,) = wanted
            seen[f"block:{last}"] = backbone.hidden(pixels, last)
        else:
            last = max(wanted)
            seen[f"block:{last}"] = backbone.hidden(pixels, last, keep)
        return seen

    def _recall(self, under: Under) -> Recall | None:
        if under == "frozen" or self.first is None:
            return None
        return equally(self.first, self.mix)

    def _pooled(self, place: str, hidden: Tensor) -> Tensor:
        """A part (b, dim) of what is seen: features are pooled already."""
        if place == "final":
            return pooled(hidden.unsqueeze(1), "class", 0, norm=self.norm)
        return pooled(hidden, self.token, self.prefix_tokens, norm=self.norm)

    def part(self, block: int, hidden: Tensor) -> Tensor | None:
        """What is seen of the input (b, n, dim) of a block, (b, dim); None where nothing is."""
        return self._pooled(f"block:{block}", hidden) if block in self.blocks else None

    def whole(self, parts: Mapping[int, Tensor]) -> Tensor | None:
        """The query (b, width) of the parts of all blocks that are looked at, else None."""
        if len(parts) < len(self.blocks):
            return None
        return self._joined([parts[int(place[6:])] for place in self.places])

    def _joined(self, parts: Sequence[Tensor]) -> Tensor | None:
        """The parts side by side, projected where they are too wide."""
        if not parts:
            return None
        whole = torch.cat([*parts], dim=1)
        if self.narrow is None:
            return whole
        with without_autocast(whole):
            return whole @ self.narrow.to(whole)


class Passing:
    """The look of one pass that recalls, as its blocks are reached: see `is_seen_before`."""

    def __init__(self, look: ImageLook) -> None:
        self._look = look
        self._parts: dict[int, Tensor] = {}

    def __call__(self, block: int, hidden: Tensor) -> Tensor | None:
        """The query (b, width) at the block where the last place is seen; None at any other."""
        part = self._look.part(block, hidden)
        if part is None:
            return None
        self._parts[block] = part
        return self._look.whole(self._parts)
