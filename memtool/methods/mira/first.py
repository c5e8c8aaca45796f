"""The adapters that a memory looks under: those of its first task, which never change.

They are named by their ids beside what was counted under them, of images and of texts alike: in
`MemoryState.first` and in `PromptState.first`. In a collection the first task is that of the first
adapter that was written.
"""

from __future__ import annotations

import memtool_stores
from memtool.errors import MismatchError
from memtool.methods.records import task_of


def first_of(view: memtool_stores.MemoryView, counted: tuple[str, ...]) -> tuple[str, ...]:
    """Ids of the adapters that a version is looked under, in the order written.

    Those that its moments were `counted` under; before there are any, all of its first task.
    """
    if counted or not view.adapters:
        return counted
    number = task_of(view.adapters[0])
    return tuple(record.id for record in view.adapters if task_of(record) == number)


def first_records(
    view: memtool_stores.MemoryView, first: tuple[str, ...]
) -> list[memtool_stores.AdapterRecord]:
    """The adapters of these ids. Raises MismatchError where one is not in memory, or for none."""
    if not first or not {*view.ids}.issuperset(first):
        raise MismatchError(
            f"version {view.version} is looked at under adapters that it does not hold",
            remedy="memtool rollback to a version that does, or another --store",
        )
    return [view.get(id) for id in first]


def require_same_first(
    here: memtool_stores.MemoryView,
    ours: tuple[str, ...],
    there: memtool_stores.MemoryView,
    theirs: tuple[str, ...],
) -> None:
    """Raise MismatchError where two memories were looked at under adapters of other bytes."""
    if [here.get(id).sha256 for id in ours] != [there.get(id).sha256 for id in theirs]:
        raise MismatchError(
            "the two memories were looked at under different first adapters",
            expected="two memories that began with the same task: what was counted under one "
            "adapter says nothing of another",
            remedy="another --store",
        )


def taken_along(
    txn: memtool_stores.Transaction, view: memtool_stores.MemoryView, first: tuple[str, ...]
) -> tuple[str, ...]:
    """The ids in a transaction of adapters that another memory was looked at under, by their bytes.

    Raises MismatchError for one that is not among its adapters.
    """
    here = {record.sha256: record.id for record in txn.adapters}
    for id in first:
        record = view.get(id)
        if record.sha256 not in here:
            raise MismatchError(
                f"the other memory was looked at under {record.name!r}, which is not taken along",
                expected="the adapters of its first task among those that are merged",
                remedy=f"memtool merge with {record.name} among the names, or without any",
            )
    return tuple(here[view.get(id).sha256] for id in first)
