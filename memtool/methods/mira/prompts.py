"""MIRA on prompts: whole adapters of a language model, mixed by what is asked.

    look         what the frozen model sees in a prompt, at the places of `memory.look_at`
    keep         the moments of what the prompts of a task look like
    keys         in closed form, by linear discriminant analysis over the adapters
    weights      the separation of [look, 1] · key: under softmax the posterior of the tasks

One look decides for all blocks (`memory.scope` model), and the weights stay while a prompt is
answered. Adapters may have any ranks, targets and scalings; those that are used are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import memtool_stores
from memtool.adapters.layout import Layout, Site
from memtool.adapters.peft_files import parse_peft, write_peft
from memtool.adapters.stock import OneAdapter, Stock, mixed
from memtool.backbones.causal_lm import CAUSAL_LM_TARGETS
from memtool.errors import ConfigError, CorruptError, DataError
from memtool.evaluation.record import Record
from memtool.learning.looks import PromptLook
from memtool.memories.moments import Moments
from memtool.memories.separation import separation
from memtool.methods.attached import Attached
from memtool.methods.export import new_folders, require_new
from memtool.methods.in_store import StoredState
from memtool.methods.mira.collection import collect
from memtool.methods.records import recorded, task_of
from memtool.methods.results import RetrieveResult, WriteResult
from memtool.methods.routed.attached import RoutedTexts
from memtool.methods.routed.memory import (
    LEAST,
    Kept,
    RoutedMemory,
    Routing,
    kept_blob,
    kept_bytes,
    known_tasks,
    read_kept,
)
from memtool.methods.routed.method import Routed
from memtool.sections import MemorySettings
from memtool.streams.task import Images, Task, Texts
from memtool.tensor_bytes import read_arrays

SHRINKAGE = 0.1
"""Of the covariance within tasks, toward a multiple of the identity.

Chosen on the validation prompts of TRACE, from 200 and from 30 prompts a task, among 1e-3 to 0.3.
"""


class PromptState(StoredState):
    """How prompts are looked at, and whose keys there are: the JSON blob `prompt-keys`.

    `adapters` are the ids behind the keys, in their order: those that prompts were known of;
    `moments` is the hash of what the keys were solved from.
    """

    blob: ClassVar[str] = "prompt-keys"

    schema_version: int = 1
    look_at: tuple[str, ...]
    adapters: tuple[str, ...]
    moments: str


class PromptMemory(Routed):
    """MIRA over a language model."""

    name: ClassVar[str] = "mira"
    reads: ClassVar[tuple[str, ...]] = ("texts",)
    consolidates: ClassVar[str | None] = "keys"

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All that the model offers to an adapter, whatever those that are trained here adapt."""
        found: tuple[Site, ...] = tuple(self.workspace.backbone.sites(CAUSAL_LM_TARGETS))
        return found

    @property
    def settings(self) -> MemorySettings:
        """How keys and prompts become weights."""
        return self.config.memory

    @property
    def look(self) -> PromptLook:
        """At the places of `memory.look_at`."""
        return PromptLook(self.settings.places)

    # What a task leaves ---------------------------------------------------------------------

    def keep(self, looks: Tensor) -> Mapping[str, Tensor]:
        """Count, mean (d,) and a root (min(n, d), d) of what prompts look like (n, d).

        rootᵀ root is the scatter Σ (x − mean)(x − mean)ᵀ: of few prompts much less than d x d.
        """
        wide = looks.double()
        mean = wide.mean(dim=0)
        root = torch.linalg.qr(wide - mean, mode="r").R
        return {
            "count": torch.tensor(len(looks)),
            "mean": mean.float(),
            "root": root.float(),
        }

    def samples_of(self, view: memtool_stores.MemoryView, number: int) -> Images | Texts | None:
        """The training prompts of a task; None of an adapter that came without prompts."""
        of_task = [record for record in view.adapters if task_of(record) == number]
        if all("collection" in record.meta for record in of_task):
            return None
        return super().samples_of(view, number)

    def learnt(
        self, view: memtool_stores.MemoryView, new: Mapping[int, Kept]
    ) -> Callable[[memtool_stores.Transaction], None] | None:
        """Keys of all adapters of which prompts are known, solved together."""
        state = PromptState.load(view)
        self._require_same_look(state)
        known = {*known_tasks(view), *new}
        keyed = tuple(r.id for r in view.adapters if task_of(r) in known)
        if not keyed:
            raise DataError(
                "no prompts are known of any adapter in memory, so that none can be chosen by one",
                remedy="memtool import DIR --base MODEL --prompts FILE",
            )
        if state is not None and view.keys() is not None:
            solved = (state.adapters, state.moments)
            if not new and solved == (keyed, _digest(view, dict.fromkeys(known))):
                return None
        return partial(_put_keys, view=view, new=new, look_at=self.settings.places)

    def _require_same_look(self, state: PromptState | None) -> None:
        """What prompts looked like in one way cannot be compared with another way later."""
        places = self.settings.places
        if state is not None and state.look_at != places:
            raise ConfigError(
                f"memory.look_at is {','.join(places)}, but prompts were looked at by "
                f"{','.join(state.look_at)}",
                remedy=f"--set memory.look_at={','.join(state.look_at)}, or another --store",
            )

    # How a memory is read -------------------------------------------------------------------

    def weights(self, looks: Tensor, kept: Sequence[Kept]) -> Tensor:
        """The weights (n, tasks) of inputs that look like (n, d)."""
        keys = torch.stack([one["key"] for one in kept])
        if keys.shape[1] != looks.shape[1] + 1:
            raise CorruptError(
                f"keys of {keys.shape[1] - 1} numbers for prompts that look like {looks.shape[1]}",
                remedy="memtool verify",
            )
        scores = looks @ keys[:, :-1].T + keys[:, -1]
        settings = self.settings
        name = "max" if settings.routing == "lda" else settings.separation
        return separation(name, beta=settings.beta, topk=settings.topk)(scores)

    def known_in(self, view: memtool_stores.MemoryView) -> tuple[int, ...]:
        """Numbers of the tasks that have keys, in the order written."""
        state = PromptState.load(view)
        if state is None or view.keys() is None:
            return ()
        keyed = {*state.adapters}
        return tuple(dict.fromkeys(task_of(r) for r in view.adapters if r.id in keyed))

    def kept_in(self, view: memtool_stores.MemoryView, tasks: Sequence[int]) -> list[Kept]:
        """The key of each of these tasks."""
        keys = view.keys()
        assert keys is not None
        found: dict[int, Kept] = {}
        for record, key in zip(view.adapters, keys[0], strict=False):
            found.setdefault(task_of(record), {"key": torch.from_numpy(key.copy())})
        return [found[task] for task in tasks]

    def values_in(
        self, view: memtool_stores.MemoryView, records: Sequence[memtool_stores.AdapterRecord]
    ) -> Stock:
        """The adapters of these records, read when they are used."""
        layout, sites = self.workspace.layout, self.sites

        def read(number: int) -> OneAdapter:
            return stored_adapter(view, records[number], layout, sites)

        return Stock(len(records), sites, read)

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> Attached:
        """A version as a module; with `task` one adapter for every prompt, with a key or not."""
        if task is None:
            return super().attach(version, precision=precision)
        work = self.workspace
        view = work.store.view(work.version_of(version))
        record = recorded(view, task)
        routing = Routing(self.values_in(view, [record]), [0], [{}], self.weights, self.name)
        routing.only(0)
        number = task_of(record)
        memory = RoutedMemory(view.version, view, (number,), (record,), routing, None)
        return RoutedTexts(work.backbone, memory, precision)

    def collect(
        self, places: Sequence[str], prompts: Path | None = None, *, keep_prompts: bool = False
    ) -> WriteResult:
        """Take a collection of adapters in; as `memtool.methods.mira.collection.collect`."""
        metadata = self._metadata("import")
        return collect(self, places, prompts, metadata=metadata, keep_prompts=keep_prompts)

    def retrieve(self, *, out: Path | None = None, **subject: Any) -> RetrieveResult:
        """As `Routed.retrieve`; `out` is a folder for the mixture, as one PEFT adapter.

        It is the sum of all adapters by the mean weights, exact: all their ranks side by side.
        """
        if out is not None:
            require_new(out)
        result = super().retrieve(**subject)
        if out is None:
            return result
        memory = self.read(subject.get("version", "HEAD"))
        weights = torch.tensor([one.coefficient for one in result.adapters])
        used = (weights > LEAST).nonzero()[:, 0]
        stock = memory.routing.values
        assert isinstance(stock, Stock)
        one = mixed(stock.take(used.tolist()), weights[used])
        base = self.workspace.backbone.name.removeprefix("hf:")
        with new_folders(out) as (folder,):
            write_peft(folder, one.value, one.layout, alpha=one.layout.rank, base_model=base)
        return result.model_copy(update={"out": out})

    def evaluate(self, **given: Any) -> Record:
        """As `Routed.evaluate`. Raises ConfigError where no stream has the adapters' tasks."""
        view = self.workspace.store.view(self.workspace.version_of(given.get("version", "HEAD")))
        source = self.config.stream.source
        if source == "digits" and any("collection" in r.meta for r in view.adapters):
            raise ConfigError(
                "a collection of adapters brings no texts to be measured on",
                expected="a stream of texts whose tasks are called as the adapters",
                remedy="--set stream.source=FILE.yaml",
            )
        return super().evaluate(**given)

    def shown(self, view: memtool_stores.MemoryView, tasks: Sequence[int]) -> list[Task]:
        """The tasks of the stream that bear the names of these; numbered as in the memory."""
        names = {task_of(r): str(r.meta.get("task_name") or r.name) for r in view.adapters}
        return [replace(self.workspace.task(names[number]), number=number) for number in tasks]

    def _require_same_task(self, record: memtool_stores.AdapterRecord) -> None:
        if "collection" not in record.meta:
            super()._require_same_task(record)


def stored_adapter(
    view: memtool_stores.MemoryView,
    record: memtool_stores.AdapterRecord,
    layout: Layout,
    sites: Sequence[Site],
) -> OneAdapter:
    """An adapter of a store; `layout` is that of rows, `sites` all that the model offers."""
    if not record.ragged:
        value = torch.from_numpy(view.value(record.id).copy())
        return OneAdapter(layout, value, float(record.scaling))
    where = f"adapter {record.name!r} in memory"
    blob = str(record.meta.get("peft"))
    config = read_arrays(view.blob(blob), f"blob {blob!r}", config="uint8 c")
    found = parse_peft(view.export(record.id), config["config"].bits.tobytes(), sites, where)
    return OneAdapter(found.layout, found.value.float(), found.scaling)


# Keys -------------------------------------------------------------------------------------------


def solved_keys(kept: Sequence[Kept]) -> Tensor:
    """Keys (tasks, d + 1), float32, of what was kept of each task.

    [look, 1] · key is log p(task | look) up to a term that all tasks share, of Gaussian looks of
    one covariance. Raises DataError where no task has two prompts that differ.
    """
    width = kept[0]["mean"].shape[0]
    moments = Moments(1, width, len(kept))
    for place, one in enumerate(kept):
        count, mean, root = float(one["count"]), one["mean"].double(), one["root"].double()
        moments.counts[place] = count
        moments.sums[0, place] = count * mean
        moments.second[0] += root.T @ root + count * torch.outer(mean, mean)
    try:
        rule = moments.lda(SHRINKAGE, equal_priors=True)
    except DataError as error:
        raise DataError(
            "no adapter has two prompts that differ",
            expected="a few dozen example prompts of each",
            remedy="--prompts FILE with more of them",
        ) from error
    return torch.cat([rule.weight[0], rule.bias[0].unsqueeze(1)], dim=1).float()


def _put_keys(
    txn: memtool_stores.Transaction,
    *,
    view: memtool_stores.MemoryView,
    new: Mapping[int, Kept],
    look_at: tuple[str, ...],
) -> None:
    """Give every live adapter of which prompts are known its key, solved with those of all."""
    blobs = {*view.blobs()}
    kept: dict[int, Kept] = {}
    live = txn.adapters
    for record in live:
        number = task_of(record)
        if number in new:
            kept[number] = new[number]
        elif kept_blob(number) in blobs and number not in kept:
            kept[number] = read_kept(view, kept_blob(number))
    if not kept:
        txn.set_keys(None)
        if PromptState.blob in blobs:
            txn.delete_blob(PromptState.blob)
        return
    keys = solved_keys(list(kept.values()))
    rows = dict(zip(kept, keys, strict=True))
    none = torch.zeros_like(keys[0])
    found = torch.stack([rows.get(task_of(record), none) for record in live])
    txn.set_keys(found.unsqueeze(0).contiguous().numpy())
    keyed = tuple(record.id for record in live if task_of(record) in rows)
    digest = _digest(view, {number: new.get(number) for number in kept})
    PromptState(look_at=look_at, adapters=keyed, moments=digest).put(txn)


def _digest(view: memtool_stores.MemoryView, tasks: Mapping[int, Kept | None]) -> str:
    """The hash of what is kept of tasks, as here or, where None, as in the blobs of a version."""
    parts = [
        view.state.blobs[kept_blob(number)]
        if one is None
        else hashlib.sha256(kept_bytes(one, PromptMemory.name)).hexdigest()
        for number, one in sorted(tasks.items())
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def solve_without(
    txn: memtool_stores.Transaction, view: memtool_stores.MemoryView, gone: set[str]
) -> None:
    """In a transaction that takes adapters away: the keys of the others, solved without them."""
    state = PromptState.load(view)
    if state is None or view.keys() is None or not gone & {*state.adapters}:
        return
    _put_keys(txn, view=view, new={}, look_at=state.look_at)
