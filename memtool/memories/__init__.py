"""Associative memories as pure functions and small modules: no files, no data sets."""

from memtool.memories.closed_form import QueryStatistics, for_similarity
from memtool.memories.hopfield import HopfieldMemory, recall
from memtool.memories.keyed import BlockMemory, KeyedMemory
from memtool.memories.query import QueryModule

__all__ = [
    "BlockMemory",
    "HopfieldMemory",
    "KeyedMemory",
    "QueryModule",
    "QueryStatistics",
    "for_similarity",
    "recall",
]
