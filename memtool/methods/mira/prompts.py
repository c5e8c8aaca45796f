"""MIRA on prompts: whole adapters of a language model, mixed by what is asked.

    look         what the frozen model sees in a prompt, at the places of `memory.look_at`
    keep         the moments of what the prompts of a task look like
    keys         in closed form, by linear discriminant analysis over the adapters
    weights      the separation of [look, 1] · key: under softmax the posterior of the tasks

One look decides for all blocks (`memory.scope` model), and the weights stay while a prompt is
answered. Adapters may have any ranks, targets and scalings; those that are used are read.
"""

from __future__ import annotations

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
from memtool.memories.separation import separation
from memtool.methods.attached import Attached
from memtool.methods.explanation import Explanation
from memtool.methods.export import config_blob, new_folders, require_new
from memtool.methods.mira.collection import collect
from memtool.methods.mira.moments import PromptState, digest_of, put_keys, tasks_in
from memtool.methods.records import number_of, recorded, task_name, task_of
from memtool.methods.results import RetrieveResult, WriteResult
from memtool.methods.routed.attached import RoutedTexts
from memtool.methods.routed.memory import (
    LEAST,
    Kept,
    RoutedMemory,
    Routing,
)
from memtool.methods.routed.method import Routed
from memtool.sections import MemorySettings
from memtool.streams.task import Images, Task, Texts
from memtool.tensor_bytes import read_arrays


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
            "count": torch.tensor([len(looks)]),
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
        self.require_same_look(state)
        known = tasks_in(view, view.adapters, new)
        keyed = tuple(r.id for r in view.adapters if task_of(r) in known)
        if not keyed:
            raise DataError(
                "no prompts are known of any adapter in memory, so that none can be chosen by one",
                remedy="memtool import DIR --base MODEL --prompts FILE",
            )
        if state is not None and view.keys() is not None:
            digest = digest_of(view, view.adapters, new)
            if (state.adapters, state.moments) == (keyed, digest):
                return None
        return partial(put_keys, view=view, new=new, look_at=self.settings.places)

    def require_same_look(self, state: PromptState | None) -> None:
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

    def remedy_in(self, view: memtool_stores.MemoryView) -> str:
        """What helps where a version can recall nothing."""
        collected = any("collection" in record.meta for record in view.adapters)
        if collected and not tasks_in(view, view.adapters, {}):
            return "memtool import DIR --base MODEL --prompts FILE, then memtool consolidate"
        return super().remedy_in(view)

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
        if subject.get("task") is not None:
            self._require_texts(str(subject.get("version", "HEAD")))
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

    def explain(self, **subject: Any) -> Explanation:
        """As `Routed.explain`. Raises ConfigError for a task that no stream has texts of."""
        if subject.get("task") is not None:
            self._require_texts(str(subject.get("version", "HEAD")))
        return super().explain(**subject)

    def evaluate(self, **given: Any) -> Record:
        """As `Routed.evaluate`. Raises ConfigError where no stream has the adapters' tasks."""
        self._require_texts(str(given.get("version", "HEAD")))
        return super().evaluate(**given)

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """As `Routed.measure`. Raises ConfigError where no stream has the adapters' tasks."""
        self._require_texts(version)
        return super().measure(version, tasks, setting)

    def _require_texts(self, version: str) -> None:
        """Raise ConfigError for a collection whose tasks no stream was named for."""
        view = self.workspace.store.view(self.workspace.version_of(version))
        if not self.config.stream.names_texts and any(
            "collection" in record.meta for record in view.adapters
        ):
            raise ConfigError(
                "a collection of adapters brings no texts to be measured on",
                expected="a stream of texts whose tasks are called as the adapters",
                remedy="--set stream.source=FILE.yaml",
            )

    def shown(self, view: memtool_stores.MemoryView, tasks: Sequence[int]) -> list[Task]:
        """The tasks of the stream that bear the names of these; numbered as in the memory.

        Those that were forgotten are among them: how well their prompts are answered then.
        """
        rows = sorted(view.catalog.records.values(), key=lambda record: record.live)
        names = {number_of(record): task_name(record) for record in rows}
        return [replace(self.workspace.task(names[number]), number=number) for number in tasks]

    def _require_same_task(self, record: memtool_stores.AdapterRecord) -> None:
        """Nothing: tasks are known by their names here, by which `shown` finds their texts."""


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
    config = read_arrays(*config_blob(view, record), config="uint8 c")
    found = parse_peft(view.export(record.id), config["config"].bits.tobytes(), sites, where)
    return OneAdapter(found.layout, found.value.float(), found.scaling)
