"""What a store holds of a memory of atoms, and the bank and head made from it.

Blobs beside the rows of atoms: `atoms` (JSON: gate and head), `features.<task>` (moments of each
task's features as they were when it was written), `past-inputs` (what entered the adapted maps, of
keys that begin free of it), `head` and `head.<adapter>`, as in `state`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from pydantic import ValidationError

import memtool_stores
from memtool.adapters.atoms import AtomBank, AtomGate, Scores
from memtool.adapters.layout import Layout
from memtool.adapters.values import Recall
from memtool.errors import AlreadyExistsError, CorruptError, MismatchError
from memtool.heads import FeatureStatistics, LinearClassifier, RecalledHead, solve_recalled_head
from memtool.learning.past_inputs import PastInputs
from memtool.memories.moments import Moments
from memtool.memories.novelty import TaskReaches
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.in_store import (
    HEAD,
    StoredState,
    feature_statistics,
    own_head,
    put_changed,
)
from memtool.methods.on_demand import OnDemand
from memtool.methods.records import task_of
from memtool.sections import MoramSettings, PastSettings
from memtool.settings import HeadSettings

ATOMS = "atoms"
"""Blob of `AtomsState`."""

PAST_INPUTS = "past-inputs"
"""Blob of `PastInputs`, where keys begin free of them (`moram.keys`)."""


class AtomsState(StoredState):
    """How the atoms are read: the JSON blob `atoms`. `moram.topk` is a number here."""

    blob: ClassVar[str] = ATOMS

    schema_version: int = 1
    moram: MoramSettings
    head: HeadSettings
    class_names: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, eq=False)
class AtomSnapshot:
    """The memory at one version, on the device: what retrieval and evaluation read.

    `tasks` are the numbers of the tasks whose atoms are there, in the order written; `settings`
    describe the gate that all of them were trained through. `state` and `head` are those of a
    memory of images; a language model keeps its own head.
    """

    version: str
    view: memtool_stores.MemoryView
    tasks: tuple[int, ...]
    bank: Rank1Memory
    settings: MoramSettings
    gate: AtomGate
    state: AtomsState | None = None
    head: RecalledHead | None = None

    @property
    def recall(self) -> Recall:
        """All atoms, for every token to choose among."""
        return self.bank.recall(self.gate)

    def of_images(self) -> tuple[AtomsState, RecalledHead]:
        """State and head, of a memory of images."""
        assert self.state is not None
        assert self.head is not None
        return self.state, self.head

    def reaches(self) -> TaskReaches:
        """What tells the novelty of features, by the tasks whose atoms are chosen."""
        statistics = feature_statistics(self.view, self.tasks)

        def seen(place: int) -> Moments:
            return statistics[self.tasks[place]].moments

        return TaskReaches(len(self.tasks), (seen,), range(len(self.tasks)))


def gate_settings(view: memtool_stores.MemoryView, rank: int) -> MoramSettings | None:
    """The gate that the atoms of a version were trained through; None before the first.

    Raises CorruptError where they do not say it.
    """
    state = AtomsState.load(view)
    if state is not None:
        return state.moram
    if not view.atom_records:
        return None
    record = view.atom_records[-1]
    try:
        given = MoramSettings.model_validate(record.meta["hyperparameters"]["moram"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CorruptError(
            f"the atoms {record.name!r} do not say which gate they were trained through",
            remedy="memtool rollback to the version before them",
        ) from error
    return resolved(given, rank)


def resolved(settings: MoramSettings, rank: int) -> MoramSettings:
    """The settings with a number for topk: the rank where none is given, but at least 2."""
    return settings.model_copy(update={"topk": settings.topk or max(rank, 2)})


def gate_of(settings: MoramSettings, rank: int, scores: Scores = "exact") -> AtomGate:
    """The gate that the settings describe; `scores` are of an evaluation."""
    said = resolved(settings, rank).model_dump(exclude={"keys", "frozen_scaling"})
    return AtomGate(**said, scores=scores)


def bank_of(
    view: memtool_stores.MemoryView, layout: Layout, rows: int | None = None
) -> Rank1Memory:
    """The atoms of a version, or of its first `rows` rows, frozen, on the CPU.

    The owner of an atom is the number of its task. Pruned atoms are left out.
    """
    memory = Rank1Memory(layout.sites)
    records = view.atom_records[:rows]
    if records:
        for site in memory.sites:
            stored = view.atoms(site.name)
            kept = np.flatnonzero(stored.owner < len(records))
            tasks = [task_of(records[place]) for place in stored.owner[kept].tolist()]
            memory.append(
                site.name,
                AtomBank(
                    torch.from_numpy(stored.keys[kept].copy()),
                    torch.from_numpy(np.ascontiguousarray(stored.values[:, kept].T)),
                    torch.from_numpy(stored.scaling[kept].astype(np.float32)),
                    torch.tensor(tasks, dtype=torch.int64),
                ),
            )
    return memory.eval().requires_grad_(False)


def past_inputs_of(
    view: memtool_stores.MemoryView, layout: Layout, past: PastSettings
) -> PastInputs:
    """What entered the adapted maps in the tasks of a version, where it keeps that."""
    if not view.has_blob(PAST_INPUTS):
        return PastInputs(layout, past.energy, rule=past.rule)
    kept, where = view.blob(PAST_INPUTS), f"blob {PAST_INPUTS!r}"
    return PastInputs.from_bytes(kept, layout, past.energy, where, rule=past.rule)


def digest(records: Sequence[memtool_stores.AdapterRecord], head: str | None = None) -> str:
    """What atoms were trained on top of: the bytes, scalings and prunings of rows, and a head."""
    said = [
        [r.sha256, r.scaling, {site: list(ranks) for site, ranks in sorted(r.pruned.items())}]
        for r in records
    ]
    return hashlib.sha256(json.dumps([said, head]).encode()).hexdigest()[:32]


def trained_heads(view: memtool_stores.MemoryView) -> dict[int, LinearClassifier | None]:
    """The classifier that was trained with the atoms of each task, where they came with one."""
    return {task_of(record): own_head(view, record.name) for record in view.atom_records}


def solve(
    settings: HeadSettings,
    statistics: Mapping[int, FeatureStatistics],
    trained: Mapping[int, LinearClassifier | None],
) -> RecalledHead:
    """The head of a memory of atoms: from the moments of the features, or the trained heads.

    A head that goes on from task to task (kind shared) is, for every class, that of its last task.
    """
    if settings.kind == "shared":
        settings = settings.model_copy(update={"kind": "grown", "scope": "shared"})
    return solve_recalled_head(settings, statistics, trained, range(len(statistics)))


def solve_without(
    txn: memtool_stores.Transaction, view: memtool_stores.MemoryView, gone: set[str]
) -> None:
    """In a transaction that takes rows of atoms away: the head of those that are left."""
    if not gone & {record.id for record in view.atom_records}:
        return
    left = [task_of(record) for record in view.atom_records if record.id not in gone]
    if not left:
        for name in view.blobs():
            if name in (ATOMS, HEAD, PAST_INPUTS):
                txn.delete_blob(name)
        return
    state = AtomsState.load(view)
    if state is None:
        return  # of texts, which need no head
    if state.head.kind in ("prototype", "text"):
        return  # prototypes stay what they are, and texts are read again by the atoms that are left
    trained = {task: head for task, head in trained_heads(view).items() if task in left}
    head = solve(state.head, feature_statistics(view, left), trained)
    txn.put_blob(HEAD, head.to_bytes())


def join(txn: memtool_stores.Transaction, view: memtool_stores.MemoryView) -> tuple[str, ...]:
    """In a transaction that took atoms of another memory in: one gate, and the head of all tasks.

    Raises MismatchError for another gate, head or classes, and for a task whose atoms are there.
    """
    here, there = AtomsState.load(txn.base), AtomsState.load(view)
    gates = [gate_settings(one, one.space.layout.rank) for one in (txn.base, view)]
    parts: list[tuple[str, object, object]] = [("gate", gates[0], gates[1])]
    if here is not None and there is not None:
        parts += [("head", here.head, there.head), ("classes", here.class_names, there.class_names)]
    for word, mine, other in parts:
        if mine is not None and mine != other:
            raise MismatchError(
                f"the two memories of atoms have another {word}",
                expected=f"{mine}, found {other}",
                remedy="another --store",
            )
    tasks = [task_of(record) for record in txn.atom_records]
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise AlreadyExistsError(
            f"both memories hold atoms of task {min(twice)}, and not the same",
            remedy=f"memtool forget {min(twice)} in one of the two first",
        )
    state = here or there
    if state is None:  # of texts, which need no head
        return _not_joined(txn, view)
    if here is None:
        state.put(txn)
    if state.head.kind in ("prototype", "text"):
        if here is None:
            txn.put_blob(HEAD, view.blob(HEAD))
        return _not_joined(txn, view)
    source = {
        task_of(record): txn.base if txn.base.catalog.by_id(record.id) else view
        for record in txn.atom_records
    }
    statistics = OnDemand(source, lambda task: feature_statistics(source[task], [task])[task])
    trained = {
        task_of(record): own_head(source[task_of(record)], record.name)
        for record in txn.atom_records
    }
    head = solve(state.head, statistics, trained).to_bytes()
    put_changed(txn, HEAD, head)
    return _not_joined(txn, view)


def _not_joined(
    txn: memtool_stores.Transaction, view: memtool_stores.MemoryView
) -> tuple[str, ...]:
    """What atoms that learn from here on do not know of those that came in."""
    if not (txn.base.has_blob(PAST_INPUTS) or view.has_blob(PAST_INPUTS)):
        return ()
    return (
        "what entered the layers in the other memory is not joined: keys that learn from here on "
        "are free of this memory's inputs alone",
    )
