"""Forgetting on purpose: adapters leave the memory, and what is left is re-normalised.

It needs neither images nor the backbone. The moments of a forgotten task go; keys in closed form
and a shared head are solved anew from those of the others, and learned keys of the others stay as
they are. Older versions keep everything, until a purge takes the bytes out of the history, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import memtool_stores
from memtool.config import Config, Recaller, split_store
from memtool.errors import AlreadyThereError, ConfigError, NotFoundError, did_you_mean
from memtool.methods.results import ForgetResult, Purged

if TYPE_CHECKING:
    from memtool_stores import AdapterRecord, MemoryStore, MemoryView, Transaction

MEMORY_BLOBS = ("memory", "head", "query-modules")
"""Blobs that only mean something while an adapter is left that was consolidated."""


def chosen(
    view: MemoryView, names: Sequence[str], *, removed: bool = False
) -> tuple[AdapterRecord, ...]:
    """The live adapters and rows of atoms that tasks (number or name) or adapters name.

    With `removed` also those that left the memory before, but whose bytes are still there. Raises
    NotFoundError for a name that fits none.
    """
    live = [*view.adapters, *view.atom_records]
    if removed:
        live += [record for record in view.catalog.records.values() if record.state == "removed"]
    found: dict[str, AdapterRecord] = {}
    for name in names:
        number = int(name) if re.fullmatch(r"\d+", name) else None
        fits = [
            record
            for record in live
            if name in (record.id, record.name, record.meta.get("task_name"))
            or (number is not None and record.meta.get("task") == number)
        ]
        if not fits:
            known = {str(word) for r in live for word in (r.name, r.meta.get("task_name")) if word}
            raise NotFoundError(
                f"nothing of {name!r} in memory at version {view.version}",
                expected=did_you_mean(name, sorted(known)) if known else None,
                remedy="memtool ls",
            )
        found.update({record.id: record for record in fits})
    return tuple(found.values())


def forget(
    config: Config, names: Sequence[str], *, seed: int = 0, purge: bool = False
) -> ForgetResult:
    """Take tasks or adapters out of the memory, as one version.

    With `purge` their bytes go too, with every older version of main: AlreadyThereError, before
    anything is changed, when a tag or another branch still leads to them.
    """
    store = memtool_stores.MemoryStore.open(split_store(config.store)[0])
    view = store.view()
    records = chosen(view, names, removed=purge)
    if purge:
        _require_no_holder(store, records)
    hashes = {record.sha256: f"adapter {record.name}" for record in records}
    dropped = _blobs_of(view, records)
    hashes |= {view.state.blobs[name]: f"blob {name}" for name in dropped}

    def change(txn: Transaction) -> None:
        if txn.base.version != view.version:
            raise AlreadyThereError(
                f"the memory moved on to version {txn.base.version} meanwhile",
                remedy="the same command again; nothing was forgotten",
            )
        for record in records:
            if purge:
                txn.purge(record.id)
            else:
                txn.remove(record.id)
        for name in dropped:
            txn.delete_blob(name)
        _renormalise(txn, view, records, config, seed)

    words = ", ".join(record.name for record in records)
    metadata = {"verb": "forget", "forgotten": [record.name for record in records], "purge": purge}
    store.run(change, f"forget {words}", metadata=metadata)
    return ForgetResult(
        version=store.head(),
        adapters=tuple(record.name for record in records),
        tasks=tuple(dict.fromkeys(r.meta["task"] for r in records if "task" in r.meta)),
        blobs=dropped,
        left=len(store.view()),
        purged=_purged(store, hashes) if purge else None,
    )


def _require_no_holder(store: MemoryStore, records: Sequence[AdapterRecord]) -> None:
    holders = sorted({name for record in records for name in store.holders(record.id)})
    if holders:
        raise AlreadyThereError(
            f"{', '.join(holders)} still lead to versions that hold what is to be purged",
            remedy="; ".join(f"memtool tag --delete {name}" for name in holders),
        )


def _purged(store: MemoryStore, hashes: dict[str, str]) -> Purged:
    """Collect, then look through every stored object for the bytes."""
    collected = store.gc(keep_last=1)
    found = store.find_bytes(list(hashes))
    return Purged(
        versions_removed=len(collected.expired),
        freed_bytes=collected.freed_bytes,
        hashes_looked_for=len(hashes),
        left={hashes[sha256]: tuple(paths) for sha256, paths in found.items()},
    )


def _tasks_left(view: MemoryView, records: Sequence[AdapterRecord]) -> set[object]:
    """Tasks that keep an adapter."""
    gone = {record.id for record in records}
    return {record.meta.get("task") for record in view.adapters if record.id not in gone}


def _blobs_of(view: MemoryView, records: Sequence[AdapterRecord]) -> tuple[str, ...]:
    """Blobs that speak of forgotten adapters and tasks only."""
    left = _tasks_left(view, records)
    names = [f"head.{record.name}" for record in records]
    for task in dict.fromkeys(record.meta.get("task") for record in records):
        if task not in left:
            names += [f"queries.{task}", f"features.{task}"]
    gone = {record.id for record in records}
    used = {r.meta.get("peft") for r in view.adapters if r.id not in gone}
    names += [str(name) for name in {r.meta.get("peft") for r in records} - used - {None}]
    return tuple(name for name in names if name in view.blobs())


def _renormalise(
    txn: Transaction,
    view: MemoryView,
    records: Sequence[AdapterRecord],
    config: Config,
    seed: int,
) -> None:
    """Make the rest of the memory one that never knew the forgotten adapters."""
    recalled = [name for name in view.blobs() if name.startswith("recall.")]
    if recalled:
        from memtool.methods.recallers import synchronise

        for name in get_args(Recaller):
            if f"recall.{name}" in recalled:
                synchronise(txn, name, config.modulation, seed=seed)
    if "task-predictor" in view.blobs():
        # It was trained on the images of the forgotten task, too.
        txn.delete_blob("task-predictor")
    if "memory" in view.blobs():
        _resolve(txn, view, records)


def _resolve(txn: Transaction, view: MemoryView, records: Sequence[AdapterRecord]) -> None:
    """New keys and a new head from what is left of the moments."""
    import numpy as np
    import torch

    from memtool.heads import RecalledHead
    from memtool.memories.closed_form import QueryStatistics
    from memtool.methods.consolidate import start_keys
    from memtool.methods.state import (
        HEAD,
        MEMORY,
        MemoryState,
        classifier_of,
        feature_statistics,
        own_head_blob,
        query_statistics,
        solve_recalled_head,
    )

    state = MemoryState.load(view)
    assert state is not None
    gone = {record.id for record in records}
    places = [place for place, id in enumerate(state.adapters) if id not in gone]
    adapters = tuple(state.adapters[place] for place in places)
    if not adapters:
        for name in MEMORY_BLOBS:
            if name in view.blobs():
                txn.delete_blob(name)
        txn.set_keys(None)
        return
    if set(adapters) != {record.id for record in txn.adapters}:
        raise ConfigError(
            "some adapters in memory have no key yet",
            remedy="memtool consolidate first, then forget",
        )
    left = [state.tasks[state.adapter_tasks[place]] for place in places]
    tasks = tuple(task for task in state.tasks if task in left)
    adapter_tasks = tuple(tasks.index(task) for task in left)
    kept = MemoryState(
        **{
            **state.model_dump(),
            "tasks": tasks,
            "adapters": adapters,
            "adapter_tasks": adapter_tasks,
        }
    )
    stored = view.keys()
    assert stored is not None
    keys = np.ascontiguousarray(stored[:, places])
    queries = query_statistics(view, state)
    solved = state.consolidate.keys == "closed-form" and not state.consolidate.epochs
    if solved and set(tasks) <= set(queries):
        joined = QueryStatistics.joined([queries[task] for task in tasks])
        found = start_keys(
            state.consolidate, state.memory, joined, adapter_tasks, torch.Generator()
        )
        keys = np.ascontiguousarray(found.numpy(), dtype=np.float32)
    features = {t: f for t, f in feature_statistics(view, state).items() if t in tasks}
    trained = {}
    for record in txn.adapters:
        name = own_head_blob(record.name)
        known = classifier_of(view.blob(name), name) if name in view.blobs() else None
        trained[int(record.meta["task"])] = known
    head: RecalledHead = solve_recalled_head(state.head, features, trained, adapter_tasks)
    txn.set_keys(keys)
    txn.put_blob(MEMORY, kept.model_dump_json().encode())
    txn.put_blob(HEAD, head.to_bytes())
