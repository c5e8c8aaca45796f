"""What atoms are trained on top of, and that they are written on top of just that.

Atoms are trained with those in memory around them, which decide with them what a token chooses: a
task is written before the next one is trained, one version a task, and only on top of the very
atoms that it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import memtool_stores
from memtool.errors import AlreadyExistsError, ConfigError, MismatchError, NotFoundError
from memtool.learning.past_inputs import PastInputs
from memtool.methods.exchange import About, ReadAdapter
from memtool.methods.in_store import HEAD
from memtool.methods.method import newest_after_each
from memtool.methods.moram.state import digest, past_inputs_of
from memtool.methods.records import task_of
from memtool.sections import MoramSettings
from memtool.streams.task import Task
from memtool.workspace import Workspace


def history(work: Workspace, version: str, tasks: Sequence[int]) -> dict[int, str]:
    """The newest version, up to `version`, with the atoms of the first i tasks, for every i."""
    versions = work.store.log(version)
    known = ((one.id, tasks_of(work.store.view(one.id))) for one in versions)
    return newest_after_each(known, tasks)


def tasks_of(view: memtool_stores.MemoryView) -> tuple[int, ...]:
    """Numbers of the tasks whose atoms a version has, in the order written."""
    return tuple(task_of(record) for record in view.atom_records)


def rows_beneath(view: memtool_stores.MemoryView, task: Task) -> int:
    """How many rows of atoms a task is trained on top of: those in memory before its own."""
    for index, number in enumerate(tasks_of(view)):
        if number == task.number:
            return index
    return len(view.atom_records)


def past_beneath(work: Workspace, view: memtool_stores.MemoryView, rows: int) -> PastInputs:
    """What entered the adapted maps in the tasks of the first `rows` rows of atoms.

    Of a task that is trained anew though it is in memory, as the version before it has it. Raises
    NotFoundError where no version has it.
    """
    if rows < len(view.atom_records):
        before = history(work, view.version, tasks_of(view)).get(rows)
        if before is None:
            raise NotFoundError(
                f"no version of {work.store_path!r} holds the {rows} tasks before "
                "that one: what their inputs leave free is not known any more",
                remedy="another --store, to learn the tasks anew",
            )
        view = work.store.view(before)
    return past_inputs_of(view, work.layout, work.config.past)


def beneath_digest(work: Workspace, task: Task) -> str:
    """What a task is, or in memory was, trained on top of."""
    if not work.has_store:
        return digest(())
    view = work.store.view("HEAD")
    rows = rows_beneath(view, task)
    if rows < len(view.atom_records):
        # Written: what was pruned or forgotten since does not make it another training.
        provenance = view.atom_records[rows].meta.get("provenance") or {}
        if known := provenance.get("beneath"):
            return str(known)
    return _digest_at(work, view, view.atom_records[:rows])


def _digest_at(
    work: Workspace,
    view: memtool_stores.MemoryView,
    records: Sequence[memtool_stores.AdapterRecord],
) -> str:
    """The digest of rows of a version, and of the head that training goes on from."""
    going_on = work.reads == "images" and work.config.head.kind == "shared" and records
    return digest(records, view.blob_sha256(HEAD) if going_on else None)


def about_atoms(adapter: ReadAdapter) -> About | None:
    """What atoms were trained on; None for those that were not trained here."""
    return adapter.about if adapter.trained_as == "atoms" else None


def require_new_task(txn: memtool_stores.Transaction, adapter: ReadAdapter) -> None:
    """A task adds its atoms once. Raises AlreadyExistsError."""
    number = int(adapter.meta["task"])
    if number in [task_of(record) for record in txn.atom_records]:
        raise AlreadyExistsError(
            f"the memory holds atoms of task {number} already",
            remedy=f"memtool forget {number} first, or another --store",
        )


def require_trained_here(
    work: Workspace, view: memtool_stores.MemoryView, adapter: ReadAdapter
) -> None:
    """Atoms belong on top of the very atoms that they were trained on. Raises MismatchError."""
    about = about_atoms(adapter)
    if about is not None and about.beneath != _digest_at(work, view, view.atom_records):
        raise MismatchError(
            f"{adapter.path} was trained from {about.warm_start}, not on top of "
            f"the {len(view.atom_records)} tasks that are in memory now",
            expected="tasks that are trained and written one after another",
            remedy=f"memtool train-adapter --task {adapter.meta['task']} --fresh",
        )


def require_same_gate(work: Workspace, there: MoramSettings, settings: MoramSettings) -> None:
    """All atoms of a memory are trained and read through one gate. Raises ConfigError."""
    if there != settings:
        raise ConfigError(
            f"the memory {work.store_path!r} has another gate: {_differences(there, settings)}",
            remedy="the options that it was begun with, or another --store",
        )


def _differences(one: MoramSettings, other: MoramSettings) -> str:
    """`"topk 8, here 16"` for every setting that differs."""
    there, here = one.model_dump(), other.model_dump()
    return ", ".join(
        f"{name} {there[name]}, here {here[name]}" for name in there if there[name] != here[name]
    )
