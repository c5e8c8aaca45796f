"""What a store holds of a memory beside values and keys, and the memory made from it.

Blobs, beside those of every method, of `heads` and of `sums`: `memory` (JSON: settings),
`memory.tasks.<n>` and `memory.adapters.<n>` (the tasks, and which adapter and task each key belongs
to, in rows), `queries.<task>` (moments of each task alone, that keys are solved from),
`query-modules` (learned g, when there are any), `decoders` (where `memory.read` is decoder) and
`past-queries` (bases of what the memory was asked, where `consolidate.protect` is dual-gpm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator

import memtool_stores
from memtool.adapters.layout import Layout, Site
from memtool.adapters.values import AdapterValues
from memtool.backbones.interface import Backbone
from memtool.errors import ConfigError, CorruptError, MismatchError, NotFoundError
from memtool.heads import FeatureStatistics, LinearClassifier, RecalledHead
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.keyed import KeyedMemory
from memtool.memories.moments import Moments
from memtool.memories.novelty import TaskReaches
from memtool.methods.in_store import (
    feature_statistics,
    features_blob,
    own_head,
)
from memtool.methods.mira.first import first_records, require_same_first, taken_along
from memtool.methods.mira.heads import read_head
from memtool.methods.mira.indexed import Indexed
from memtool.methods.mira.look import ImageLook, needs_first, width_of
from memtool.methods.mira.protect import Protection
from memtool.methods.mira.read import DECODERS, load_decoders
from memtool.methods.mira.recall import MemoryModel, first_norms, memory_blocks, reaches_of
from memtool.methods.on_demand import Counted, OnDemand
from memtool.methods.pieces import StateInRows
from memtool.methods.records import number_of, task_of
from memtool.methods.stored_values import values_of
from memtool.sections import ConsolidateSettings, MemorySettings, as_meant
from memtool.settings import HeadSettings
from memtool.tensor_bytes import load_tensors
from memtool_stores.held import Spool

MEMORY = "memory"
QUERY_MODULES = "query-modules"
PAST_QUERIES = "past-queries"


def queries_blob(task: int) -> str:
    """Name of the blob that holds the moments of a task's queries."""
    return f"queries.{task}"


class MemoryState(StateInRows):
    """How the memory is read: the JSON blob `memory`, and rows beside it for `BY_ROW`.

    `tasks` in the order in which they were consolidated; `adapters` are the ids behind the keys,
    in key order, and `adapter_tasks` the position in `tasks` of each. `consolidate` says how the
    keys were made; `first` are the ids of the adapters that anything is looked at under.
    """

    blob: ClassVar[str] = MEMORY
    BY_ROW: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "tasks": {"number": "tasks"},
        "adapters": {"id": "adapters", "task": "adapter_tasks"},
    }

    schema_version: int = 2
    memory: MemorySettings
    head: HeadSettings
    consolidate: ConsolidateSettings = ConsolidateSettings()
    tasks: tuple[int, ...]
    adapters: tuple[str, ...]
    adapter_tasks: tuple[int, ...]
    class_names: tuple[str, ...]
    fingerprint: str
    first: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _similarity_as_meant(cls, given: Any) -> Any:
        memory = given.get("memory") if isinstance(given, dict) else None
        if not isinstance(memory, dict) or "similarity" not in memory:
            return given
        meant = as_meant(memory["similarity"])
        return {**given, "memory": {**memory, "similarity": meant}}

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        places = range(len(self.tasks))
        if len(self.adapter_tasks) != len(self.adapters):
            raise ValueError(f"{len(self.adapters)} adapters of {len(self.adapter_tasks)} tasks")
        if not all(place in places for place in self.adapter_tasks):
            raise ValueError(f"adapters of other tasks than the {len(places)} that are named")
        if len({*self.tasks}) < len(self.tasks) or len({*self.adapters}) < len(self.adapters):
            raise ValueError("a task or an adapter that is named twice")
        return self

    def require_own(self, view: memtool_stores.MemoryView) -> None:
        """Raise CorruptError for an adapter of a version that is of another task than is said."""
        said = {
            id: self.tasks[place]
            for id, place in zip(self.adapters, self.adapter_tasks, strict=True)
        }
        for record in view.adapters:
            if said.get(record.id, number_of(record)) != number_of(record):
                raise CorruptError(
                    f"blob {MEMORY!r} at version {view.version} has adapter {record.name!r} of "
                    f"task {said[record.id]}",
                    expected=f"task {number_of(record)}",
                )


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The memory at one version, on the device: what retrieval and evaluation read.

    `layout` is that of the adapters that are trained here, `sites` all that the model offers;
    `records` are the adapters behind the keys; `model` is None while nothing is consolidated.
    """

    version: str
    view: memtool_stores.MemoryView
    layout: Layout
    sites: tuple[Site, ...]
    records: tuple[memtool_stores.AdapterRecord, ...]
    state: MemoryState | None
    model: MemoryModel | None
    head: RecalledHead | None

    @classmethod
    def read(
        cls,
        store: memtool_stores.MemoryStore,
        version: str,
        backbone: Backbone,
        layout: Layout,
        resident: int | None = None,
    ) -> Snapshot:
        """Read a version whole, to where the backbone is.

        Of its adapters so many bytes are held at a time, None: all; 0: one, where nothing is
        recalled.
        """
        view, sites, device = store.view(version), backbone.all_sites, backbone.device
        state = MemoryState.load(view)
        if state is None or not state.adapters:
            return cls(view.version, view, layout, sites, view.adapters, None, None, None)
        state.require_own(view)
        here = set(view.ids)
        kept = [place for place, id in enumerate(state.adapters) if id in here]
        records = tuple(view.get(state.adapters[place]) for place in kept)
        keys = view.keys()
        if keys is None or keys.shape[1] != len(records) or not records:
            raise MismatchError(
                f"version {view.version} has keys for other adapters than its memory names",
                remedy="memtool consolidate",
            )
        if resident == 0:
            ragged = any(record.ragged for record in records)
            resident = None if ragged else view.space.layout.nbytes
        values = values_of(view, records, layout, sites, resident)
        look = look_in(view, state.first, state.memory, state.head, backbone, layout)
        blocks = memory_blocks(state.memory, backbone, layout.blocks)
        memory = KeyedMemory.from_settings(
            state.memory,
            blocks,
            width_of(state.memory, backbone, blocks),
            torch.from_numpy(keys.copy()),
            prefix_tokens=backbone.prefix_tokens,
            norms=first_norms(state.memory, backbone, blocks),
        )
        if view.has_blob(QUERY_MODULES):
            _load_query_modules(memory, view.blob(QUERY_MODULES))
        if state.memory.read == "decoder":
            load_decoders(memory, state.memory, values, view.blob(DECODERS))
        if state.memory.frozen == "novelty":
            memory[memory.blocks[0]].reaches = reaches_of(query_statistics(view, state))
        if state.memory.index == "usearch":
            for block in blocks:
                memory[block].searched_by = Indexed(view.store_id, len(blocks))
        model = MemoryModel(backbone, values, memory, state.memory, look)
        model = model.to(device).requires_grad_(False)
        head = read_head(view, len(state.tasks), state.adapter_tasks)
        if head is not None:
            head = replace(head.to(device), of_directions=state.head.is_fixed)
            _check_head(head, state, len(records), view.version)
        return cls(view.version, view, layout, sites, records, state, model, head)

    def consolidated(self) -> tuple[MemoryState, MemoryModel, RecalledHead]:
        """State, model and head of a memory that was consolidated; an error that helps if not."""
        if self.state is None or self.model is None or self.head is None:
            held = f"{len(self.records)} adapters, none of which has a key"
            raise ConfigError(
                f"the memory at version {self.version} was never consolidated: it holds {held}",
                remedy="memtool consolidate",
            )
        return self.state, self.model, self.head

    def adapters_of(self, task: int) -> tuple[memtool_stores.AdapterRecord, ...]:
        """The live adapters of a task, with a key or not."""
        found = tuple(r for r in self.view.adapters if r.meta.get("task") == task)
        if not found:
            held = sorted({str(r.meta.get("task")) for r in self.view.adapters})
            raise NotFoundError(
                f"no adapter of task {task} at version {self.version}",
                expected=f"one of the tasks in memory: {', '.join(held) or 'none'}",
                remedy=f"memtool train-adapter --task {task} && memtool write",
            )
        return found

    def own_values(self, task: int, device: torch.device) -> AdapterValues:
        """The adapters of a task, exactly as stored (exact recall)."""
        records = self.adapters_of(task)
        return self.values_of(records).to(device)

    def values_of(
        self, records: Sequence[memtool_stores.AdapterRecord], resident: int | None = None
    ) -> AdapterValues:
        """Any adapters of this version, stacked, on the CPU; of more than `resident` bytes some."""
        return values_of(self.view, records, self.layout, self.sites, resident)

    def own_head(self, adapter: str) -> LinearClassifier | None:
        """The classifier that was trained with an adapter, if it came with one."""
        return own_head(self.view, adapter)

    def past_queries(self) -> Protection:
        """What learning may not change; nothing before the first protected consolidation."""
        if not self.view.has_blob(PAST_QUERIES):
            return Protection()
        return Protection.from_bytes(self.view.blob(PAST_QUERIES), f"blob {PAST_QUERIES!r}")

    def query_statistics(self) -> OnDemand[QueryStatistics]:
        """Moments of the queries of every consolidated task, by task number, in order."""
        return query_statistics(self.view, self.state)

    def feature_statistics(self) -> OnDemand[FeatureStatistics]:
        """Moments of the features of every consolidated task, by task number, in order."""
        return feature_statistics(self.view, self.state.tasks if self.state else ())

    def reaches(self) -> TaskReaches:
        """What tells the novelty of features and queries, by the tasks that are recalled."""
        state, _, _ = self.consolidated()
        features, queries = self.feature_statistics(), self.query_statistics()

        def seen(place: int) -> Moments:
            return features[state.tasks[place]].moments

        def asked(place: int) -> Moments | None:
            task = state.tasks[place]
            return queries[task].moments if task in queries else None

        return TaskReaches(len(state.tasks), (seen, asked), state.adapter_tasks)


def look_in(
    view: memtool_stores.MemoryView,
    first: tuple[str, ...],
    settings: MemorySettings,
    head: HeadSettings,
    backbone: Backbone,
    layout: Layout,
) -> ImageLook:
    """What a memory looks at; `first` are the ids of the adapters of its first task.

    Raises MismatchError where one of these is not in memory.
    """
    if not needs_first(settings, head):
        return ImageLook(backbone, settings, head)
    values = values_of(view, first_records(view, first), layout, backbone.all_sites)
    return ImageLook(backbone, settings, head, values)


def _load_query_modules(memory: KeyedMemory, data: bytes) -> None:
    """Put the learned query modules of a blob in the place of those of a new memory."""
    where = f"blob {QUERY_MODULES!r}"
    learned, fresh = load_tensors(data, where), memory.state_dict()
    for name, tensor in learned.items():
        if ".query." not in name or name not in fresh or fresh[name].shape != tensor.shape:
            raise CorruptError(
                f"{where} holds {name!r} of shape {tuple(tensor.shape)}",
                expected="the parts of the query modules that the memory's settings name",
            )
    memory.load_state_dict({**fresh, **learned})


def _check_head(head: RecalledHead, state: MemoryState, adapters: int, version: str) -> None:
    """Raise MismatchError where a head does not belong to the memory beside it."""
    owners = adapters if head.owners is None else len(head.owners)
    if (head.classes, owners) != (len(state.class_names), adapters):
        raise MismatchError(
            f"the head at version {version} is of {head.classes} classes and {owners} adapters",
            expected=f"{len(state.class_names)} classes and {adapters} adapters, as in its memory",
            remedy="memtool consolidate",
        )


def query_statistics(
    view: memtool_stores.MemoryView, state: MemoryState | None
) -> OnDemand[QueryStatistics]:
    """Moments of the queries of every consolidated task at a version, in order, as `OnDemand`.

    A task that was consolidated before memtool kept them apart is left out, and counted again.
    """
    known = [task for task in (state.tasks if state else ()) if view.has_blob(queries_blob(task))]

    def read(task: int) -> QueryStatistics:
        blob = queries_blob(task)
        return QueryStatistics.from_bytes(view.blob(blob), f"blob {blob!r}")

    return OnDemand(known, read)


def statistics_known(
    view: memtool_stores.MemoryView, state: MemoryState | None, spool: Spool, *, merged: bool
) -> tuple[Counted[QueryStatistics], Counted[FeatureStatistics]]:
    """Moments of queries and features of the consolidated tasks, in order.

    With `merged` also of those that came from another memory with theirs, in the order written.
    """
    tasks = dict.fromkeys(state.tasks if state else ())
    if merged:
        blobs = {*view.blobs()}
        numbers = dict.fromkeys(task_of(record) for record in view.adapters)
        tasks |= {
            task: None for task in numbers if {queries_blob(task), features_blob(task)} <= blobs
        }
    asked = {task: queries_blob(task) for task in tasks if view.has_blob(queries_blob(task))}
    seen = {task: features_blob(task) for task in tasks}
    return (
        Counted(view, asked, QueryStatistics.from_bytes, spool),
        Counted(view, seen, FeatureStatistics.from_bytes, spool),
    )


SAME_QUERIES = (
    "token",
    "query",
    "query_norm",
    "scope",
    "look_at",
    "look_under",
    "keys_of",
    "key_bias",
    "centre",
    "blocks",
)
"""Settings of a memory that decide how its queries are counted."""


def join(txn: memtool_stores.Transaction, view: memtool_stores.MemoryView) -> tuple[str, ...]:
    """In a transaction that took adapters of another memory in: one way to count queries.

    Raises MismatchError where they were counted otherwise, or of other classes.
    """
    here, there = MemoryState.load(txn.base), MemoryState.load(view)
    if here is not None and there is not None:
        for name in SAME_QUERIES:
            mine, other = getattr(here.memory, name), getattr(there.memory, name)
            if mine != other:
                raise MismatchError(
                    f"memory.{name} is {other!r} in the other memory, and {mine!r} in this one",
                    expected="two memories whose queries were counted alike",
                    remedy="another --store",
                )
        if here.head.beside != there.head.beside:
            raise MismatchError(
                f"head.features is {there.head.features} in the other memory, and "
                f"{here.head.features} in this one",
                expected="two memories whose features were counted alike",
                remedy="another --store",
            )
        if here.head.is_fixed != there.head.is_fixed:
            raise MismatchError(
                f"head.kind is {there.head.kind} in the other memory, and {here.head.kind} in this "
                "one",
                expected="two memories whose adapters learned under heads of one kind: known for "
                "all classes in advance, or not",
                remedy="another --store",
            )
        _require_same_centre(txn.base, view, here)
        require_same_first(txn.base, here.first, view, there.first)
        if here.class_names != there.class_names:
            raise MismatchError(
                "the two memories tell other classes apart",
                expected=", ".join(here.class_names[:8]),
                remedy="another --store",
            )
    if here is None and there is not None:
        nothing: dict[str, tuple[int, ...]] = {"tasks": (), "adapters": (), "adapter_tasks": ()}
        first = {"first": taken_along(txn, view, there.first)}
        there.model_copy(update={**nothing, **first}).put(txn)
    return ()


def _require_same_centre(
    here: memtool_stores.MemoryView, there: memtool_stores.MemoryView, state: MemoryState
) -> None:
    """Raise MismatchError where the queries of two memories were centred by other means."""
    if state.memory.centre == "none":
        return
    centres = []
    for view in (here, there):
        data = view.blob(QUERY_MODULES) if view.has_blob(QUERY_MODULES) else b""
        parts = load_tensors(data, f"blob {QUERY_MODULES!r}") if data else {}
        centres.append({name: part for name, part in parts.items() if name.endswith(".centre")})
    mine, other = centres
    if mine.keys() != other.keys() or not all(torch.equal(mine[n], other[n]) for n in mine):
        raise MismatchError(
            "the queries of the two memories were centred by the means of other tasks",
            expected="two memories that began with the same task",
            remedy="another --store",
        )
