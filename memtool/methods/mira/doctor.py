"""What is wrong with a memory over images that can be told from its store alone."""

from __future__ import annotations

from dataclasses import dataclass

import memtool_stores
from memtool.memories.closed_form import same_for_every_input
from memtool.methods.mira.state import MemoryState, query_statistics


@dataclass(frozen=True)
class AskedTheSame:
    """The blocks whose memory was asked the same by every training image, and what may help."""

    blocks: tuple[int, ...] = ()
    remedy: str | None = None


def asked_the_same(view: memtool_stores.MemoryView) -> AskedTheSame:
    """Of a version with a memory in every block; no backbone is needed, and no image.

    Raises CorruptError, or MismatchError for a version that a newer memtool wrote.
    """
    state = MemoryState.load(view)
    if state is None or state.memory.scope != "block":
        return AskedTheSame()
    statistics = list(query_statistics(view, state).values())
    if not statistics:
        return AskedTheSame()
    # Every block of a Vision Transformer has what is adapted: memory l is that of block l.
    blocks = state.memory.blocks or tuple(range(statistics[0].blocks))
    found = tuple(blocks[place] for place in same_for_every_input(statistics))
    if not found:
        return AskedTheSame()
    others = ",".join(str(block) for block in blocks if block not in found)
    left_out = f"--set memory.blocks={others}, or " if others else ""
    return AskedTheSame(found, f"{left_out}--set memory.token=mean, with a new --store")
