"""Keys that are searched by an index, which is kept in the cache of their store."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memtool.errors import CorruptError
from memtool.memories.index import KeyIndex, name_of
from memtool.memories.search import LEAST_KEYS
from memtool.memories.similarity import SimilarityFunction
from memtool.sections import SEARCHED, MemorySettings
from memtool_stores import cache, derived

_log = logging.getLogger(__name__)

Searched = Literal["exact", "usearch", "none"]


@dataclass(frozen=True)
class Indexed:
    """A `Searcher` of one of the `memories` of a store: its index is read, or made and kept."""

    store_id: str
    memories: int

    def __call__(
        self, keys: Tensor, likeness: SimilarityFunction, *, constant: bool = False
    ) -> KeyIndex:
        """The index of exactly these keys. Errors as `KeyIndex`."""
        name = name_of(keys, likeness, constant=constant)
        data = derived.read(self.store_id, name)
        if data is not None:
            try:
                return KeyIndex(keys, likeness, constant=constant, data=data)
            except CorruptError as error:
                _log.warning("%s; it is made again", error)
        _log.warning("an index of %s keys is made, and kept in the cache", f"{len(keys):,}")
        made = KeyIndex(keys, likeness, constant=constant)
        files = cache.KEEP_FILES * self.memories
        derived.keep(self.store_id, name, made.to_bytes(), files=files)
        return made


def searched(memory: MemorySettings, keys: int, device: torch.device) -> Searched:
    """How so many keys of a memory are searched, while they do not learn; none: all are scored."""
    known = memory.routing != "mixture" or memory.similarity in SEARCHED
    one = memory.keys_of == "task" and memory.key_norm == "none"
    if memory.most is None or not known or not one or keys < LEAST_KEYS or device.type != "cpu":
        return "none"
    return memory.index
