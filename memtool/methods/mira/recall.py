"""How an input recalls its mixture: backbone, stacked values and keyed memory as one module.

`scope` "block": the memory of every block looks at that block's own input, as in MIRA's paper.
`scope` "model": one memory looks at the input of block `look_at` of the frozen model and its
coefficients serve all blocks; the blocks before `look_at` then run twice, and what it sees never
depends on what it recalls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memtool.adapters.layout import Layout
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.interface import Backbone
from memtool.memories.keyed import KeyedMemory
from memtool.sections import MemorySettings, Mix


def memory_blocks(settings: MemorySettings, layout: Layout) -> tuple[int, ...]:
    """The blocks that have a memory."""
    return (settings.look_at_block,) if settings.scope == "model" else layout.blocks


class MemoryRecall:
    """The recall of one forward pass; `coefficients` holds (batch, t) by the memory's block."""

    def __init__(self, model: MemoryModel, shared: Tensor | None) -> None:
        self._model = model
        self._shared = shared
        self.coefficients: dict[int, Tensor] = {}

    def __call__(self, block: int, hidden: Tensor) -> Mixture | None:
        """The mixture of a block for its input (batch, tokens, dim)."""
        values, coefficients = self._model.values.block(block), self._shared
        if coefficients is None and (values is not None or block in self._model.memory.blocks):
            coefficients = self._model.memory.coefficients(block, hidden)
            self.coefficients[block] = coefficients
        if values is None or coefficients is None:
            return None  # no adapter acts here, though each block is looked at
        return Mixture.weighted(values, coefficients, self._model.mix)


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
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.values = values
        self.memory = memory
        self.settings = settings
        self.mix: Mix = settings.mix
        self.look_at = settings.look_at_block if settings.scope == "model" else None

    def recall(self, pixels: Tensor) -> MemoryRecall:
        """A fresh recall for one forward pass over `pixels`."""
        return self._recall(self._looked_at(pixels))

    def _looked_at(self, pixels: Tensor) -> Tensor | None:
        """What one memory for all blocks looks at; None where every block has its own."""
        return None if self.look_at is None else self.backbone.hidden(pixels, self.look_at)

    def _recall(self, hidden: Tensor | None) -> MemoryRecall:
        if self.look_at is None or hidden is None:
            return MemoryRecall(self, None)
        shared = self.memory.coefficients(self.look_at, hidden)
        recall = MemoryRecall(self, shared)
        recall.coefficients[self.look_at] = shared
        return recall

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, dim)."""
        pixels = self.backbone.preprocess(images)
        return self.backbone.features(pixels, self.recall(pixels))

    def with_coefficients(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (batch, dim) and coefficients (batch, memories, t)."""
        pixels = self.backbone.preprocess(images)
        recall = self.recall(pixels)
        features = self.backbone.features(pixels, recall)
        found = [recall.coefficients[block] for block in self.memory.blocks]
        return features, torch.stack(found, dim=1)

    def seen(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of preprocessed pixels features (batch, dim), coefficients and queries, in one pass.

        Coefficients (batch, memories, t); queries (batch, memories, dim), without the constant.
        """
        hidden = self._looked_at(pixels)
        recall = self._recall(hidden)
        probe = QueryProbe(self.memory, recall, self.look_at)
        if self.look_at is not None and hidden is not None:
            probe.look(self.look_at, hidden)
        features = self.backbone.features(pixels, probe)
        coefficients = [recall.coefficients[block] for block in self.memory.blocks]
        queries = [probe.queries[block] for block in self.memory.blocks]
        return features, torch.stack(coefficients, dim=1), torch.stack(queries, dim=1)


class QueryProbe:
    """A recall that passes another one on and keeps what the given memories would be asked.

    `queries[l]` (batch, dim) is the query of memory l, without the constant.
    """

    def __init__(self, memory: KeyedMemory, inner: Recall | None, look_at: int | None) -> None:
        self._memory = memory
        self._inner = inner
        self._look_at = look_at
        self.queries: dict[int, Tensor] = {}

    def look(self, block: int, hidden: Tensor) -> None:
        """Keep the query of the memory of a block."""
        self.queries[block] = self._memory[block].query.bare(hidden)

    def __call__(self, block: int, hidden: Tensor) -> Mixture | None:
        """What the inner recall says."""
        if self._look_at is None and block in self._memory.blocks:
            self.look(block, hidden)
        return None if self._inner is None else self._inner(block, hidden)


def features_and_queries(
    backbone: Backbone,
    memory: KeyedMemory,
    inner: Recall | None,
    look_at: int | None,
    images: Tensor,
) -> Tensor:
    """Features and, behind them, the queries of all memories: (batch, dim · (1 + memories))."""
    pixels = backbone.preprocess(images)
    probe = QueryProbe(memory, inner, look_at)
    if look_at is not None:
        probe.look(look_at, backbone.hidden(pixels, look_at))
    features = backbone.features(pixels, probe)
    parts: Sequence[Tensor] = [probe.queries[block] for block in memory.blocks]
    return torch.cat([features.float(), *parts], dim=1)
