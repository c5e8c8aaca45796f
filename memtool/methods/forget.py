"""Forgetting on purpose: adapters leave the memory, and what is left is re-normalised.

It needs neither images, nor the backbone, nor the configuration: the store says how its keys, head
and recalling memories were made. The moments of a forgotten task go; keys in closed form and the
head are solved anew from those of the others, and learned or random keys of the others stay bit for
bit. Older versions keep everything, until a purge takes the bytes out of the history, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memtool.errors import (
    AlreadyExistsError,
    ChangedMeanwhileError,
    ConfigError,
    NotFoundError,
    did_you_mean,
)
from memtool.methods.records import number_of, task_of
from memtool.methods.results import ForgetResult, Purged
from memtool_stores.objects import objects_at

if TYPE_CHECKING:
    from memtool_stores import AdapterRecord, MemoryStore, MemoryView, Transaction

# Torch is loaded only for a store that holds one of these, so their names are written out here.
MEMORY = "memory"
CONSOLIDATED = (MEMORY, "head", "query-modules")
"""Blobs that only mean something while an adapter with a key is left."""
OF_ATOMS = {"atoms", "past-inputs"}
PREDICTOR = "task-predictor"
RECALL_PREFIX = "recall."


def chosen(
    view: MemoryView, names: Sequence[str], *, purge: bool = False
) -> tuple[AdapterRecord, ...]:
    """The live adapters and rows of atoms that tasks (number or name) or adapters name.

    For a purge also those that left the memory before: their bytes may still be there. Raises
    NotFoundError for a name that fits none.
    """
    known = [*view.live]
    if purge:
        known += [record for record in view.catalog.records.values() if not record.live]
    found: dict[str, AdapterRecord] = {}
    for name in names:
        number = int(name) if re.fullmatch(r"\d+", name) else None
        fits = [
            record
            for record in known
            if name in (record.id, record.name, record.meta.get("task_name"))
            or (number is not None and record.meta.get("task") == number)
        ]
        if not fits:
            words = {str(word) for r in known for word in (r.name, r.meta.get("task_name")) if word}
            raise NotFoundError(
                f"nothing of {name!r} in memory at version {view.version}",
                expected=did_you_mean(name, sorted(words)) if words else None,
                remedy="memtool ls",
            )
        found.update({record.id: record for record in fits})
    return tuple(found.values())


def holders(store: MemoryStore, records: Sequence[AdapterRecord]) -> tuple[str, ...]:
    """Tags and branches, other than main, that keep bytes of these rows from a purge, sorted."""
    return tuple(sorted({name for record in records for name in store.holders(record.id)}))


def require_no_holder(store: MemoryStore, records: Sequence[AdapterRecord]) -> None:
    """Raise AlreadyExistsError, with the commands that help, when `holders` names any."""
    if found := holders(store, records):
        raise AlreadyExistsError(
            f"{', '.join(found)} still lead to versions that hold what is to be purged",
            remedy="; ".join(f"memtool tag --delete {name}" for name in found),
        )


def forget(store: MemoryStore, names: Sequence[str], *, purge: bool = False) -> ForgetResult:
    """Take tasks or adapters out of the memory, as one version.

    With `purge` their bytes go too, with every older version of main, and every stored object is
    searched for them. A purge that was cut short is finished by another one.

    Raises:
        NotFoundError: a name fits nothing.
        AlreadyExistsError: a tag or another branch still leads to what is to be purged; nothing was
            changed.
        ConfigError: keys have to be solved anew, but consolidation has not caught up.
        ChangedMeanwhileError: another process committed; nothing was forgotten.
    """
    view = store.view()
    records = chosen(view, names, purge=purge)
    if purge:
        require_no_holder(store, records)
    dropped = _blobs_of(view, records)

    def change(txn: Transaction) -> None:
        if txn.base.version != view.version:
            raise ChangedMeanwhileError(
                f"the memory moved on to version {txn.base.version} meanwhile",
                remedy="the same command again; nothing was forgotten",
            )
        for record in records:
            if not purge:
                txn.remove(record.id)
            elif record.state != "purged":
                txn.purge(record.id)
        for name in dropped:
            txn.delete_blob(name)
        _renormalise(txn, view, {record.id for record in records})

    words = ", ".join(record.name for record in records)
    metadata = {"verb": "forget", "forgotten": [record.name for record in records], "purge": purge}
    store.run(change, f"forget {words}", metadata=metadata)
    after = store.view()
    # A head or memory that was solved anew: its old bytes were made of the forgotten task, too.
    old = {
        sha256: f"blob {name}"
        for name, sha256 in view.state.blobs.items()
        if sha256 not in after.state.blobs.values()
    }
    rows = {record.sha256: f"adapter {record.name}" for record in records}
    return ForgetResult(
        version=after.version,
        adapters=tuple(record.name for record in records),
        tasks=tuple(dict.fromkeys(n for r in records if (n := number_of(r)) is not None)),
        blobs=dropped,
        left=len(after.live),
        purged=_purged(store, {**old, **rows}) if purge else None,
    )


def _purged(store: MemoryStore, hashes: dict[str, str]) -> Purged:
    """Collect, then look through every stored object for bytes of these hashes."""
    collected = store.gc(keep_last=1)
    found = store.find_bytes(list(hashes))
    return Purged(
        versions_removed=len(collected.expired),
        freed_bytes=collected.freed_bytes,
        hashes=len(hashes),
        objects=sum(1 for _ in objects_at(store.url).list()),
        left={hashes[sha256]: tuple(paths) for sha256, paths in found.items()},
    )


def _blobs_of(view: MemoryView, records: Sequence[AdapterRecord]) -> tuple[str, ...]:
    """Blobs of a version that speak of nothing but the forgotten."""
    gone = {record.id for record in records}
    left = [record for record in view.live if record.id not in gone]
    kept_names = {record.name for record in left}
    kept_tasks = {number_of(record) for record in left}
    kept_files = [record.meta.get("peft") for record in left]
    names: list[str] = []
    for record in records:
        if record.name not in kept_names:
            names.append(f"head.{record.name}")
        if (task := number_of(record)) not in kept_tasks:
            names += [f"queries.{task}", f"features.{task}"]
        if (files := record.meta.get("peft")) not in kept_files:
            names.append(str(files))
    if any(record.live for record in records):
        # It was trained on the images of the forgotten task, too.
        names.append(PREDICTOR)
    return tuple(name for name in dict.fromkeys(names) if name in view.blobs())


def _renormalise(txn: Transaction, view: MemoryView, gone: set[str]) -> None:
    """Make the rest of the memory one that never knew the forgotten adapters.

    But for `past-inputs`, which later tasks were counted on top of.
    """
    for blob in view.blobs():
        if blob.startswith(RECALL_PREFIX):
            _unlearn(txn, view, blob, gone)
    if OF_ATOMS & set(view.blobs()):
        from memtool.methods.moram.state import solve_without

        solve_without(txn, view, gone)
    if MEMORY in view.blobs():  # else nothing was consolidated, and nothing needs torch
        _solve_again(txn, view, gone)


def _unlearn(txn: Transaction, view: MemoryView, blob: str, gone: set[str]) -> None:
    """Take adapters out of a BayesPCN memory; the inverse of their writing."""
    import numpy as np
    import torch

    from memtool.memories.bayes_pcn import BayesPCN, names_in

    where = f"blob {blob!r}"
    ids = names_in(view.blob(blob), where)
    if not gone & set(ids):
        return
    if gone >= set(ids):
        txn.delete_blob(blob)
        return
    values = torch.from_numpy(np.stack([view.value(id) for id in ids]))
    memory = BayesPCN.from_bytes(view.blob(blob), values, where)
    for id in ids:
        if id in gone:
            memory.delete(id)
    txn.put_blob(blob, memory.to_bytes())


def _solve_again(txn: Transaction, view: MemoryView, gone: set[str]) -> None:
    """New keys and a new head from what is left of the moments."""
    import numpy as np
    import torch

    from memtool.heads import RecalledHead, solve_recalled_head
    from memtool.methods.in_store import HEAD, feature_statistics, own_head
    from memtool.methods.mira.keys import start_keys
    from memtool.methods.mira.state import MemoryState, query_statistics

    state, stored = MemoryState.load(view), view.keys()
    if state is None or stored is None or not gone & set(state.adapters):
        return
    # The columns of the stored keys: adapters that were live with a key before this.
    keyed = view.ids[: stored.shape[1]]
    places = [place for place, id in enumerate(keyed) if id not in gone]
    adapters = tuple(keyed[place] for place in places)
    if not adapters:
        for name in CONSOLIDATED:
            if name in view.blobs():
                txn.delete_blob(name)
        txn.set_keys(None)
        return
    if adapters != tuple(record.id for record in txn.adapters):
        raise ConfigError(
            "some adapters in memory have no key yet",
            remedy="memtool consolidate first, then forget",
        )
    number = {
        id: state.tasks[place]
        for id, place in zip(state.adapters, state.adapter_tasks, strict=True)
    }
    tasks = tuple(task for task in state.tasks if task in {number[id] for id in adapters})
    adapter_tasks = tuple(tasks.index(number[id]) for id in adapters)
    keys = np.ascontiguousarray(stored[:, places])
    if state.consolidate.keys == "closed-form" and not state.consolidate.epochs:
        queries = query_statistics(view, state)
        if missing := [task for task in tasks if task not in queries]:
            raise ConfigError(
                f"the queries of task {missing[0]} were not kept apart from those of the others",
                remedy="memtool consolidate, which counts them again, then forget",
            )
        counted = [queries[task] for task in tasks]
        generator = torch.Generator()  # keys in closed form draw nothing from it
        found = start_keys(state.consolidate, state.memory, counted, adapter_tasks, generator)
        keys = np.ascontiguousarray(found.numpy(), dtype=np.float32)
    features = feature_statistics(view, tasks)
    trained = {task_of(record): own_head(view, record.name) for record in txn.adapters}
    head = solve_recalled_head(state.head, features, trained, adapter_tasks)
    if state.head.kind == "shared" and HEAD in view.blobs():
        # It learned on with the keys and stays as they do, but for classes that nobody knows now.
        learned = RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}")
        unknown = ~torch.isfinite(head.bias)
        head = RecalledHead(learned.weight, learned.bias.masked_fill(unknown, -torch.inf), None)
    changes = {"tasks": tasks, "adapters": adapters, "adapter_tasks": adapter_tasks}
    txn.set_keys(keys)
    state.model_copy(update=changes).put(txn)
    txn.put_blob(HEAD, head.to_bytes())
