"""Forgetting on purpose: adapters leave the memory, and what is left is re-normalised.

It needs neither images, nor the backbone, nor the configuration: the store says how its keys, head
and recalling memories were made. The moments of a forgotten task go; keys in closed form and the
head are solved anew from those of the others, and learned or random keys of the others stay bit for
bit. Older versions keep everything, until a purge takes the bytes out of the history, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from memtool.errors import (
    AlreadyExistsError,
    ChangedMeanwhileError,
    NotFoundError,
    did_you_mean,
)
from memtool.methods.records import blobs_of_row, blobs_of_task, number_of
from memtool.methods.results import ForgetResult, Purged
from memtool.outside import parsed_json
from memtool.remembered import carried_on
from memtool_stores.objects import objects_at

if TYPE_CHECKING:
    from memtool_stores import AdapterRecord, MemoryStore, MemoryView, Transaction

PREDICTOR = "task-predictor"
"""Blob of Modulation; the module that writes it would load torch."""

LOOKS = ("memory", "prompt-keys")
"""Blobs of MIRA, over images and over texts, that name the adapters looked under; as above."""

SOLVED_BY = {
    "recall.": "memtool.methods.modulation.recallers",
    "atoms": "memtool.methods.moram.state",
    "past-inputs": "memtool.methods.moram.state",
    "memory": "memtool.methods.mira.forget",
    "prompt-keys": "memtool.methods.mira.moments",
}
"""By how the name of a blob begins: the module that knows what it becomes without the forgotten.

Its `solve_without(txn, view, gone)` is asked in a transaction that takes the rows of ids `gone`
away. Torch is loaded by it, for a store that holds such a blob.
"""


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
        called = [
            record
            for record in known
            if name in (record.id, record.name, record.meta.get("task_name"))
        ]
        # What is called so is meant before what has the number.
        fits = called or [
            record for record in known if number is not None and record.meta.get("task") == number
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


def looked_under(view: MemoryView, records: Sequence[AdapterRecord]) -> bool:
    """Whether a memory looks at its inputs under any of these adapters.

    Without them its keys, its head and all that was counted mean nothing, and go along.
    """
    states = [
        parsed_json(view.blob(blob), f"blob {blob!r}") for blob in LOOKS if view.has_blob(blob)
    ]
    first = {id for state in states for id in state.get("first", ())}
    return any(record.id in first for record in records)


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
    metadata = {
        **carried_on(store),
        "verb": "forget",
        "forgotten": [record.name for record in records],
        "purge": purge,
    }
    store.run(change, f"forget {words}", metadata=metadata)
    after = store.view()
    # A head or memory that was solved anew: its old bytes were made of the forgotten task, too.
    kept = {*after.blob_hashes.values()}
    old = {
        sha256: f"blob {name}" for name, sha256 in view.blob_hashes.items() if sha256 not in kept
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
        *own, head = blobs_of_row(record.id, record.name)
        names += own
        if record.name not in kept_names:
            names.append(head)
        if (task := number_of(record)) is not None and task not in kept_tasks:
            names += blobs_of_task(task)
        if (files := record.meta.get("peft")) not in kept_files:
            names.append(str(files))
    if any(record.live for record in records):
        # It was trained on the images of the forgotten task, too.
        names.append(PREDICTOR)
    return tuple(name for name in dict.fromkeys(names) if view.has_blob(name))


def _renormalise(txn: Transaction, view: MemoryView, gone: set[str]) -> None:
    """Make the rest of the memory one that never knew the forgotten adapters.

    But for `past-inputs`, which later tasks were counted on top of.
    """
    held = (SOLVED_BY[begin] for begin in SOLVED_BY for b in view.blobs() if b.startswith(begin))
    for module in dict.fromkeys(held):
        import_module(module).solve_without(txn, view, gone)
