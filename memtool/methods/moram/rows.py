"""The rows of a table that a memory of atoms gives: as it is, and without its threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from memtool.evaluation.record import Row
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.moram.measure import AtomMeasure, use_metrics
from memtool.methods.moram.state import AtomSnapshot
from memtool.streams.task import Task
from memtool.workspace import Workspace

NAMES = {"images": ("memory", "memory of atoms"), "texts": ("moram", "MoRAM")}
"""Id and label of a memory's row, by what it reads."""


def memory_row(
    work: Workspace,
    there: Mapping[int, AtomSnapshot],
    shown: Sequence[Task],
    setting: str,
    *,
    history: bool,
) -> Row:
    """A memory after so many tasks, on tasks; with the use of its atoms where it is known.

    With `history` also before the first task, where anything is known then.
    """
    measure, count = AtomMeasure(work), max(there)
    snapshot = there[count]
    if history and work.reads == "texts":
        nothing = Rank1Memory(work.layout.sites).eval()
        there = {**there, 0: replace(snapshot, tasks=(), bank=nothing)}
    row = measure.row(*NAMES[work.reads], there, shown, setting, before=history)
    if count < 2 or any(number not in there for number in range(1, count + 1)):
        return row
    use = measure.use(snapshot, [there[number + 1].bank for number in range(count)])
    metrics = {**row.metrics, **use_metrics(use)}
    return row.model_copy(update={"atom_use": use, "metrics": metrics})


def without_threshold(
    work: Workspace, snapshot: AtomSnapshot, shown: Sequence[Task], setting: str
) -> Row:
    """The same atoms and head, all kept atoms counting."""
    settings = snapshot.settings.model_copy(update={"threshold": -1.0})
    gate = replace(snapshot.gate, threshold=-1.0)
    there = {len(snapshot.tasks): replace(snapshot, settings=settings, gate=gate)}
    id, label = NAMES[work.reads]
    return AtomMeasure(work).row(f"{id}-all", f"{label}, no threshold", there, shown, setting)
