"""What is wrong with a memory over images that can be told from its store alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import memtool_stores
from memtool.memories.closed_form import same_for_every_input
from memtool.methods.mira.state import MemoryState, query_statistics


@dataclass(frozen=True)
class AskedTheSame:
    """The memories that were asked the same by every training image, and what may help.

    `blocks` are the numbers of their blocks, None where the store does not tell them; `memories`
    are their places among all, from 0.
    """

    memories: tuple[int, ...] = ()
    blocks: tuple[int, ...] | None = ()
    remedy: str | None = None


def asked_the_same(view: memtool_stores.MemoryView) -> AskedTheSame:
    """Of a version with a memory in every block; no backbone is needed, and no image.

    Raises CorruptError, or MismatchError for a version that a newer memtool wrote.
    """
    state = MemoryState.load(view)
    if state is None or state.memory.scope != "block":
        return AskedTheSame()
    statistics = list(query_statistics(view, state).values())
    found = same_for_every_input(statistics)
    if not found:
        return AskedTheSame()
    names = [segment.name for segment in view.space.layout.segments]
    blocks = state.memory.blocks or blocks_in_names(names)
    if blocks is None or len(blocks) != statistics[0].blocks:
        return AskedTheSame(found, None, "--set memory.token=mean, with a new --store")
    named = tuple(blocks[place] for place in found)
    others = ",".join(str(block) for block in blocks if block not in named)
    left_out = f"--set memory.blocks={others}, or " if others else ""
    remedy = f"{left_out}--set memory.token=mean, with a new --store"
    return AskedTheSame(found, named, remedy)


def blocks_in_names(names: Iterable[str]) -> tuple[int, ...] | None:
    """The numbers of the blocks that layers of these names are in, ascending.

    None where the blocks are not one numbered list, as in a network of several stages.
    """
    parts = [re.match(r"(.*?)\.(\d+)\.", name) for name in names]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts) or len({part[1] for part in known}) != 1:
        return None
    return tuple(sorted({int(part[2]) for part in known}))
