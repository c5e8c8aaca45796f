"""A memory of many keys twice: one scores all of them, one may search; and keys in slow order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtool.memories.keyed import BlockMemory, KeyedMemory
from memtool.memories.similarity import SimilarityFunction
from memtool.sections import MemorySettings

READ = [
    MemorySettings(similarity=alike, separation=separate, topk=3, beta=0.5)
    for alike in ("dot", "scaled-dot", "cosine", "centred-cosine", "euclidean")
    for separate in ("topk", "max")
] + [MemorySettings(routing="lda"), MemorySettings(routing="prototype")]
"""Ways of reading in which keys are searched."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def highest(score: SimilarityFunction, queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """The places (b, count) of the highest keys in float64, one query at a time."""
    rows = []
    for query in queries.double():
        scores = score(query[None], keys.double())[0].tolist()
        rows.append(sorted(range(len(keys)), key=lambda place: -scores[place])[:count])
    return torch.tensor(rows)


def twice(
    settings: MemorySettings, monkeypatch: pytest.MonkeyPatch
) -> tuple[BlockMemory, Tensor, BlockMemory, Tensor]:
    """One memory that scores all of 900 keys, its coefficients of inputs; one that may search."""
    keys, hidden = draw(1, 900, 9), draw(6, 8, seed=1)
    keys[0, 500] = keys[0, 20]  # equal keys share a hard choice
    keys[0, :, -1] *= 0.1
    exact = KeyedMemory.from_settings(settings, (2,), 8, keys)[2]
    wanted = exact.coefficients(hidden)
    monkeypatch.setattr("memtool.memories.keyed.LEAST_KEYS", 100)
    memory = KeyedMemory.from_settings(settings, (2,), 8, keys).requires_grad_(False)[2]
    return exact, wanted, memory, hidden


def require_alike_after_a_change(exact: BlockMemory, memory: BlockMemory, hidden: Tensor) -> None:
    """What is asked next is asked of keys as they are then."""
    moved = draw(900, 9, seed=5)
    memory.keys.copy_(moved)
    exact.keys.data = moved
    torch.testing.assert_close(memory.coefficients(hidden), exact.coefficients(hidden))
