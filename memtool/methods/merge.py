"""One memory of two: adapters of another memory come in, with all that is kept of each.

A row comes bit for bit, with its files, its head, and what is known of its prompts and its task.
What is made of all adapters together (keys, the head that retrieval ends in, what a memory recalls
by) stays as it is until consolidation makes it anew, from what is kept. The other memory is only
read; neither model nor data are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from memtool.errors import AlreadyExistsError, MismatchError, NotFoundError
from memtool.methods.exchange import PEFT_PREFIX
from memtool.methods.forget import chosen
from memtool.methods.records import (
    blobs_of_row,
    blobs_of_task,
    number_of,
    task_name,
    task_numbers,
)
from memtool.methods.results import MergeResult, WrittenAdapter
from memtool.paths import split_store, without_home
from memtool.remembered import carried_on, remembered
from memtool_stores import AdapterRecord, MemoryStore, MemoryView, Transaction
from memtool_stores.redacted import redacted

JOINED_BY = {
    "prompt-keys": "memtool.methods.mira.moments",
    "memory": "memtool.methods.mira.state",
    "atoms": "memtool.methods.moram.state",
}
"""By the name of a blob that says how a memory is read, or a kind of rows: what joins two memories.

Its `join(txn, view)` is asked in a transaction that has taken rows of `view` in; it gives sentences
on what could not be joined. Torch is loaded by it, for a store that holds such a blob.
"""

LIKE = ("stream.", "backbone.")
"""Sections of settings by which images, and tasks that are known by number, are one thing."""

UNLIKE = (
    "stream.train_per_task",
    "stream.test_per_task",
    "stream.validation",
    "stream.split",
    "stream.test_seed",
    "backbone.name",
    "backbone.weights",
    "backbone.quantise",
)
"""Settings of these sections that may differ: how much was seen, and where the model lies."""


def merge(
    store: str, other: str, names: Sequence[str] = (), *, lock_timeout: float = 30.0
) -> MergeResult:
    """Take adapters of the memory `other` into that of `store`, as one version.

    `other` may name a version (`FOLDER@VERSION`); of it come the live adapters of these tasks or
    names, all of them without any. Where `store` has no memory, one is made. What is there already
    stays, and is not taken again.

    Raises:
        NotFoundError: there is no other memory, or nothing of a name in it.
        MismatchError: another model, method, precision, stream or layout, prompts that were looked
            at in other places, or another gate.
        AlreadyExistsError: another adapter of a name, or the same one as of another task.
    """
    place, version = split_store(other)
    source = MemoryStore.open(place)
    view = source.view(version)
    view.require_readable()
    records = chosen(view, names) if names else view.live
    if not records:
        raise NotFoundError(
            f"the memory {place!r} holds no adapters at version {view.version}",
            remedy=f"memtool log --store {place}",
        )
    settings = remembered(source, view.version)
    metadata = _metadata(source, view, records)
    origin = {"memory": _named(place), "version": view.version}
    taken = _Taken(view, records, origin, by_name=_known_by_name(settings))
    words = ", ".join(record.name for record in records[:5]) + (", …" if len(records) > 5 else "")
    message = f"merge {words} of {_named(place)}"
    if not MemoryStore.exists(store):
        made = MemoryStore.create(
            store,
            view.space,
            lock_timeout=lock_timeout,
            first=lambda new: new.run(taken.append, message, metadata),
        )
        return taken.result(made.head())
    target = MemoryStore.open(store, lock_timeout=lock_timeout)
    _require_alike(target, view, records, remembered(target), settings)
    target.run(taken.append, message, {**metadata, **carried_on(target)})
    return taken.result(target.head())


def _named(place: str) -> str:
    """A memory as records name it."""
    return without_home(redacted(place))


def _metadata(
    source: MemoryStore, view: MemoryView, records: Sequence[AdapterRecord]
) -> dict[str, Any]:
    """What the version says of itself, with the configuration for a memory that has none."""
    return {
        **carried_on(source, view.version),
        "verb": "merge",
        "merged": [record.name for record in records],
        "from": {
            "memory": _named(source.url),
            "store_id": view.store_id,
            "version": view.version,
        },
    }


def _known_by_name(settings: Mapping[str, Any]) -> bool:
    """Whether tasks of a memory may have any number: of prompts under mira, of no settings."""
    told = (settings.get("method"), settings.get("stream.setting"))
    return not settings or told == ("mira", "trace")


# What must be alike ------------------------------------------------------------------------------


def _require_alike(
    target: MemoryStore,
    view: MemoryView,
    records: Sequence[AdapterRecord],
    here: Mapping[str, Any],
    there: Mapping[str, Any],
) -> None:
    """Raise MismatchError where adapters of one memory mean nothing in the other."""
    mine = target.view()
    ours, theirs = mine.space.backbone, view.space.backbone
    if ours.sha256 != theirs.sha256:
        raise MismatchError(
            f"the other memory is of {theirs.name} ({theirs.sha256[:12]}…), this one of "
            f"{ours.name} ({ours.sha256[:12]}…)",
            expected="two memories of one model",
            remedy="another --store",
        )
    kinds = {record.kind for record in (*mine.live, *records)}
    if len(kinds) > 1:
        raise MismatchError(
            "one of the two memories holds adapters that are recalled whole, the other rows of "
            "atoms of moram",
            expected="two memories of one method",
            remedy="another --store",
        )
    for key in _compared(here, there):
        if here[key] != there[key]:
            raise MismatchError(
                f"{key} is {there[key]} in the other memory, and {here[key]} in this one",
                expected="two memories that were made alike",
                remedy="another --store",
            )


def _compared(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Settings that must be the same in two memories, as far as both say them."""
    both = [key for key in here if key in there]
    found = [key for key in both if key == "method"]
    if "auto" not in (here.get("engine.precision"), there.get("engine.precision")):
        found += [key for key in both if key == "engine.precision"]
    if not (_known_by_name(here) and _known_by_name(there)):
        found += [key for key in both if key.startswith(LIKE) and key not in UNLIKE]
    return found


def _require_same(record: AdapterRecord, old: AdapterRecord) -> None:
    """An adapter of a name that is there must be the same, and of the same task."""

    def bytes_of(one: AdapterRecord) -> tuple[object, ...]:
        return one.sha256, one.header, one.scaling, dict(one.pruned), one.meta.get("peft")

    if bytes_of(record) != bytes_of(old):
        raise AlreadyExistsError(
            f"both memories hold an adapter named {record.name!r}, and they differ",
            expected=f"values with sha256 {old.sha256[:12]}…, found {record.sha256[:12]}…"
            if record.sha256 != old.sha256
            else "the same configuration, scaling and atoms",
            remedy=f"memtool merge with the names of the others, or memtool forget {record.name} "
            "in one of the two first",
        )
    if task_name(record) != task_name(old):
        raise AlreadyExistsError(
            f"{record.name!r} is an adapter of task {task_name(record)!r} in the other memory, and "
            f"of {task_name(old)!r} in this one",
            remedy=f"memtool forget {record.name} in one of the two first",
        )


# What comes in ------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Taken:
    """The `records` of a view on their way, and after `append` what was new of them.

    `by_name` says that a task may get another number than it has in its own memory.
    """

    view: MemoryView
    records: Sequence[AdapterRecord]
    origin: Mapping[str, str]
    by_name: bool
    added: list[WrittenAdapter] = field(default_factory=list)
    known: list[WrittenAdapter] = field(default_factory=list)
    renumbered: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unchanged: bool = True

    def append(self, txn: Transaction) -> None:
        """Take all that is not there into a transaction; it may be run again."""
        self.added, self.known, self.notes = [], [], []
        there = (*txn.adapters, *txn.atom_records)
        here = {record.name: record for record in there}
        numbers = self._numbers(txn, there)
        files: dict[str, str] = {}
        groups: list[dict[str, str]] = []
        for record in self.records:
            old = here.get(record.name)
            if old is not None:
                _require_same(record, old)
                self.known.append(WrittenAdapter(name=old.name, id=old.id))
                continue
            number = numbers.get(task_name(record))
            changes = {"merged_from": dict(self.origin)}
            task = {} if number_of(record) is None else {"task": number}
            new = txn.take(self.view, record.id, {**changes, **task})
            here[record.name] = new
            self.added.append(WrittenAdapter(name=new.name, id=new.id))
        for record in self.records:
            old_names = blobs_of_row(record.id, record.name)
            new_names = blobs_of_row(here[record.name].id, record.name)
            groups.append(dict(zip(old_names, new_names, strict=True)))
            file = str(record.meta.get("peft"))
            if file.startswith(PEFT_PREFIX):
                files[file] = file
            number = number_of(record)
            if number is not None:
                after = numbers[task_name(record)]
                tasks = zip(blobs_of_task(number), blobs_of_task(after), strict=True)
                groups.append(dict(tasks))
        self._take_blobs(txn, [files, *groups])
        self._join(txn)
        self.unchanged = not txn.changed

    def _numbers(self, txn: Transaction, there: Sequence[AdapterRecord]) -> dict[str, int]:
        """The number that every task has in the joined memory, by name: of each its own.

        Also those of tasks that were forgotten stay theirs where tasks are known by name.

        Raises MismatchError for another number than its own where tasks are known by number.
        """
        numbers = task_numbers(there)
        known = [*txn.base.catalog.records.values()] if self.by_name else there
        owners = {number: task_name(r) for r in known if (number := number_of(r)) is not None}
        self.renumbered = {}
        for name, number in task_numbers(self.records).items():
            if name not in numbers:
                mine = owners.get(number, name) == name
                numbers[name] = number if mine else max(owners) + 1
                owners[numbers[name]] = name
            if numbers[name] == number:
                continue
            if not self.by_name:
                raise MismatchError(
                    f"task {name!r} is number {number} in the other memory, and would be "
                    f"{numbers[name]} in this one",
                    expected="tasks of one stream, which have the same numbers in both",
                    remedy="another --store",
                )
            self.renumbered[name] = numbers[name]
        return numbers

    @property
    def _new_tasks(self) -> set[str]:
        new = {one.name for one in self.added}
        return {task_name(record) for record in self.records if record.name in new}

    def _take_blobs(self, txn: Transaction, groups: Sequence[Mapping[str, str]]) -> None:
        """Take blobs by their names there and here.

        What belongs together comes whole or not at all: where one of them is here and is another,
        all stay as they are.
        """
        theirs, ours = self.view.blob_hashes, txn.base.blob_hashes
        differ: list[str] = []
        taken: set[str] = set()
        for group in groups:
            pairs = [(name, after) for name, after in group.items() if name in theirs]
            others = [a for name, a in pairs if a in ours and theirs[name] != ours[a]]
            differ += others
            for name, after in pairs:
                if not others and after not in ours and after not in taken:
                    txn.put_blob(after, self.view.held_blob(name))
                    taken.add(after)
        if differ:
            few = ", ".join(sorted({*differ})[:5])
            self.notes.append(f"kept in both memories, and not the same: {few}; what is here stays")

    def _join(self, txn: Transaction) -> None:
        """Join what says how the two memories are read, or say what is left to consolidation."""
        held = {*txn.base.blobs(), *self.view.blobs(), self.records[0].kind}
        for name, module in JOINED_BY.items():
            if name in held:
                self.notes += import_module(module).join(txn, self.view)

    def result(self, version: str) -> MergeResult:
        """What came of it, at that version."""
        return MergeResult(
            version=version,
            source=self.origin["memory"],
            source_version=self.origin["version"],
            kind=self.records[0].kind,
            added=tuple(self.added),
            known=tuple(self.known),
            renumbered={t: n for t, n in self.renumbered.items() if t in self._new_tasks},
            notes=tuple(self.notes),
            unchanged=self.unchanged,
        )
