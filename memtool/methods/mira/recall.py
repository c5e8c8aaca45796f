"""How an input recalls its mixture: backbone, stacked values and keyed memory as one module.

`scope` "block": the memory of every block looks at that block's own input, as in MIRA's paper.
`scope` "model": one memory looks at passes that run before (`look`), or at the blocks before the
first adapter, and its coefficients serve all blocks; what it sees never depends on what it recalls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memtool.adapters.mixing import Mixture
from memtool.adapters.picks import Picks
from memtool.adapters.recalls import equal_shares
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.interface import Backbone, Onward, Resumable
from memtool.errors import ConfigError
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.keyed import KeyedMemory
from memtool.memories.novelty import Reaches
from memtool.methods.mira.look import ImageLook, Passes, Seen
from memtool.sections import SHARES, MemorySettings, Mix


def memory_blocks(
    settings: MemorySettings, backbone: Backbone, blocks: Sequence[int]
) -> tuple[int, ...]:
    """The blocks that have a memory, of those that are adapted.

    One that serves all has the number of the block that it looks at, or one behind all. Raises
    ConfigError for `memory.blocks` that are not adapted.
    """
    if settings.scope != "model":
        return _chosen(settings, blocks)
    alone = settings.look_at_block
    return (backbone.depth if alone is None else alone,)


def _chosen(settings: MemorySettings, blocks: Sequence[int]) -> tuple[int, ...]:
    """The adapted blocks, or those of them that `memory.blocks` names."""
    if settings.blocks is None:
        return tuple(blocks)
    kept = [block for block in settings.blocks if block in blocks]
    missing = [str(block) for block in settings.blocks if block not in blocks]
    if missing:
        raise ConfigError(
            f"memory.blocks names {', '.join(missing)}, which no adapter changes",
            expected=f"some of {', '.join(map(str, blocks))}",
            remedy="--set memory.blocks=" + ",".join(map(str, kept or blocks)),
        )
    return tuple(kept)


def first_norms(
    settings: MemorySettings, backbone: Backbone, blocks: Sequence[int]
) -> tuple[nn.LayerNorm, ...]:
    """The first norms of blocks, where queries go through them. Errors as `Backbone.first_norm`."""
    if settings.query_norm != "block":
        return ()
    return tuple(backbone.first_norm(block) for block in blocks)


def begun(backbone: Backbone, pixels: Tensor) -> tuple[Passes, Tensor]:
    """A model and its input for several passes, which share what is before the first block."""
    if isinstance(backbone, Resumable):
        return Onward(backbone, 0), backbone.hidden(pixels, 0)
    return backbone, pixels


def reaches_of(queries: Mapping[int, QueryStatistics]) -> Reaches | None:
    """What tells which queries are unlike those of all tasks; None where there is no task.

    Raises ConfigError for a task whose queries do not say how far they reach.
    """
    for task, counted in queries.items():
        if Reaches.of([counted.moments]) is None:
            raise ConfigError(
                f"memory.frozen novelty: the queries of task {task} do not say how far they reach: "
                "there are too few, or only equal ones",
                expected="several training images of a class",
                remedy="--set memory.frozen=none",
            )
    return Reaches.of([counted.moments for counted in queries.values()])


def moved(coefficients: Tensor, offset: Tensor, *, shares: bool) -> Tensor:
    """Coefficients (batch, t) moved by an offset (batch, t): added to them.

    Of shares of one it is added to their logarithms: a · exp(offset), scaled to sum to one again.
    """
    if not shares:
        return coefficients + offset
    grown = coefficients * (offset - offset.amax(dim=-1, keepdim=True).detach()).exp()
    return grown / grown.sum(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Given:
    """Weights (batch, memories, t) of a recall; of the adapter `gone` a decoder adds nothing."""

    weights: Tensor
    gone: int | None = None

    def without(self, added: Tensor) -> Tensor:
        """What a decoder adds (batch, places, t, rank), less the part of the adapter gone."""
        if self.gone is None:
            return added
        others = torch.arange(added.shape[2], device=added.device) != self.gone
        return added * others[:, None]


class _Read(NamedTuple):
    """Coefficients (batch, t), or (batch, k) of the adapters picked; what a decoder adds."""

    coefficients: Tensor
    picks: Picks | None
    added: Tensor | None


class MemoryRecall:
    """The recall of one forward pass; `coefficients` holds (batch, t) by the memory's block.

    With an `offset` (batch, memories, t) they are `moved` by it. A decoder beside the keys tells
    the ranks of an adapter apart.
    """

    def __init__(
        self,
        model: MemoryModel,
        seen: Seen,
        offset: Tensor | None = None,
        given: Given | None = None,
    ) -> None:
        """`seen` is what one memory for all blocks is asked, now or in this pass.

        With `given` weights nothing is read but what a decoder adds to them.
        """
        self._memory = model.memory
        self._values = model.values
        self._settings = model.settings
        self._passing = seen.passing()
        self._offset = offset
        self._given = given
        self.coefficients: dict[int, Tensor] = {}
        self._shared: _Read | None = None
        self._mixture: Mixture | None = None
        if seen.query is not None:
            self._shared = self._read_for_all(seen.query)

    def _read_for_all(self, query: Tensor) -> _Read:
        (block,) = self._memory.blocks
        return self._read(block, query)

    def _read(self, block: int, hidden: Tensor) -> _Read:
        memory = self._memory[block]
        found, near, added = memory.read(hidden)
        if self._given is not None:
            found, near = self._given.weights[:, self._memory.blocks.index(block)], None
            added = added if added is None else self._given.without(added)
        if self._offset is not None:
            here = self._offset[:, self._memory.blocks.index(block)]
            found = moved(found, here, shares=self._are_shares)
        self.coefficients[block] = found
        few = memory.is_sparse and (self._offset is None or self._are_shares)
        # A program of torch.export has no tensors whose size depends on the input.
        if not few or added is not None or torch.compiler.is_compiling():
            return _Read(found, None, added)
        return _Read(*Picks.of(found, near), None)

    @property
    def _are_shares(self) -> bool:
        """Whether an offset leaves coefficients of zero as they are."""
        return self._settings.separation in SHARES

    def __call__(self, block: int, hidden: Tensor) -> Mixture | None:
        """The mixture of a block for its input (batch, tokens, dim)."""
        stored, mix = self._values, self._settings.mix
        if self._mixture is not None:  # of a block before, which has the same coefficients
            here = stored.block(block)
            return None if here is None else self._mixture.in_block(here)
        if self._passing is not None and self._shared is None:
            query = self._passing(block, hidden)
            if query is None:
                return None  # no adapter acts before all is seen
            self._shared = self._read_for_all(query)
        read = self._shared
        asked = block in self._memory.blocks
        adapted = block in stored.layout.blocks
        if read is None and not asked and self._settings.blocks is not None:
            # A block that was left out.
            values = stored.block(block)
            if values is None:
                return None
            return Mixture.weighted(values, equal_shares(len(hidden), values), mix)
        if read is None and (adapted or asked):
            read = self._read(block, hidden)
        if read is None or not adapted:
            return None  # no adapter acts here, though each block is looked at
        if read.picks is not None:
            picked = stored.at(block, read.picks)
            assert picked is not None
            return Mixture.weighted(picked[0], read.coefficients, mix, picked[1])
        values = stored.block(block)
        assert values is not None
        if read.added is None:
            mixture = Mixture.weighted(values, read.coefficients, mix)
            if self._shared is not None:
                self._mixture = mixture
            return mixture
        place = 0 if read.added.shape[1] == 1 else stored.layout.blocks.index(block)
        return Mixture.ranked(values, read.coefficients.unsqueeze(-1) + read.added[:, place])


class MemoryModel(nn.Module):
    """A frozen backbone that recalls a mixture of adapters for every sample.

    `forward(images)` maps uint8 (batch, h, w, 3) to features (batch, dim). Keys and query modules
    are its only parameters that may learn.
    """

    def __init__(
        self,
        backbone: Backbone,
        values: AdapterValues,
        memory: KeyedMemory,
        settings: MemorySettings,
        look: ImageLook | None = None,
    ) -> None:
        """`look` says what is seen beforehand; without one as `settings` say, nothing beside."""
        super().__init__()
        self.backbone = backbone
        self.values = values
        self.memory = memory
        self.settings = settings
        self.mix: Mix = settings.mix
        self.look = ImageLook(backbone, settings) if look is None else look

    def recall(self, pixels: Tensor) -> MemoryRecall:
        """A fresh recall for one forward pass over `pixels`."""
        return self._recall(self.seen_of(pixels, beside=False))

    def seen_of(self, pixels: Tensor, *, beside: bool = True) -> Seen:
        """What is seen of preprocessed pixels before the pass that recalls."""
        return self._seen(self.backbone, pixels, beside=beside)

    def _seen(self, backbone: Passes, inputs: Tensor, *, beside: bool = True) -> Seen:
        seen: Seen = self.look(backbone, inputs, begin=self.values.begin, beside=beside)
        return seen

    def _recall(self, seen: Seen, offset: Tensor | None = None) -> MemoryRecall:
        return MemoryRecall(self, seen, offset)

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, f) as the head reads them: recalled ones, perhaps others beside."""
        backbone, inputs = begun(self.backbone, self.backbone.preprocess(images))
        seen = self._seen(backbone, inputs)
        return seen.widened(backbone.features(inputs, self._recall(seen)))

    def under(self, images: Tensor, recall: Recall | None) -> Tensor:
        """Features (batch, f) as the head reads them, under another recall."""
        pixels = self.backbone.preprocess(images)
        if not self.look.beside:
            return self.backbone.features(pixels, recall)
        backbone, inputs = begun(self.backbone, pixels)
        features = backbone.features(inputs, recall)
        return self.look(backbone, inputs, query=False).widened(features)

    def given(self, images: Tensor, given: Given) -> Tensor:
        """Features (batch, f) as the head reads them, under weights that are given."""
        backbone, inputs = begun(self.backbone, self.backbone.preprocess(images))
        seen = self._seen(backbone, inputs)
        recall = MemoryRecall(self, seen, given=given)
        return seen.widened(backbone.features(inputs, recall))

    def with_coefficients(
        self, images: Tensor, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (batch, f) as the head reads them, and coefficients (batch, memories, t).

        `offset` as in `MemoryRecall`.
        """
        backbone, inputs = begun(self.backbone, self.backbone.preprocess(images))
        return self._mixed(backbone, inputs, self._seen(backbone, inputs), offset)

    def mixed(
        self, pixels: Tensor, seen: Seen, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `with_coefficients`, of preprocessed pixels and what was seen of them."""
        return self._mixed(self.backbone, pixels, seen, offset)

    def _mixed(
        self, backbone: Passes, inputs: Tensor, seen: Seen, offset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        recall = self._recall(seen, offset)
        features = seen.widened(backbone.features(inputs, recall))
        found = [recall.coefficients[block] for block in self.memory.blocks]
        return features, torch.stack(found, dim=1)

    def seen(self, pixels: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Of preprocessed pixels features (batch, f), coefficients and queries, in one go.

        Coefficients (batch, memories, t); queries (batch, memories, d), without the constant.
        `offset` as in `MemoryRecall`.
        """
        backbone, inputs = begun(self.backbone, pixels)
        seen = self._seen(backbone, inputs)
        recall = self._recall(seen, offset)
        probe = QueryProbe(self.memory, recall, seen)
        features = seen.widened(backbone.features(inputs, probe))
        coefficients = [recall.coefficients[block] for block in self.memory.blocks]
        queries = [probe.queries[block] for block in self.memory.blocks]
        return features, torch.stack(coefficients, dim=1), torch.stack(queries, dim=1)


class QueryProbe:
    """A recall that passes another one on and keeps what the given memories would be asked.

    `queries[l]` (batch, d) is the query of memory l, without the constant: of what was `seen`
    beforehand or is seen in this pass, or of the input of its block.
    """

    def __init__(self, memory: KeyedMemory, inner: Recall | None, seen: Seen) -> None:
        self._memory = memory
        self._inner = inner
        self._passing = seen.passing()
        self._apart = seen.query is None and self._passing is None
        self.queries: dict[int, Tensor] = {}
        self._keep(seen.query)

    def _keep(self, query: Tensor | None) -> None:
        """Keep the query of one memory for all blocks, once it is seen."""
        if query is not None:
            (block,) = self._memory.blocks
            self.queries[block] = self._memory[block].query.bare(query)

    def __call__(self, block: int, hidden: Tensor) -> Mixture | None:
        """What the inner recall says."""
        if self._passing is not None:
            self._keep(self._passing(block, hidden))
        elif self._apart and block in self._memory.blocks:
            self.queries[block] = self._memory[block].query.bare(hidden)
        return None if self._inner is None else self._inner(block, hidden)


def features_and_queries(
    backbone: Backbone,
    memory: KeyedMemory,
    look: ImageLook,
    inner: Recall | None,
    images: Tensor,
    begin: int = 0,
) -> Tensor:
    """Features (batch, f) with those beside, and the queries of all memories behind them.

    The `inner` recall has adapters from the block `begin` on.
    """
    model, inputs = begun(backbone, backbone.preprocess(images))
    seen = look(model, inputs, begin=begin)
    probe = QueryProbe(memory, inner, seen)
    features = seen.widened(model.features(inputs, probe))
    parts: Sequence[Tensor] = [probe.queries[block] for block in memory.blocks]
    return torch.cat([features.float(), *parts], dim=1)
