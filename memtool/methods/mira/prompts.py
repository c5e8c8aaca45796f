"""MIRA on prompts: whole adapters of a language model, mixed by what is asked.

    look         what is seen in a prompt, at the places of `memory.look_at`: by the frozen model,
                 or under the adapters of the first task (`memory.look_under`)
    keep         the moments of what the prompts of a task look like
    keys         in closed form, by linear discriminant analysis over the adapters
    weights      the separation of [look, 1] · key: under softmax the posterior of the tasks

`memory.scope` says whose weights they are: one look decides for all blocks (model), or every block
has keys for its own part of the look (block); both stay while a prompt is answered. Under token
there is no look ahead: every token is weighed as it comes, in every block (`tokens`). Adapters may
have any ranks, targets and scalings; those that are used are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import memtool_stores
from memtool.adapters.peft_files import write_peft
from memtool.adapters.stock import OneAdapter, Stock, mixed_by_block
from memtool.adapters.values import AdapterValues
from memtool.devices import sent
from memtool.errors import ConfigError, CorruptError, DataError
from memtool.evaluation.record import Record, Row
from memtool.learning.looks import PromptLook, columns_of, looks_of, token_looks
from memtool.memories.separation import SeparationFunction, separation
from memtool.methods.attached import Attached
from memtool.methods.explanation import Explanation
from memtool.methods.export import new_folders, require_new
from memtool.methods.mira.ask import added_up, asked, joined
from memtool.methods.mira.collection import collect, few
from memtool.methods.mira.cost import cost_of
from memtool.methods.mira.first import first_of, first_records
from memtool.methods.mira.moments import (
    PromptState,
    digest_of,
    moments_of,
    put_keys,
    tasks_in,
)
from memtool.methods.mira.peft_rows import peft_rows, require_peft
from memtool.methods.mira.prompt_reach import WITNESSES, novelty_of, witnesses
from memtool.methods.mira.refine import refined
from memtool.methods.mira.tokens import TokenRouting
from memtool.methods.records import number_of, recorded, task_name, task_of
from memtool.methods.results import RetrieveResult, WriteResult
from memtool.methods.routed.attached import RoutedTexts
from memtool.methods.routed.memory import LEAST, Kept, RoutedMemory, Routing
from memtool.methods.routed.method import Routed
from memtool.methods.stored_values import stored_adapter
from memtool.sections import MemorySettings
from memtool.streams.task import Images, Stream, Task, Texts, spread

_log = logging.getLogger(__name__)

MOST_TOKENS, LEAST_ROWS = 4096, 16
"""Tokens of an adapter's example prompts that are looked at, at most; and rows, at least."""

MOST_NUMBERS = 2**20
"""Numbers of what blocks see apart that are looked at of an adapter: more are some rows of them."""


class PromptMemory(Routed):
    """MIRA over a language model."""

    name: ClassVar[str] = "mira"
    reads: ClassVar[tuple[str, ...]] = ("texts",)
    consolidates: ClassVar[str | None] = "keys"
    rivals: ClassVar[tuple[str, ...]] = ("peft",)

    @property
    def settings(self) -> MemorySettings:
        """How keys and prompts become weights."""
        return self.config.memory

    def require_able(self) -> None:
        """As `Method.require_able`: the blocks that are looked at."""
        self.look.blocks(self.workspace.backbone.depth)

    @property
    def scope(self) -> str:
        """As `memory.scope`."""
        return self.settings.scope

    @property
    def look(self) -> PromptLook:
        """At the places of `memory.look_at`; every block at its own, but under scope model.

        It says how wide that is; `look_in` has the adapters that are looked under.
        """
        return PromptLook.of(self.settings)

    def first_in(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """Ids of the adapters that a version is looked under; none where it is the frozen model."""
        if "first" not in self.look.passes:
            return ()
        state = PromptState.load(view)
        return first_of(view, state.first if state is not None else ())

    def look_in(self, view: memtool_stores.MemoryView) -> PromptLook:
        """The look of a version. Raises MismatchError where it does not hold what it needs."""
        if "first" not in self.look.passes:
            return self.look
        records = first_records(view, self.first_in(view))
        return replace(self.look, first=self.values_in(view, records))

    @property
    def _prefix(self) -> bool:
        """Whether a token sees all tokens so far."""
        return "prefix" in self.settings.places

    @property
    def state(self) -> PromptState:
        """How prompts are looked at here, without keys."""
        settings, learn = self.settings, self.config.consolidate
        return PromptState(
            look_at=settings.places,
            look_under=settings.look_under,
            scope=settings.scope,
            clusters=settings.clusters,
            chat=self.config.text.chat,
            apart=self.look.own(self.workspace.backbone),
            epochs=learn.epochs,
            lr=learn.lr if learn.epochs else None,
        )

    @property
    def key_epochs(self) -> int:
        """Epochs in which keys learn on from those in closed form."""
        return self.config.consolidate.epochs

    def cost(self, *, numbers: int, parameters: int, tokens: int) -> Mapping[str, Any]:
        """As `Method.cost`, of all tasks of the stream."""
        tasks = len(self.workspace.stream.tasks)
        found = cost_of(
            self.config, tasks=tasks, numbers=numbers, parameters=parameters, tokens=tokens
        )
        return asdict(found)

    # What a task leaves ---------------------------------------------------------------------

    def rows_of(self, samples: Texts, look: PromptLook) -> Tensor:
        """What keys are solved from: a row for each prompt, or for tokens of them (n, d).

        Bounded where every block sees something of its own, which is wide.
        """
        work, width = self.workspace, look.width(self.workspace.backbone)
        if self.scope == "model":
            return looks_of(work, samples.prompts, look)
        most = max(LEAST_ROWS, MOST_NUMBERS // width)
        if self.scope == "token":
            some = min(MOST_TOKENS, most)
            return token_looks(work, samples.prompts, some, prefix=self._prefix)
        return looks_of(work, spread(samples, most).prompts, look)

    def keep(self, looks: Tensor) -> Mapping[str, Tensor]:
        """The moments of what prompts or tokens look like (n, d), in `memory.clusters` clusters."""
        own = self.look.own(self.workspace.backbone)
        alone = own is not None and own[0] * own[1] == looks.shape[1]
        apart = own[1] if own is not None and alone else None
        return moments_of(looks, self.settings.clusters, self.workspace.seed, apart)

    def kept_of(self, samples: Images | Texts, look: PromptLook) -> Mapping[str, Tensor]:
        """Those of prompts, and what tells how unlike them others are."""
        assert isinstance(samples, Texts)
        rows = self.rows_of(samples, look)
        seen = looks_of(self.workspace, spread(samples, WITNESSES).prompts, look)
        return {**self.keep(rows), **witnesses(seen)}

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
        found = PromptState.load(view)
        self.require_same_look(found)
        state = self.state.model_copy(update={"first": self.first_in(view)})
        known = tasks_in(view, view.adapters, new)
        keyed = tuple(r.id for r in view.adapters if task_of(r) in known)
        if not keyed:
            raise DataError(
                "no prompts are known of any adapter in memory, so that none can be chosen by one",
                remedy="memtool import DIR --base MODEL --prompts FILE",
            )
        if found is not None and view.keys() is not None:
            digest = digest_of(view, view.adapters, new)
            same = (found.epochs, found.lr) == (state.epochs, state.lr)
            if same and (found.adapters, found.moments) == (keyed, digest):
                return None
        refine = partial(refined, self, view) if state.epochs else None
        return partial(put_keys, view=view, new=new, state=state, refine=refine)

    def require_same_look(self, found: PromptState | None) -> None:
        """What prompts looked like in one way cannot be compared with another way later."""
        if found is None:
            return
        here = self.settings
        for name, now, then in (
            ("memory.scope", here.scope, found.scope),
            ("memory.look_at", ",".join(here.places), ",".join(found.look_at)),
            ("memory.look_under", here.look_under, found.look_under),
            ("memory.clusters", here.clusters, found.clusters),
            ("text.chat", self.config.text.chat, found.chat),
        ):
            if now != then:
                raise ConfigError(
                    f"{name} is {now}, but prompts were looked at under {then}",
                    remedy=f"--set {name}={then}, or another --store",
                )

    # How a memory is read -------------------------------------------------------------------

    def routing(
        self,
        values: AdapterValues | Stock,
        owners: Sequence[int],
        kept: Sequence[Kept],
        look: PromptLook,
    ) -> Routing:
        """The keys over adapters; asked by prompts, or by tokens as they pass."""
        own = look.own(self.workspace.backbone)
        memories = None if own is None else own[0]
        made = Routing(values, owners, kept, self.weights, self.name, look, memories)
        if self.scope != "token":
            return made
        dim = self.workspace.backbone.dim
        return TokenRouting(made, self.separate, dim, prefix=self._prefix)

    @property
    def separate(self) -> SeparationFunction:
        """How scores (..., keys) become weights."""
        settings = self.settings
        name = "max" if settings.routing == "lda" else settings.separation
        return separation(name, beta=settings.beta, topk=settings.topk)

    def weights(self, looks: Tensor, kept: Sequence[Kept]) -> Tensor:
        """The weights of inputs that look like (n, d): (n, tasks).

        (n, blocks, tasks) where every block has keys. The keys of a task add up.
        """
        keys, owners = joined([one["key"] for one in kept])
        own = self.look.own(self.workspace.backbone)
        columns = sent(columns_of(own, looks.shape[1]), looks.device)
        if keys.shape[-1] != columns.shape[1] + 1:
            raise CorruptError(
                f"keys of {keys.shape[-1] - 1} numbers for prompts that look like "
                f"{columns.shape[1]}",
                remedy="memtool verify",
            )
        found = added_up(self.separate(asked(looks[:, columns], keys)), owners, len(kept))
        return found.squeeze(1) if own is None else found

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
        """The keys (memories, m, d + 1) of each of these tasks."""
        keys, state = view.keys(), PromptState.load(view)
        assert keys is not None
        assert state is not None
        self.require_same_look(state)
        each = state.rows or (1,) * len(state.adapters)  # before an adapter could have several
        rows = dict(zip(state.adapters, each, strict=False))
        most = max(rows.values(), default=0)
        if len(rows) != len(state.adapters) or min(rows.values()) < 1 or keys.shape[2] % most:
            raise CorruptError(
                f"keys of {keys.shape[2]} numbers an adapter, {list(state.rows)} of each",
                expected="as many for each of them",
                remedy="memtool verify",
            )
        lm = self.workspace.backbone
        seen = columns_of(self.look.own(lm), self.look.width(lm))
        if (len(keys), keys.shape[2] // most) != (len(seen), seen.shape[1] + 1) or not np.isfinite(
            keys
        ).all():
            raise CorruptError(
                f"{len(keys)} keys of {keys.shape[2] // most - 1} numbers, perhaps not finite",
                expected=f"{len(seen)} of {seen.shape[1]}, as prompts are looked at",
                remedy="memtool verify",
            )
        found: dict[int, Kept] = {}
        for place, record in enumerate(view.adapters[: keys.shape[1]]):
            if count := rows.get(record.id, 0):
                own = torch.from_numpy(keys[:, place].copy()).unflatten(1, (most, -1))
                found.setdefault(task_of(record), {"key": own[:, :count]})
        return [found[task] for task in tasks]

    def values_in(
        self, view: memtool_stores.MemoryView, records: Sequence[memtool_stores.AdapterRecord]
    ) -> Stock:
        """The adapters of these records, read when they are used."""
        layout, sites = self.workspace.layout, self.workspace.backbone.all_sites

        def read(number: int) -> OneAdapter:
            return stored_adapter(view, records[number], layout, sites)

        anywhere = any(record.ragged for record in records)
        return Stock(len(records), sites, read, 0 if anywhere else layout.blocks[0])

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
            self._require_one_mixture()
        if subject.get("task") is not None:
            self._require_texts(str(subject.get("version", "HEAD")))
        result = super().retrieve(**subject)
        if out is None:
            return result
        memory = self.read(subject.get("version", "HEAD"))
        weights = torch.tensor(result.blocks)
        used = (weights > LEAST).any(dim=0).nonzero()[:, 0]
        stock = memory.routing.values
        assert isinstance(stock, Stock)
        one = mixed_by_block(stock.take(used.tolist()), weights[:, used])
        lm = self.workspace.backbone
        with new_folders(out) as (folder,):
            write_peft(
                folder,
                one.value,
                one.layout,
                alpha=one.layout.rank,
                base_model=lm.name.removeprefix("hf:"),
                transposed=lm.transposed,
            )
        return result.model_copy(update={"out": out})

    def _require_one_mixture(self) -> None:
        """Raise ConfigError where there is no one mixture, but as many as tokens."""
        if self.scope == "token":
            raise ConfigError(
                "--out under memory.scope token: every token has a mixture of its own",
                expected="a memory whose weights are those of a prompt (scope model or block)",
                remedy="memtool export, for the adapters one by one",
            )

    def novelty(self, view: memtool_stores.MemoryView, prompt: str) -> float | None:
        """How unlike all example prompts one is: 99 of 100 of them lie within 1."""
        return self.novelties(view, [prompt])[0]

    def novelties(
        self, view: memtool_stores.MemoryView, prompts: Sequence[str]
    ) -> list[float | None]:
        """As `novelty`, of many prompts."""
        found = novelty_of(view, looks_of(self.workspace, prompts, self.look_in(view)))
        return [None] * len(prompts) if found is None else found.tolist()

    def by_token(
        self, memory: RoutedMemory, prompt: str, block: int | None
    ) -> tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]:
        """As `Routed.by_token`. Raises ConfigError for a block that the model does not have."""
        lm, routing = self.workspace.backbone, memory.routing
        if not isinstance(routing, TokenRouting):
            return (), ()
        if block is not None and block >= lm.depth:
            raise ConfigError(
                f"--block {block} of a model of {lm.depth} blocks", expected=f"0 to {lm.depth - 1}"
            )
        tokens = lm.encode([prompt]).tokens.to(lm.device)
        with self.workspace.engine.autocast():
            found = routing.by_token(lm, tokens)[0].float().cpu()
        shown = found.mean(dim=0) if block is None else found[block]
        texts = lm.token_texts(tokens[0].tolist())
        return tuple(texts), tuple(tuple(row) for row in shown.tolist())

    def explain(self, **subject: Any) -> Explanation:
        """As `Routed.explain`. Raises ConfigError for a task that no stream has texts of."""
        if subject.get("task") is not None:
            self._require_texts(str(subject.get("version", "HEAD")))
        return super().explain(**subject)

    def evaluate(self, **given: Any) -> Record:
        """As `Routed.evaluate`, on the tasks that the stream has; the other adapters distract.

        `rivals` peft also measures what PEFT makes of the same adapters. Raises ConfigError where
        the stream has no task of the memory, and where peft is not installed.
        """
        if given.get("rivals"):
            require_peft(self.config.backbone)
        self._require_texts(str(given.get("version", "HEAD")))
        return super().evaluate(**given)

    def rival_rows(
        self, rivals: Sequence[str], memory: RoutedMemory, tasks: Sequence[Task]
    ) -> list[Row]:
        """Those of peft, where it is named."""
        return peft_rows(self.workspace, memory, tasks) if "peft" in rivals else []

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
                remedy="--set stream.source=FILE, of eval and bisect --texts FILE: a stream, or "
                "FILE.jsonl of lines with adapter, prompt and answer",
            )

    def shown(self, view: memtool_stores.MemoryView, tasks: Sequence[int]) -> list[Task]:
        """The tasks of the stream that bear the names of these, or of one of their adapters.

        They are numbered as in the memory, in its order; those that were forgotten are among them:
        how well their prompts are answered then. Raises ConfigError where there is none.
        """
        rows = sorted(view.catalog.records.values(), key=lambda record: record.live)
        numbers = {record.name: number_of(record) for record in rows}
        numbers |= {task_name(record): number_of(record) for record in rows}
        stream = self.workspace.stream
        found = [
            replace(task, number=number)
            for task in stream.tasks
            if (number := numbers.get(task.name)) in tasks and number is not None
        ]
        if not found:
            raise ConfigError(
                f"no task of {stream.name} is called as an adapter with a key",
                expected=f"one of {few([n for n, number in numbers.items() if number in tasks])}",
            )
        self.workspace.once("said what is not measured", lambda: _say_unmeasured(stream, found))
        return sorted(found, key=lambda task: tasks.index(task.number))

    def _require_same_task(self, record: memtool_stores.AdapterRecord) -> None:
        """Nothing: tasks are known by their names here, by which `shown` finds their texts."""


def _say_unmeasured(stream: Stream, found: Sequence[Task]) -> None:
    """Say which tasks of a stream are not measured."""
    measured = {task.name for task in found}
    others = [task.name for task in stream.tasks if task.name not in measured]
    if others:
        _log.warning("not measured, as no adapter with a key is called so: %s", few(others))
