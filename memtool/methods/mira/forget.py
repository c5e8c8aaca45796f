"""Keys and head of a memory of mixtures that some of its adapters leave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from memtool.errors import ConfigError, MismatchError
from memtool.heads import RecalledHead, solve_recalled_head
from memtool.heads.solve import SOLVED, Earlier, merged
from memtool.methods.in_store import drop, feature_statistics, own_head
from memtool.methods.mira.heads import drop_head, heads_of, put_head, read_head
from memtool.methods.mira.keys import Draws, start_keys
from memtool.methods.mira.read import DECODERS, decoders_without
from memtool.methods.mira.state import (
    PAST_QUERIES,
    QUERY_MODULES,
    MemoryState,
    query_statistics,
)
from memtool.methods.mira.sums import SEEN, Asked, drop_asked, put_seen
from memtool.methods.on_demand import OnDemand
from memtool.methods.records import blobs_of_task, task_of
from memtool_stores import MemoryView, Transaction


def solve_without(txn: Transaction, view: MemoryView, gone: set[str]) -> None:
    """In a transaction that takes adapters away: keys and head from what is left of the moments.

    Keys in closed form and the head are solved anew; learned and random keys stay bit for bit,
    and what a decoder says of the adapters that are left.
    Without an adapter that the memory looked under all of them go, and the moments: they were
    counted through it, and consolidation counts the other tasks again. Raises ConfigError where
    consolidation has not caught up.
    """
    state, stored = MemoryState.load(view), view.keys()
    if state is not None and gone & {*state.first}:
        _drop_all(txn, view)
        return
    if state is None or stored is None or not gone & set(state.adapters):
        return
    # The columns of the stored keys: adapters that were live with a key before this.
    keyed = view.ids[: stored.shape[1]]
    places = [place for place, id in enumerate(keyed) if id not in gone]
    adapters = tuple(keyed[place] for place in places)
    if not adapters:
        _drop_made(txn, QUERY_MODULES, DECODERS)
        return
    if adapters != tuple(record.id for record in txn.adapters):
        raise ConfigError(
            "some adapters in memory have no key yet",
            remedy="memtool consolidate first, then forget",
        )
    if not {*adapters} <= {*state.adapters}:
        raise MismatchError(
            f"version {view.version} has keys for other adapters than its memory names",
            remedy="memtool consolidate",
        )
    state.require_own(view)
    number = {
        id: state.tasks[place]
        for id, place in zip(state.adapters, state.adapter_tasks, strict=True)
    }
    left = {number[id] for id in adapters}
    tasks = tuple(task for task in state.tasks if task in left)
    place = {task: index for index, task in enumerate(tasks)}
    adapter_tasks = tuple(place[number[id]] for id in adapters)
    keys, asked = np.ascontiguousarray(stored[:, places]), None
    if state.consolidate.keys == "closed-form" and not state.consolidate.epochs:
        queries = query_statistics(view, state)
        if missing := [task for task in tasks if task not in queries]:
            raise ConfigError(
                f"the queries of task {missing[0]} were not kept apart from those of the others",
                remedy="memtool consolidate, which counts them again, then forget",
            )
        by_class = state.memory.keys_of == "class"
        asked = Asked.of((queries[task] for task in tasks), by_class=by_class)
        nothing = Draws(0, (), (), 0)  # keys in closed form draw none
        found = start_keys(state.consolidate, state.memory, asked, adapter_tasks, nothing)
        keys = np.ascontiguousarray(found.numpy(), dtype=np.float32)
    head = _solved_head(txn, view, state, tasks, adapter_tasks)
    changes = {"tasks": tasks, "adapters": adapters, "adapter_tasks": adapter_tasks}
    txn.set_keys(keys)
    if state.memory.read == "decoder":
        txn.put_blob(DECODERS, decoders_without(view.blob(DECODERS), places))
    state.model_copy(update=changes).put(txn)
    put_head(txn, head)
    if asked is None:
        drop_asked(txn)
    else:
        asked.put(txn)
    put_seen(txn, merged(feature_statistics(view, tasks)) if view.has_blob(SEEN) else None)


def _drop_all(txn: Transaction, view: MemoryView) -> None:
    """Leave a memory that was never consolidated: no keys, no head, nothing that was counted."""
    counted = {name for record in txn.adapters for name in blobs_of_task(task_of(record))}
    _drop_made(txn, QUERY_MODULES, DECODERS, PAST_QUERIES, *sorted({*view.blobs()} & counted))


def _drop_made(txn: Transaction, *blobs: str) -> None:
    """Take away keys, head, state, what all tasks add up to, and these blobs."""
    MemoryState.drop(txn)
    drop_head(txn)
    drop_asked(txn)
    put_seen(txn, None)
    for name in blobs:
        drop(txn, name)
    txn.set_keys(None)


def _solved_head(
    txn: Transaction,
    view: MemoryView,
    state: MemoryState,
    tasks: Sequence[int],
    adapter_tasks: Sequence[int],
) -> RecalledHead:
    """The head of the tasks that are left; one that learned on with the keys stays as it is.

    But for classes that nobody knows then.
    """
    if state.head.is_fixed:  # it knows all classes, learned or not
        known = read_head(view, len(state.tasks), state.adapter_tasks)
        assert known is not None
        return known
    features, learned = (
        feature_statistics(view, tasks),
        read_head(view, len(state.tasks), state.adapter_tasks),
    )
    last = {task_of(record): record.name for record in txn.adapters}
    trained = OnDemand(last, lambda task: own_head(view, last[task]))
    earlier = None
    if learned is not None and learned.owners is not None and state.head.kind in SOLVED:
        earlier = Earlier(heads=heads_of(learned, state.tasks))  # each depends on no other task
    head = solve_recalled_head(state.head, features, trained, adapter_tasks, earlier)
    if state.head.kind != "shared" or learned is None:
        return head
    unknown = ~torch.isfinite(head.bias)
    return RecalledHead(learned.weight, learned.bias.masked_fill(unknown, -torch.inf), None)
