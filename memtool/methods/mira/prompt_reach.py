"""How far the example prompts of adapters lie from each other, and others from all of them.

Of the prompts of every adapter some are kept as they look, its witnesses: `prompt-reach` holds what
all of them add up to, and how far nearly all lie from the mean of their own task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import memtool_stores
from memtool.learning.looks import narrowed
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.moments import Moments
from memtool.memories.novelty import novelty, reach
from memtool.methods.mira.sums import Asked, drop_asked
from memtool.methods.routed.memory import Kept

WITNESSES, WITNESS_WIDE = 64, 256
"""Example prompts of an adapter that say how far others lie, spread evenly, and their width."""

MOST_MEASURED = 1024
"""Tasks whose witnesses say how far the prompts of all reach, at most, spread evenly."""

REACH = "prompt-reach"
"""Blob of the moments of all witnesses: what the novelty of a prompt is measured by."""


def witnesses(seen: Tensor) -> Kept:
    """Some of prompts that look like (n, d), spread evenly: what tells how unlike others are."""
    some = torch.linspace(0, len(seen) - 1, min(WITNESSES, len(seen))).long()
    return {"some": narrowed(seen[some], WITNESS_WIDE).float()}


def _witnesses_in(parts: Sequence[Kept]) -> Tensor:
    """The witnesses (m, w) of all parts of a task; none of prompts that were kept before them."""
    known = [part["some"] for part in parts if len(part["some"])]
    return torch.cat(known) if known else torch.zeros(0, 0)


def _moments_of(some: Tensor) -> QueryStatistics:
    """The moments of the witnesses (m, w) of one task."""
    moments = Moments(1, some.shape[1], 1)
    moments.add(some.unsqueeze(0), torch.zeros(len(some), dtype=torch.int64))
    return QueryStatistics.of(moments)


def novelty_of(view: memtool_stores.MemoryView, seen: Tensor) -> Tensor | None:
    """How unlike all that prompts are known of at a version others (n, d) look: (n,).

    99 of 100 of the example prompts lie within 1. None where that could not be measured.
    """
    if not view.has_blob(REACH):
        return None
    kept = Asked.read(view, REACH)
    # In one blob as it was kept before tasks had rows.
    moments = (
        Moments.from_bytes(view.blob(REACH), f"blob {REACH!r}")
        if kept is None
        else kept.whole.moments
    )
    return novelty(narrowed(seen, WITNESS_WIDE).unsqueeze(0), [moments])


def put_reach(
    txn: memtool_stores.Transaction,
    view: memtool_stores.MemoryView,
    tasks: Mapping[int, Sequence[Kept]],
    first: int,
) -> None:
    """Keep what novelty is measured by, of what is known of tasks; nothing where it cannot be.

    The moments of the `first` of them may be kept already.
    """
    before = Asked.read(view, REACH, tasks=first) if first else None
    asked = _witnessed(tasks, first if before else 0, before)
    if asked is None:
        drop_asked(txn, REACH)
    else:
        asked.put(txn, REACH)


def _witnessed(
    tasks: Mapping[int, Sequence[Kept]], first: int, before: Asked | None
) -> Asked | None:
    """The moments of the witnesses of tasks and their reach; None where it cannot be measured."""
    chosen = {*torch.linspace(0, len(tasks) - 1, min(len(tasks), MOST_MEASURED)).long().tolist()}
    found, shown = list[QueryStatistics](), dict[int, Tensor]()
    for place, task in enumerate(tasks):
        if place < first and place not in chosen:
            continue
        some = _witnesses_in(tasks[task])
        if not len(some):
            return None
        if place >= first:
            found.append(_moments_of(some))
        if place in chosen:
            shown[place] = some
    asked = Asked.of(found, before=before)
    labels = torch.tensor([*shown]).repeat_interleave(torch.tensor([*map(len, shown.values())]))
    moments = asked.whole.moments
    moments.reach = reach(moments, torch.cat([*shown.values()]).unsqueeze(0), labels)
    return None if moments.reach is None else asked
