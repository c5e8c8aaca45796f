"""What a store holds of a memory beside values and keys, and the memory made from it.

Blobs: `memory` (JSON: settings, and which task and adapter each key belongs to), `queries.<task>`
and `features.<task>` (moments of each task alone, that keys and heads are solved from),
`query-modules` (learned g, when there are any), `past-queries` (bases of what the memory was
asked, where `consolidate.protect` is dual-gpm), `head` (what retrieval ends in) and
`head.<adapter>` (the classifier that was trained with an adapter).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors.torch import save

import memtool_stores
from memtool.adapters.layout import Layout
from memtool.adapters.values import AdapterValues
from memtool.backbones.interface import Backbone
from memtool.config import ConsolidateSettings, HeadSettings, MemorySettings
from memtool.errors import ConfigError, CorruptError, MismatchError, NotFoundError
from memtool.heads import FeatureStatistics, LinearClassifier, RecalledHead, solve_head
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.keyed import KeyedMemory
from memtool.methods.protect import Protection
from memtool.methods.recall import MemoryModel, memory_blocks
from memtool.tensor_bytes import load_tensors, read_tensors

MEMORY = "memory"
QUERY_MODULES = "query-modules"
HEAD = "head"
PAST_QUERIES = "past-queries"


def queries_blob(task: int) -> str:
    """Name of the blob that holds the moments of a task's queries."""
    return f"queries.{task}"


def features_blob(task: int) -> str:
    """Name of the blob that holds the moments of a task's features."""
    return f"features.{task}"


def own_head_blob(adapter: str) -> str:
    """Name of the blob that holds the classifier trained with an adapter."""
    return f"head.{adapter}"


class StoredState(BaseModel):
    """How a memory is read: the JSON blob `blob` of a version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blob: ClassVar[str]

    @classmethod
    def load(cls, view: memtool_stores.MemoryView) -> Self | None:
        """The state at a version; None before there is any. Raises CorruptError."""
        if cls.blob not in view.blobs():
            return None
        try:
            return cls.model_validate_json(view.blob(cls.blob))
        except ValidationError as error:
            raise CorruptError(
                f"blob {cls.blob!r} at version {view.version}: {error.errors()[0]['msg']}",
                remedy="memtool verify; a newer memtool may have written it",
            ) from error

    def put(self, txn: memtool_stores.Transaction) -> None:
        """Make it the state of the version that is being written."""
        txn.put_blob(self.blob, self.model_dump_json().encode())


class MemoryState(StoredState):
    """How the memory is read: the JSON blob `memory`.

    `tasks` in the order in which they were consolidated; `adapters` are the ids behind the keys,
    in key order, and `adapter_tasks` the position in `tasks` of each. `consolidate` says how the
    keys were made.
    """

    blob: ClassVar[str] = MEMORY

    schema_version: int = 1
    memory: MemorySettings
    head: HeadSettings
    consolidate: ConsolidateSettings = ConsolidateSettings()
    tasks: tuple[int, ...]
    adapters: tuple[str, ...]
    adapter_tasks: tuple[int, ...]
    class_names: tuple[str, ...]
    fingerprint: str

    @model_validator(mode="after")
    def _fits_itself(self) -> Self:
        places = range(len(self.tasks))
        if len(self.adapter_tasks) != len(self.adapters):
            raise ValueError(f"{len(self.adapters)} adapters of {len(self.adapter_tasks)} tasks")
        if not all(place in places for place in self.adapter_tasks):
            raise ValueError(f"adapters of other tasks than the {len(places)} that are named")
        return self


def classifier_bytes(classifier: LinearClassifier) -> bytes:
    """A classifier as a safetensors file."""
    return save({"weight": classifier.weight.contiguous(), "bias": classifier.bias.contiguous()})


def classifier_of(data: bytes, where: str) -> LinearClassifier:
    """What `classifier_bytes` wrote."""
    tensors = read_tensors(data, where, weight="c d", bias="c")
    return LinearClassifier(tensors["weight"], tensors["bias"])


def own_head(view: memtool_stores.MemoryView, adapter: str) -> LinearClassifier | None:
    """The classifier that was trained with an adapter, if it came with one."""
    name = own_head_blob(adapter)
    return classifier_of(view.blob(name), name) if name in view.blobs() else None


def classes_of(view: memtool_stores.MemoryView) -> tuple[str, ...]:
    """The classes of the heads that came with the adapters of a version, in their order.

    A class that no adapter knows has a number for a name.
    """
    names: dict[int, str] = {}
    count = 0
    for record in view.live:
        head = own_head(view, record.name)
        if head is not None:
            count = max(count, len(head.bias))
            ids = record.meta.get("class_ids", head.bias.isfinite().nonzero()[:, 0].tolist())
            names |= dict(zip(ids, map(str, record.classes), strict=False))
    return tuple(names.get(index, f"class {index}") for index in range(count))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The memory at one version, on the device: what retrieval and evaluation read.

    `records` are the adapters behind the keys; `model` is None while nothing is consolidated.
    """

    version: str
    view: memtool_stores.MemoryView
    layout: Layout
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
        device: torch.device,
    ) -> Snapshot:
        """Read a version whole."""
        view = store.view(version)
        state = MemoryState.load(view)
        if state is None:
            return cls(view.version, view, layout, view.adapters, None, None, None)
        here = set(view.ids)
        kept = [place for place, id in enumerate(state.adapters) if id in here]
        records = tuple(view.get(state.adapters[place]) for place in kept)
        keys = view.keys()
        if keys is None or keys.shape[1] != len(records) or not records:
            raise MismatchError(
                f"version {view.version} has keys for other adapters than its memory names",
                remedy="memtool consolidate",
            )
        values = AdapterValues.from_flat(
            torch.from_numpy(view.values([record.id for record in records]).copy()),
            layout,
            torch.tensor([record.scaling for record in records], dtype=torch.float32),
        )
        memory = KeyedMemory.from_settings(
            state.memory,
            memory_blocks(state.memory, layout),
            backbone.dim,
            torch.from_numpy(keys.copy()),
            prefix_tokens=backbone.prefix_tokens,
        )
        if QUERY_MODULES in view.blobs():
            _load_query_modules(memory, view.blob(QUERY_MODULES))
        model = MemoryModel(backbone, values, memory, state.memory).to(device).requires_grad_(False)
        head = None
        if HEAD in view.blobs():
            head = RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}").to(device)
            _check_head(head, state, len(records), view.version)
        return cls(view.version, view, layout, records, state, model, head)

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
        return AdapterValues.from_flat(
            torch.from_numpy(self.view.values([r.id for r in records]).copy()),
            self.layout,
            torch.tensor([r.scaling for r in records], dtype=torch.float32),
        ).to(device)

    def own_head(self, adapter: str) -> LinearClassifier | None:
        """The classifier that was trained with an adapter, if it came with one."""
        return own_head(self.view, adapter)

    def past_queries(self) -> Protection:
        """What learning may not change; nothing before the first protected consolidation."""
        if PAST_QUERIES not in self.view.blobs():
            return Protection()
        return Protection.from_bytes(self.view.blob(PAST_QUERIES), f"blob {PAST_QUERIES!r}")

    def query_statistics(self) -> dict[int, QueryStatistics]:
        """Moments of the queries of every consolidated task, by task number, in order."""
        return query_statistics(self.view, self.state)

    def feature_statistics(self) -> dict[int, FeatureStatistics]:
        """Moments of the features of every consolidated task, by task number, in order."""
        return feature_statistics(self.view, self.state.tasks if self.state else ())


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
) -> dict[int, QueryStatistics]:
    """Moments of the queries of every consolidated task at a version, in order.

    A task that was consolidated before memtool kept them apart is left out, and counted again.
    """
    tasks = [task for task in (state.tasks if state else ()) if queries_blob(task) in view.blobs()]
    blobs = {task: queries_blob(task) for task in tasks}
    return {t: QueryStatistics.from_bytes(view.blob(b), f"blob {b!r}") for t, b in blobs.items()}


def feature_statistics(
    view: memtool_stores.MemoryView, tasks: Sequence[int]
) -> dict[int, FeatureStatistics]:
    """Moments of the features of tasks at a version, in order."""
    blobs = {task: features_blob(task) for task in tasks}
    return {t: FeatureStatistics.from_bytes(view.blob(b), f"blob {b!r}") for t, b in blobs.items()}


def solve_recalled_head(
    settings: HeadSettings,
    statistics: Mapping[int, FeatureStatistics],
    trained: Mapping[int, LinearClassifier | None],
    adapter_tasks: Sequence[int],
) -> RecalledHead:
    """The head of a memory: from the moments of the tasks' features, or the trained classifiers.

    `trained[task]` came with the task's last adapter; a grown head that is shared takes every
    class from the task that trained it last. A head that learns on through every consolidation
    (kind shared) starts as the mean of the trained ones, or as the discriminant head of all tasks
    where an adapter came without.
    """
    if settings.kind == "shared":
        known = [head for head in trained.values() if head is not None]
        if len(known) == len(trained):
            return RecalledHead.shared(averaged(known))
        settings = settings.model_copy(update={"kind": "lda", "scope": "shared"})

    def own(task: int) -> LinearClassifier:
        classifier = trained[task]
        if classifier is None:
            raise ConfigError(
                f"head.kind grown, but the adapter of task {task} came without a trained head",
                remedy="--set head.kind=lda, or an adapter made by memtool train-adapter",
            )
        return classifier

    tasks = list(statistics)
    if settings.scope == "task":
        solved = [
            own(task)
            if settings.kind == "grown"
            else solve_head(settings.kind, statistics[task], settings)
            for task in tasks
        ]
        return RecalledHead.of_tasks(solved, adapter_tasks)
    if settings.kind == "grown":
        return RecalledHead.shared(grown([own(task) for task in tasks]))
    return RecalledHead.shared(solve_head(settings.kind, merged(statistics), settings))


def going_on(learned: RecalledHead, start: RecalledHead) -> RecalledHead:
    """The learned head (one for all tasks), with the rows of `start` for classes new to it."""
    device = start.weight.device
    parts = [LinearClassifier(each.weight[0], each.bias[0]) for each in (start, learned.to(device))]
    return RecalledHead.shared(grown(parts))


def grown(heads: Sequence[LinearClassifier]) -> LinearClassifier:
    """One head in which each class has the row of the last head that knows it."""
    weight, bias = heads[0].weight.clone(), heads[0].bias.clone()
    for head in heads[1:]:
        known = torch.isfinite(head.bias)
        weight[known], bias[known] = head.weight[known], head.bias[known]
    return LinearClassifier(weight, bias)


def averaged(heads: Sequence[LinearClassifier]) -> LinearClassifier:
    """One head in which each class has the mean of its rows in the heads that know it."""
    known = torch.stack([torch.isfinite(head.bias) for head in heads])
    count = known.sum(dim=0).clamp_min(1)
    weight = torch.stack([head.weight for head in heads]) * known.unsqueeze(-1)
    bias = torch.stack([head.bias.masked_fill(~torch.isfinite(head.bias), 0.0) for head in heads])
    return LinearClassifier(
        weight.sum(dim=0) / count.unsqueeze(-1),
        (bias.sum(dim=0) / count).masked_fill(~known.any(dim=0), -torch.inf),
    )


def merged(statistics: Mapping[int, FeatureStatistics]) -> FeatureStatistics:
    """The moments of all tasks together."""
    parts = list(statistics.values())
    whole = FeatureStatistics(parts[0].dim, parts[0].classes)
    for part in parts:
        whole.merge(part)
    return whole
