"""MoRAM on a stream of texts: a memory of rank-1 atoms for a language model, task after task.

    adapt        train r new atoms at every adapted map, through the gate, on top of those in memory
    write        append them, one version a task
    consolidate  nothing to learn: a language model keeps its own head
    retrieve     which tasks' atoms do the tokens of this prompt choose, and what is the answer?
    evaluate     loss, and with `text.generate` the tasks' metrics, at any version

`Moram` is the same on images, which need a classifier beside the atoms. The gate of a memory is
that which its atoms were trained through: every row of atoms says it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

import memtool_stores
from memtool import __version__
from memtool.adapters.atoms import AtomGate, ModuleAtoms
from memtool.config import Config, MoramSettings, Settings
from memtool.errors import ConfigError, CorruptError, NotFoundError
from memtool.evaluation.record import AtomUse, Record, Row
from memtool.memories.rank1 import Rank1Memory
from memtool.methods.adapt import Adapted
from memtool.methods.as_atoms import loss_as_atoms
from memtool.methods.atom_measure import strongest, use_metrics, used
from memtool.methods.atom_method import AtomMethod
from memtool.methods.atom_state import (
    PAST_INPUTS,
    bank_of,
    digest,
    gate_of,
    past_inputs_of,
    resolved,
)
from memtool.methods.atom_watch import Contributions, Drifts, TaskShares, Watch, watched
from memtool.methods.attached_texts import AttachedTexts
from memtool.methods.exchange import ReadAdapter
from memtool.methods.kept import fingerprint_of, kept
from memtool.methods.method import Trained
from memtool.methods.past_inputs import PastInputs
from memtool.methods.records import task_of
from memtool.methods.results import AsAtoms, AtomsResult, HeadResult, TaskShare
from memtool.methods.text import AtomLearner, TextScores, TextWorkspace, answers, some, text_row
from memtool.progress import Progress
from memtool.streams.text import TextSamples, TextTask

_SCORES = TypeAdapter(TextScores)


@dataclass(frozen=True, eq=False)
class TextSnapshot:
    """The memory at one version, on the device; `tasks` in the order written."""

    version: str
    view: memtool_stores.MemoryView
    tasks: tuple[int, ...]
    bank: Rank1Memory
    settings: MoramSettings
    gate: AtomGate


class TextMoram(AtomMethod[TextTask]):
    """The steps over one configuration and seed."""

    workspace: TextWorkspace

    @classmethod
    def open(cls, config: Config, *, seed: int, progress: Progress | None = None) -> Self:
        """Nothing is read yet: stream, language model and store open when first needed.

        Raises ConfigError for another method than moram.
        """
        if config.method != "moram":
            raise ConfigError(
                f"method {config.method} on a stream of texts (setting trace)",
                expected="method moram",
                remedy="memtool run --preset moram-trace",
            )
        return cls(TextWorkspace(config, seed=seed, progress=progress))

    # Adapt ----------------------------------------------------------------------------------

    def _train(self, task: TextTask, fingerprint: str, checkpoint: Path) -> Trained:
        self._require_settings()
        work = self.workspace
        work.require_fitting([task])
        bank, source, beneath = Rank1Memory(work.layout.sites), "zero", self._beneath_digest(task)
        past = None
        if self.settings.keys == "free":
            past = PastInputs(work.layout, self.config.past.energy)
        if work.has_store:
            view = work.store.view("HEAD")
            self._require_own_kind(view)
            if rows := self._rows_beneath(view, task):
                self._require_same_gate(self._settings_of(view.atom_records[:rows]), self.settings)
                bank = bank_of(view, work.layout, rows)
                source = f"zero on top of {rows} tasks, version {view.version}"
                if past is not None:
                    past = self._past_inputs(view, rows)
        learner = AtomLearner(work, bank, self.gate, past=past)
        fit = learner.learn(task, fingerprint=fingerprint, checkpoint=checkpoint)
        flat = learner.bank.fresh().float().cpu().unsqueeze(0)
        return Trained(Adapted(flat, (), (), fit), source, beneath)

    def _fingerprint(self, task: TextTask) -> str:
        work = self.workspace
        learning = {"prompt_tokens", "answer_tokens", "long_prompts", "dropout"}
        decides: dict[str, Any] = {
            "backbone": work.backbone.sha256,
            "task": [task.number, task.name, task.train.prompts, task.train.answers],
            "epochs": work.epochs(task),
            "targets": work.config.backbone.targets,
            "settings": work.config.model_dump(mode="json", include={"adapter", "train", "moram"}),
            "text": work.config.text.model_dump(mode="json", include=learning),
            "seed": work.seed,
            "beneath": self._beneath_digest(task),
        }
        if self.settings.keys == "free":
            decides["past"] = work.config.past.energy
        return fingerprint_of(decides)

    # Write ----------------------------------------------------------------------------------

    def _append(
        self, txn: memtool_stores.Transaction, adapter: ReadAdapter
    ) -> memtool_stores.AdapterRecord:
        """Append the atoms of a task.

        Raises MismatchError for atoms that were trained on top of others than those in memory.
        """
        work = self.workspace
        self._require_new_task(txn, adapter)
        self._require_trained_here(txn.base, adapter)
        about, rows = self._about(adapter), txn.base.atom_records
        parts = ("adapter", "train", "moram", "text")
        used: dict[str, Settings] = {part: getattr(self.config, part) for part in parts}
        if about is not None:
            used = {part: about.section(part, type(one)) for part, one in used.items()}
        elif rows:  # atoms of which only the values came are read as the memory is
            used["moram"] = self._settings_of(rows)
        given = used["moram"]
        assert isinstance(given, MoramSettings)
        if rows:
            resolved_here = resolved(given, work.layout.rank)
            self._require_same_gate(self._settings_of(rows), resolved_here)
        hyperparameters = {part: one.model_dump(mode="json") for part, one in used.items()}
        meta = {**adapter.meta, "hyperparameters": hyperparameters}
        txn.add_atoms(adapter.name, adapter.value.numpy(), meta)
        record = txn.atom_records[-1]
        if given.keys == "free":
            gate = gate_of(given, work.layout.rank)
            self._count_inputs(txn, adapter, gate, record.scaling)
        return record

    def _compared(self, adapter: ReadAdapter) -> AsAtoms:
        return loss_as_atoms(self.workspace, adapter, self._learner(self.snapshot()))

    def _count_inputs(
        self,
        txn: memtool_stores.Transaction,
        adapter: ReadAdapter,
        gate: AtomGate,
        scaling: float,
    ) -> None:
        """Add the inputs of a task, as the model has them with its atoms, to the past."""
        work, number = self.workspace, int(adapter.meta["task"])
        bank = bank_of(txn.base, work.layout)
        known = len(txn.base.atom_records)
        bank.grow(adapter.value, rank=work.layout.rank, owner=number, scaling=scaling)
        bank.freeze()
        past = past_inputs_of(txn.base, work.layout, self.config.past.energy)
        learner = AtomLearner(work, bank, gate).eval()
        moments = learner.input_moments(past, work.task(str(number)).train)
        past.add(moments, known / len(work.stream.tasks))
        txn.put_blob(PAST_INPUTS, past.to_bytes())

    def learn(self, task: TextTask, *, fresh: bool = False) -> None:
        """Train and write a task, unless its atoms are in memory; `fresh` as in `adapt`.

        Raises ConfigError where another task is in its place, or its atoms were trained with other
        settings, texts or another model.
        """
        work, place = self.workspace, task.number - 1
        records = work.store.view("HEAD").atom_records if work.has_store else ()
        if place >= len(records):
            self.adapt(str(task.number), fresh=fresh)
            self.write([work.adapter_folder / name for name in self.adapter_names(task)])
            return
        if task_of(records[place]) != task.number:
            raise ConfigError(
                f"the memory {work.store_path!r} holds task {task_of(records[place])} in the place "
                f"of task {task.number} {task.name}, which was forgotten or never learned",
                expected="the tasks of the stream, in its order",
                remedy="another --store and --set runs=DIR, or --fresh to begin this one anew",
            )
        known = (records[place].meta.get("provenance") or {}).get("fingerprint")
        if known != self._fingerprint(task):
            raise ConfigError(
                f"the memory {work.store_path!r} holds atoms {records[place].name!r} that were "
                f"trained with other settings, texts or model than task {task.number} {task.name}",
                remedy="another --store and --set runs=DIR, or --fresh to begin this one anew",
            )

    # Consolidate ----------------------------------------------------------------------------

    def consolidate(self) -> HeadResult:
        """Nothing is learned: atoms find themselves, and the model keeps its head."""
        snapshot = self.snapshot()
        return HeadResult(version=snapshot.version, tasks=snapshot.tasks, unchanged=True)

    # Retrieve -------------------------------------------------------------------------------

    def retrieve(
        self, *, task: str | None = None, prompt: str | None = None, version: str = "HEAD"
    ) -> AtomsResult:
        """Which tasks' atoms a prompt, or test prompts of a task, choose; and what comes of it.

        Of a prompt the answer, of a task the loss on these texts. Raises ConfigError for anything
        but one subject.
        """
        snapshot = self.read(version) if task is None else self.snapshot(version)
        subject, texts = self.subject(task, prompt)
        added = Contributions(snapshot.gate)
        shares, blocks = self.shares(snapshot, texts.prompts, [added])
        by_block = shares.double().mean(dim=0)
        loss = None
        if texts.answers:
            learner = self._learner(snapshot)
            loss = learner.loss(learner.lm.encode(texts.prompts, texts.answers))
        records = snapshot.view.atom_records
        return AtomsResult(
            version=snapshot.version,
            subject=subject,
            samples=len(texts.prompts),
            score_norm=snapshot.gate.score_norm,
            topk=snapshot.gate.topk,
            tasks=tuple(
                TaskShare(
                    name=record.name,
                    task=task_of(record),
                    task_name=record.meta.get("task_name"),
                    share=float(share),
                )
                for record, share in zip(records, by_block.mean(dim=0), strict=True)
            ),
            blocks=tuple(tuple(row) for row in by_block.tolist()),
            block_numbers=blocks,
            atoms=strongest(snapshot.view, snapshot.bank, added.means()),
            answer=self.answer(snapshot, texts.prompts[0]) if loss is None else None,
            loss=loss,
        )

    def answer(self, snapshot: TextSnapshot, prompt: str) -> str:
        """The greedy answer to a prompt, without white space around it."""
        work = self.workspace
        with work.engine.autocast():
            return answers(work.backbone, [prompt], snapshot.bank.recall(snapshot.gate))[0]

    def subject(self, task: str | None, prompt: str | None) -> tuple[str, TextSamples]:
        """What a step looks at, and its name: some test texts of a task, or a prompt alone."""
        if (task is None) == (prompt is None):
            raise ConfigError("what should be looked at?", expected="one of --task and --prompt")
        if task is not None:
            chosen = self.workspace.task(task)
            return f"task {chosen.number} {chosen.name}", some(chosen.test)
        assert prompt is not None
        if not prompt.strip():
            raise ConfigError("--prompt is empty", expected="text with a visible character")
        return prompt, TextSamples((prompt,), ())

    def shares(
        self, snapshot: TextSnapshot, prompts: Sequence[str], beside: Sequence[Watch] = ()
    ) -> tuple[Tensor, tuple[int, ...]]:
        """The counted shares (n, blocks, tasks) of prompts, as in `TaskShares`, and the blocks.

        Other watches may look on.
        """
        watch = TaskShares(snapshot.tasks, snapshot.gate)
        found: list[Tensor] = []
        blocks: tuple[int, ...] = ()
        for _ in self.passes(snapshot, (watch, *beside), prompts):
            blocks = watch.blocks
            found.append(watch.taken())
        return torch.cat(found), blocks

    def contributions(self, snapshot: TextSnapshot, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """What every atom adds on average over the tokens of prompts, by site (n,)."""
        watch = Contributions(snapshot.gate)
        for _ in self.passes(snapshot, [watch], prompts):
            pass
        return watch.means()

    def passes(
        self, snapshot: TextSnapshot, watches: Sequence[Watch], prompts: Sequence[str]
    ) -> Iterator[Tensor]:
        """Run prompts through the model and the memory, one by one, before the watches.

        After each its token ids (n,): nothing is padded.
        """
        work = self.workspace

        def watch(atoms: ModuleAtoms, x: Tensor) -> None:
            for one in watches:
                one(atoms, x)

        recall = watched(snapshot.bank, snapshot.gate, watch)
        for prompt in prompts:
            tokens = work.backbone.encode([prompt]).tokens.to(work.engine.device)
            with torch.no_grad(), work.engine.autocast():
                work.backbone.hidden(tokens, recall)
            yield tokens[0]

    # Evaluate -------------------------------------------------------------------------------

    def evaluate(
        self,
        *,
        setting: str | None = None,
        version: str = "HEAD",
        history: bool = False,
        compare: bool = False,
        unseen: bool | None = None,
        command: str | None = None,
        preset: str | None = None,
    ) -> Record:
        """Losses, and scores where texts are generated, on the tests of the tasks in memory.

        `history` also measures the version after each task, and before the first. `unseen` has a
        column for every task of the stream, learned or not. `compare` adds the same atoms without
        a threshold. Raises ConfigError for another setting than trace.
        """
        begin = time.perf_counter()
        self._require_setting(setting)
        work, snapshot = self.workspace, self.snapshot(version)
        shown = [work.task(str(number)) for number in snapshot.tasks]
        if unseen:
            shown += [task for task in work.stream.tasks if task.number not in snapshot.tasks]
        rows = [self._row(snapshot, shown, history=history)]
        if compare and snapshot.gate.threshold > -1:
            rows.append(self._without_threshold(snapshot, shown))
        return self._record(
            rows,
            shown,
            setting="trace",
            version=snapshot.version,
            used=self.config.model_copy(update={"moram": snapshot.settings}),
            mix=None,
            separation=None,
            seconds=time.perf_counter() - begin,
            command=command,
            preset=preset,
        )

    def _row(self, snapshot: TextSnapshot, shown: Sequence[TextTask], *, history: bool) -> Row:
        """The memory on tasks, after each of them or after the last."""
        count = len(snapshot.tasks)
        there = {count: snapshot}
        if history:
            versions = self._history(snapshot.version, snapshot.tasks)
            there = {n: self.snapshot(at) for n, at in versions.items() if n < count} | there
            there[0] = self._empty(snapshot)
        found = {learned: self.scores(there[learned], shown) for learned in sorted(there)}
        row = text_row(self._learner(snapshot), found, seconds=None, tasks=shown)
        if count < 2 or any(place not in there for place in range(count)):
            return row
        use = self.use(snapshot, [there[place + 1] for place in range(count)])
        metrics = {**row.metrics, **use_metrics(use)}
        return row.model_copy(update={"atom_use": use, "metrics": metrics})

    def use(self, snapshot: TextSnapshot, grown: Sequence[TextSnapshot]) -> AtomUse:
        """Drift of the atoms of every task, version by version, and who uses them in the last one.

        `grown` are the versions after each task; some test prompts of a task are looked at.
        """
        drifts, shared = [], []
        told = self.workspace.telling("evaluate: use of atoms", snapshot.tasks)
        for place, number in enumerate(told):
            prompts = some(self.workspace.task(str(number)).test).prompts
            drift = Drifts(number, snapshot.gate, [one.bank for one in grown[place:]])
            for _ in self.passes(grown[place], [drift], prompts):
                pass
            drifts.append(drift.found())
            shared.append(self.shares(snapshot, prompts)[0])
        return used(drifts, shared)

    def _without_threshold(self, snapshot: TextSnapshot, shown: Sequence[TextTask]) -> Row:
        """The same atoms, all kept ones counting."""
        settings = snapshot.settings.model_copy(update={"threshold": -1.0})
        gate = gate_of(settings, self.config.adapter.rank)
        there = replace(snapshot, settings=settings, gate=gate)
        found = {len(snapshot.tasks): self.scores(there, shown)}
        row = text_row(self._learner(there), found, seconds=None, tasks=shown)
        return row.model_copy(update={"id": "moram-all", "label": "MoRAM, no threshold"})

    def scores(self, snapshot: TextSnapshot, tasks: Sequence[TextTask]) -> TextScores:
        """What the memory reaches on tasks; measured once, and kept under `runs`."""
        work = self.workspace
        decides = [
            __version__,
            digest(snapshot.view.atom_records[: len(snapshot.tasks)]),
            work.backbone.sha256,
            work.stream.fingerprint,
            [task.number for task in tasks],
            snapshot.settings.model_dump(mode="json"),
            work.config.text.model_dump(mode="json"),
            work.config.backbone.targets,
            work.engine.precision,
            str(work.engine.device),
        ]
        name = f"moram-after-{len(snapshot.tasks)}-{fingerprint_of(decides)[:16]}.json"
        file = work.config.runs / "scores" / name
        return kept(file, _SCORES, work.engine, lambda: self.measured(snapshot, tasks))

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version, means over the given tasks: loss, faa, task_accuracy.

        faa is that of the tasks' metrics, with `text.generate` only. A prompt counts as inferred
        right when the atoms of its task have most weight. Errors as `evaluate`.
        """
        self._require_setting(setting)
        snapshot = self.snapshot(version)
        shown = [self.workspace.task(str(number)) for number in tasks]
        scores = self.scores(snapshot, shown)
        found = {"loss": sum(scores.losses) / len(shown)}
        if scores.scores is not None:
            found["faa"] = sum(scores.scores) / len(shown)
        right: list[bool] = []
        for task in shown:
            shares, _ = self.shares(snapshot, some(task.test).prompts)
            most = shares.mean(dim=1).argmax(dim=1).tolist()
            right += [snapshot.tasks[place] == task.number for place in most]
        return {**found, "task_accuracy": sum(right) / len(right)}

    def _require_setting(self, setting: str | None) -> None:
        if setting not in (None, "trace"):
            raise ConfigError(
                f"setting {setting!r} on a stream of texts", expected="trace: no task is known"
            )

    def measured(self, snapshot: TextSnapshot, tasks: Sequence[TextTask]) -> TextScores:
        """What atoms reach on tasks, whether they are in a store or not."""
        return self._learner(snapshot).measure(tasks)

    def _learner(self, snapshot: TextSnapshot) -> AtomLearner:
        """What measures a memory."""
        seen = [self.workspace.task(str(number)) for number in snapshot.tasks]
        return AtomLearner(self.workspace, snapshot.bank, snapshot.gate, seen)

    # Shared ---------------------------------------------------------------------------------

    def snapshot(self, version: str = "HEAD") -> TextSnapshot:
        """The memory at a version, of the tasks of this stream; MismatchError for another."""
        found = self.read(version)
        for record in found.view.atom_records:
            self._require_same_task(record)
        return found

    def read(self, version: str = "HEAD") -> TextSnapshot:
        """The memory at a version, on the device; the stream is not opened.

        Raises NotFoundError where it holds no atoms.
        """
        work = self.workspace
        view = work.store.view(work.version_of(version))
        self._require_own_kind(view)
        if not view.atom_records:
            raise NotFoundError(
                f"the memory holds no atoms at version {view.version}",
                remedy="memtool train-adapter --preset moram-trace --task 1 && "
                "memtool write --preset moram-trace",
            )
        settings = self._settings_of(view.atom_records)
        return TextSnapshot(
            version=view.version,
            view=view,
            tasks=tuple(task_of(record) for record in view.atom_records),
            bank=bank_of(view, work.layout).to(work.backbone.device),
            settings=settings,
            gate=gate_of(settings, work.layout.rank),
        )

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> AttachedTexts:
        """A version as a module. Raises ConfigError for a task: atoms find themselves."""
        self._refuse_task(task)
        return AttachedTexts(self.workspace.backbone, self.read(version), precision)

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """A language model has no classes."""
        del view
        return ()

    def _empty(self, snapshot: TextSnapshot) -> TextSnapshot:
        """The memory before its first task."""
        return replace(snapshot, tasks=(), bank=Rank1Memory(self.workspace.layout.sites).eval())

    def _settings_of(self, records: Sequence[memtool_stores.AdapterRecord]) -> MoramSettings:
        """The gate that the atoms of these rows were trained through: one for all of them."""
        record = records[-1]
        try:
            given = MoramSettings.model_validate(record.meta["hyperparameters"]["moram"])
        except (KeyError, TypeError, ValidationError) as error:
            raise CorruptError(
                f"the atoms {record.name!r} do not say which gate they were trained through",
                remedy="memtool rollback to the version before them",
            ) from error
        return resolved(given, self.workspace.layout.rank)
