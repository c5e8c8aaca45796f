"""The inventory of a memory before it is consolidated: what is new, and what was counted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import memtool_stores
from memtool.errors import ConfigError, CorruptError, NotFoundError
from memtool.heads import FeatureStatistics, LinearClassifier
from memtool.heads.solve import SOLVED, Earlier, merged
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.keyed import KeyedMemory, centre_of
from memtool.methods.in_store import features_blob
from memtool.methods.mira.first import first_of
from memtool.methods.mira.heads import heads_of
from memtool.methods.mira.look import ImageLook, needs_first
from memtool.methods.mira.state import (
    SAME_QUERIES,
    MemoryState,
    Snapshot,
    look_in,
    queries_blob,
    statistics_known,
)
from memtool.methods.mira.sums import Asked, read_seen
from memtool.methods.on_demand import Counted, OnDemand
from memtool.methods.records import out_of_runs, task_of
from memtool.methods.results import ConsolidateResult
from memtool.settings import Config
from memtool.streams.task import Task
from memtool.workspace import Workspace
from memtool_stores.held import Spool


@dataclass(eq=False)
class Inventory:
    """What is known of the memory that is consolidated.

    Of `tasks`, in the order in which they came, `new` ones have no keys yet, and `grown` ones got
    more adapters since they had theirs. `queries` and `features` are moments, by task, of which one
    is in memory at a time. `centre`
    (memories, d) is what is taken from queries, where anything is.
    """

    work: Workspace
    snapshot: Snapshot
    tasks: tuple[int, ...]
    new: tuple[int, ...]
    grown: tuple[int, ...]
    queries: Counted[QueryStatistics]
    features: Counted[FeatureStatistics]
    unchanged: bool
    centre: Tensor | None = None

    @property
    def config(self) -> Config:
        """The settings that it is consolidated by."""
        return self.work.config

    @property
    def view(self) -> memtool_stores.MemoryView:
        """The version that it goes on from."""
        return self.snapshot.view

    @property
    def state(self) -> MemoryState | None:
        """How that version is read; None before the first consolidation."""
        return self.snapshot.state

    @property
    def adapter_tasks(self) -> tuple[int, ...]:
        """The place in `tasks` of the task of every adapter."""
        places = {number: place for place, number in enumerate(self.tasks)}
        return tuple(places[task_of(record)] for record in self.view.adapters)

    @property
    def first(self) -> tuple[str, ...]:
        """Ids of the adapters that are looked under; none where none is."""
        if not needs_first(self.config.memory, self.config.head):
            return ()
        counted = MemoryState.load(self.view)
        return first_of(self.view, counted.first if counted is not None else ())

    @cached_property
    def look(self) -> ImageLook:
        """What is looked at before anything is recalled, on the device."""
        work, config = self.work, self.config
        look = look_in(
            self.view, self.first, config.memory, config.head, work.backbone, work.layout
        )
        return look.to(work.engine.device).requires_grad_(False)

    @cached_property
    def before(self) -> Tensor | None:
        """The keys (memories, t, d_k) that are there already."""
        stored = self.view.keys()
        return None if stored is None else torch.from_numpy(stored.copy())

    @cached_property
    def trained(self) -> OnDemand[LinearClassifier | None]:
        """The classifier that came with the last adapter of every task, by its number."""
        last = {task_of(record): record.name for record in self.view.adapters}
        return OnDemand(last, lambda task: self.snapshot.own_head(last[task]))

    @cached_property
    def asked(self) -> Asked:
        """The queries of all tasks; once all are counted."""
        before = Asked.read(self.view, tasks=self._kept) if self._kept else None
        by_class = self.config.memory.keys_of == "class"
        others = (self.queries[task] for task in self.tasks[self._kept if before else 0 :])
        return Asked.of(others, by_class=by_class, before=before)

    @cached_property
    def earlier(self) -> Earlier:
        """What came of the tasks that were consolidated before, as far as it is the same now."""
        state, head = self.state, self.snapshot.head
        if not self._kept or state is None or head is None:
            return Earlier()
        own = {}
        if head.owners is not None and state.head == self.config.head:
            own = heads_of(head.to("cpu"), state.tasks)
        anew = {*self.fresh}
        heads = {task: one for task, one in own.items() if task not in anew}
        moments = None if anew & {*state.tasks} else read_seen(self.view)
        return Earlier(self._kept, heads, moments)

    @property
    def _kept(self) -> int:
        """How many tasks, from the first, are those whose sums are kept: all or none."""
        tasks = () if self.state is None else self.state.tasks
        return len(tasks) if self.tasks[: len(tasks)] == tasks else 0

    @property
    def seen(self) -> FeatureStatistics | None:
        """The features of all tasks as they are now, where one head is solved from them."""
        head = self.config.head
        if head.scope == "task" or head.kind not in SOLVED:
            return None
        return merged(self.features, self.earlier)

    @property
    def fresh(self) -> tuple[int, ...]:
        """The tasks whose images are looked at: grown and new ones."""
        return (*self.grown, *self.new)

    def opened(self, numbers: tuple[int, ...]) -> list[Task]:
        """The tasks of these numbers, with their images."""
        return [self.work.task(str(number)) for number in numbers]


def consolidated_before(work: Workspace) -> ConsolidateResult | None:
    """What consolidation came to, where there is nothing new since; no image is read for it."""
    begin, store, config = time.perf_counter(), work.store, work.config
    view = store.view("HEAD")
    state = MemoryState.load(view)
    if state is None or not _same(state, view, config):
        return None
    kept = {blob(task) for task in state.tasks for blob in (queries_blob, features_blob)}
    if not kept <= {*view.blobs()}:
        return None  # an older memtool did not keep them apart: they are counted again
    for version in store.log(view.version):
        said = version.metadata
        accuracy, validation = said.get("train_accuracy"), said.get("validation_accuracy")
        if isinstance(accuracy, float) and _learned(said) == state.tasks:
            return ConsolidateResult(
                version=view.version,
                tasks=state.tasks,
                separation=state.memory.separation,
                mix=state.memory.mix,
                epochs=state.consolidate.epochs,
                seconds=time.perf_counter() - begin,
                train_accuracy=accuracy,
                validation_accuracy=validation if isinstance(validation, float) else None,
                key_drift_degrees=0.0,
                unchanged=True,
            )
    return None  # an older memtool consolidated it and did not say


def _learned(said: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The tasks that a version says it learned; None for what somebody else wrote."""
    try:
        return out_of_runs(said.get("learned") or ())
    except CorruptError:
        return None


def _same(state: MemoryState, view: memtool_stores.MemoryView, config: Config) -> bool:
    """Whether a memory holds no other adapters than its keys are of, made by the same settings."""
    then = (state.adapters, state.memory, state.head, state.consolidate)
    return then == (view.ids, config.memory, config.head, config.consolidate)


def inventory_of(work: Workspace, snapshot: Snapshot, spool: Spool) -> Inventory:
    """What is new in a memory, and what was counted of the rest; more of it waits in a spool."""
    view, state = snapshot.view, snapshot.state
    if not view.adapters:
        raise NotFoundError(
            f"the memory {work.store_path!r} holds no adapters",
            remedy="memtool train-adapter --task 1 && memtool write",
        )
    counted = MemoryState.load(view)
    _require_same_queries(work.config, counted)
    queries, features = statistics_known(view, counted, spool, merged=_solved(work.config))
    centre = None if snapshot.model is None else _centre_of(snapshot.model.memory)
    if queries and centre is None and work.config.memory.centre != "none":
        raise ConfigError(
            f"memory.centre {work.config.memory.centre}, but what the queries of tasks "
            f"{list(queries)} were centred by did not come along",
            remedy="--set memory.centre=none, or a new --store",
        )
    numbers = dict.fromkeys(task_of(record) for record in view.adapters)
    new = tuple(number for number in numbers if number not in queries)
    return Inventory(
        work=work,
        snapshot=snapshot,
        tasks=(*queries, *new),
        new=new,
        grown=_grown(snapshot),
        queries=queries,
        features=features,
        unchanged=not new and state is not None and _same(state, view, work.config),
        centre=centre,
    )


def _centre_of(memory: KeyedMemory) -> Tensor | None:
    found = centre_of(memory)
    return None if found is None else found.cpu()


def _solved(config: Config) -> bool:
    """Whether keys follow from moments alone, so that no image of a task has to be seen again."""
    settings = config.consolidate
    return settings.keys == "closed-form" and not settings.epochs


def _require_same_queries(config: Config, state: MemoryState | None) -> None:
    """Queries that were counted one way cannot be asked another way later."""
    if state is None:
        return
    now, then = config.memory, state.memory
    for name in SAME_QUERIES:
        if getattr(now, name) != getattr(then, name):
            raise ConfigError(
                f"memory.{name} is {_written(getattr(now, name))}, but the queries of tasks "
                f"{list(state.tasks)} were counted with {_written(getattr(then, name))}",
                remedy=f"--set memory.{name}={_written(getattr(then, name))}, or a new --store",
            )
    if config.head.is_fixed != state.head.is_fixed:
        raise ConfigError(
            f"head.kind is {config.head.kind}, but the adapters of tasks {list(state.tasks)} "
            f"learned under head.kind {state.head.kind}",
            expected="heads of one kind: known for all classes in advance, or not",
            remedy=f"--set head.kind={state.head.kind}, or a new --store",
        )
    here, there = config.head.beside, state.head.beside
    if here != there:
        raise ConfigError(
            f"head.features is {config.head.features}, but the features of tasks "
            f"{list(state.tasks)} were counted as {state.head.features}",
            remedy=f"--set head.features={state.head.features}, or a new --store",
        )


def _written(value: object) -> str:
    """A value as it is set: several places with commas between them."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _grown(snapshot: Snapshot) -> tuple[int, ...]:
    """Consolidated tasks that got more adapters since."""
    state = snapshot.state
    if state is None:
        return ()
    keyed = {*state.adapters}
    added = [record for record in snapshot.view.adapters if record.id not in keyed]
    grown = sorted({task_of(record) for record in added} & set(state.tasks))
    if grown and state.memory.scope == "block":
        raise ConfigError(
            f"task {grown[0]} was consolidated with fewer adapters than it has now; with "
            "memory.scope block its queries would have to be counted again",
            remedy="write all adapters of a task before memtool consolidate; memtool rollback "
            "goes back to before it",
        )
    return tuple(grown)
