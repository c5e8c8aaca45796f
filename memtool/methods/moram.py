"""MoRAM: a memory of rank-1 atoms that find themselves, on any stream of images.

    adapt        train r new atoms at every adapted map, through the gate, on top of those in memory
    write        append them, count the features of their task, and solve the head; a version a task
    consolidate  nothing to learn: the head again, under other head settings
    retrieve     which tasks' atoms do the tokens of this input choose?
    evaluate     accuracy on every task, at any version

Every token chooses atoms by its own response to their keys (`memtool.adapters.atoms`): there is no
router, no replay and no further loss, and older atoms are frozen. Atoms are trained with those in
memory around them, so that a task is written before the next one is trained. Head: solved from the
running moments of the features, each task's as they are when it is written (lda, ridge, ncm); or
trained with the atoms, every class by its last task (grown), or going on from the head before
(shared). With a head for each task, the gate's weight on the atoms of a task is its coefficient.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import memtool_stores
from memtool.config import HeadSettings, MoramSettings
from memtool.errors import (
    ConfigError,
    MismatchError,
    NotFoundError,
)
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Record, Row
from memtool.heads import LinearClassifier, RecalledHead
from memtool.memories.rank1 import Rank1Memory, init_atoms
from memtool.methods.as_atoms import accuracy_as_atoms
from memtool.methods.atom_measure import AtomMeasure, use_metrics
from memtool.methods.atom_method import AtomMethod
from memtool.methods.atom_state import (
    PAST_INPUTS,
    AtomSnapshot,
    AtomsState,
    bank_of,
    digest,
    gate_of,
    past_inputs_of,
    resolved,
    solve,
    trained_heads,
)
from memtool.methods.atom_training import train_atoms
from memtool.methods.attached import AttachedAtoms, AttachedImages
from memtool.methods.exchange import ReadAdapter
from memtool.methods.fixed_head import head_under, is_fixed, learned_under
from memtool.methods.kept import fingerprint_of
from memtool.methods.measure import share_right
from memtool.methods.method import Method, Trained, require_unmoved
from memtool.methods.past_inputs import PastInputs
from memtool.methods.records import task_of
from memtool.methods.results import AsAtoms, AtomsResult, HeadResult, TaskShare
from memtool.methods.state import HEAD, feature_statistics, features_blob, grown
from memtool.methods.subject import first
from memtool.methods.workspace import Workspace
from memtool.streams import load_image
from memtool.streams.task import Task

SUBJECT_SAMPLES = 256
"""Test images of a task that `retrieve --task` looks at."""

SETTINGS = ("til", "cil", "dil", "xtail")
"""Settings that one bank of atoms can be measured in."""


class Moram(AtomMethod[Task], Method):
    """The steps over one configuration and seed."""

    workspace: Workspace

    # Adapt ----------------------------------------------------------------------------------

    def _train(self, task: Task, fingerprint: str, checkpoint: Path) -> Trained:
        work, adapter = self.workspace, self.config.adapter
        self._require_settings()
        seed = work.training_seed(task.number)
        classes = len(work.stream.class_names)
        head = LinearClassifier(torch.zeros(classes, work.backbone.dim), torch.zeros(classes))
        bank, source, beneath = Rank1Memory(work.layout.sites), "zero", self._beneath_digest(task)
        free = self.settings.keys == "free"
        past = PastInputs(work.layout, self.config.past.energy)
        if work.has_store:
            view = work.store.view("HEAD")
            self._require_own_kind(view)
            rows = self._rows_beneath(view, task)
            bank = bank_of(view, work.layout, rows)
            if rows:
                state = self._state(view)
                self._require_same_gate(state.moram, self.settings)
                source = f"zero on top of {rows} tasks, version {view.version}"
                past = self._past_inputs(view, rows) if free else past
                if self.config.head.kind == "shared" and HEAD in view.blobs():
                    known = RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}")
                    head = grown([head, LinearClassifier(known.weight[0], known.bias[0])])
        if free:
            bank.to(work.engine.device)
            moments = past.moments(work, task.train, bank.recall(self.gate) if len(bank) else None)
            start = past.free_branch(moments)[0].to(work.engine.device)
        else:
            start = init_atoms(work.layout, generator=work.engine.generator(seed))
        bank.grow(
            start,
            rank=adapter.rank,
            owner=task.number,
            scaling=work.scaling,
            keys_learn=not free,
        )
        if self.config.moram.topk is not None:
            bank.check_topk(self.gate.topk)
        bank.train()
        adapted = train_atoms(
            work,
            task,
            bank,
            self.gate,
            head,
            seed=seed,
            fingerprint=fingerprint,
            checkpoint=checkpoint,
            stage=self.stage(task),
        )
        return Trained(adapted, source, beneath)

    def _fingerprint(self, task: Task) -> str:
        decides: dict[str, object] = {
            "trained": super()._fingerprint(task),
            "moram": self.settings.model_dump(mode="json"),
            "head goes on": self.config.head.kind == "shared",
            "beneath": self._beneath_digest(task),
        }
        if fixed := learned_under(self.config, self.workspace.stream):
            decides["head"] = fixed
        if self.settings.keys == "free":
            decides["past"] = self.config.past.energy
        return fingerprint_of(decides)

    def _digest_at(
        self,
        view: memtool_stores.MemoryView,
        records: Sequence[memtool_stores.AdapterRecord],
    ) -> str:
        going_on = self.config.head.kind == "shared" and records
        return digest(records, view.state.blobs.get(HEAD) if going_on else None)

    # Write ----------------------------------------------------------------------------------

    def _append(
        self, txn: memtool_stores.Transaction, adapter: ReadAdapter
    ) -> memtool_stores.AdapterRecord:
        """Append the atoms of a task; its features are counted with all atoms in place.

        Raises MismatchError for atoms that were trained on top of others than those in memory.
        """
        work, view = self.workspace, txn.base
        number = int(adapter.meta["task"])
        known = [task_of(record) for record in txn.atom_records]
        self._require_new_task(txn, adapter)
        self._require_trained_here(view, adapter)
        self._require_same_head(adapter)
        settings = self._trained_through(view, adapter)
        gate = gate_of(settings, work.layout.rank)
        txn.add_atoms(adapter.name, adapter.value.numpy(), adapter.meta)
        record = txn.atom_records[-1]
        bank = bank_of(view, work.layout)
        bank.grow(adapter.value, rank=work.layout.rank, owner=number, scaling=record.scaling)
        bank.freeze()
        if self.config.moram.topk is not None:
            bank.check_topk(gate.topk)
        task = work.task(str(number))
        statistics = feature_statistics(view, known)
        bank.eval().to(work.engine.device)
        features = work.features(task.train.images, bank.recall(gate))
        statistics[number] = work.counted(features, task.train)
        trained = {**trained_heads(view), number: adapter.head}
        if is_fixed(self.config):
            fixed = head_under(work, bank.recall(self.gate), self.config.head.kind)
            head = RecalledHead.shared(fixed.linear())
        else:
            head = solve(self.config.head, statistics, trained)
        new = AtomsState(
            moram=settings,
            head=self.config.head,
            class_names=work.stream.class_names,
            fingerprint=work.stream.fingerprint,
        )
        txn.put_blob(features_blob(number), statistics[number].to_bytes())
        txn.put_blob(HEAD, head.to_bytes())
        new.put(txn)
        if settings.keys == "free":
            past = past_inputs_of(view, work.layout, self.config.past.energy)
            moments = past.moments(work, task.train, bank.recall(gate))
            past.add(moments, len(known) / len(work.stream.tasks))
            txn.put_blob(PAST_INPUTS, past.to_bytes())
        return record

    def _require_same_head(self, adapter: ReadAdapter) -> None:
        """Atoms that learned under a fixed head belong under it, and others not."""
        about = self._about(adapter)
        if about is None:
            return
        given = about.section("head", HeadSettings)
        trained = self.config.model_copy(update={"head": given})
        stream = self.workspace.stream
        there, here = (learned_under(config, stream) for config in (trained, self.config))
        if there != here:
            raise MismatchError(
                f"{adapter.path} learned under head {given.kind} "
                f"{given.model_dump(include={'scale', 'rivals'})}",
                expected=f"head {self.config.head.kind}, as configured",
                remedy=f"memtool train-adapter --task {adapter.meta['task']} --fresh",
            )

    def _trained_through(
        self, view: memtool_stores.MemoryView, adapter: ReadAdapter
    ) -> MoramSettings:
        """The gate that atoms were trained through, which must be that of the memory."""
        about, state = self._about(adapter), AtomsState.load(view)
        settings = self.settings if state is None else state.moram
        if about is not None:
            settings = resolved(about.section("moram", MoramSettings), self.workspace.layout.rank)
        if state is not None:
            self._require_same_gate(state.moram, settings)
        return settings

    def _compared(self, adapter: ReadAdapter) -> AsAtoms:
        return accuracy_as_atoms(self.workspace, adapter, self.snapshot())

    # Consolidate ----------------------------------------------------------------------------

    def consolidate(self) -> HeadResult:
        """Solve the head again, under the head settings of now; atoms learn nothing here."""
        work, config = self.workspace, self.config
        view = work.store.view("HEAD")
        self._require_own_kind(view)
        state = self._state(view)
        tasks = [task_of(record) for record in view.atom_records]
        result = HeadResult(
            version=view.version,
            tasks=tuple(tasks),
            head=config.head.kind,
            scope=config.head.scope,
            unchanged=state.head == config.head,
        )
        if result.unchanged:
            return result
        head = solve(config.head, feature_statistics(view, tasks), trained_heads(view))
        new = state.model_copy(update={"head": config.head})

        def commit(txn: memtool_stores.Transaction) -> None:
            require_unmoved(txn, view)
            txn.put_blob(HEAD, head.to_bytes())
            new.put(txn)

        message = f"solve head {config.head.kind}"
        metadata = self._metadata("consolidate")
        work.engine.on_main(lambda: work.store.run(commit, message, metadata=metadata))
        return result.model_copy(update={"version": work.store.head()})

    # Retrieve -------------------------------------------------------------------------------

    def retrieve(
        self,
        *,
        task: str | None = None,
        image: Path | None = None,
        query: Path | None = None,
        version: str = "HEAD",
        out: Path | None = None,
    ) -> AtomsResult:
        """Which tasks' atoms an image, or the test images of a task, choose; and what comes of it.

        There is no `query` and nothing to write to `out`: every token of every layer asks for
        itself and gets a mixture of its own.
        """
        if query is not None or out is not None:
            raise ConfigError(
                f"{'--query' if query is not None else '--out'} under method moram: every token "
                "of every layer asks for itself, and gets a mixture of its own",
                expected="--task or --image alone",
                remedy="memtool explain --image FILE, which maps atoms to tokens",
            )
        if (task is None) == (image is None):
            raise ConfigError("what should recall?", expected="one of --task and --image")
        work = self.workspace
        snapshot = self.read(version) if task is None else self.snapshot(version)
        measure = AtomMeasure(work)
        accuracy, prediction = None, None
        if task is not None:
            chosen = work.task(task)
            shown = first(chosen.test, SUBJECT_SAMPLES)
            subject, images = f"task {chosen.number} {chosen.name}", shown.images
            accuracy = share_right(measure.scores(snapshot, images), shown)
        else:
            assert image is not None
            subject, images = str(image), load_image(image, self.config.backbone.image_size)[None]
            prediction = measure.prediction(snapshot, images)
        shares, blocks = measure.shares(snapshot, images)
        by_block = shares.double().mean(dim=0)
        return AtomsResult(
            version=snapshot.version,
            subject=subject,
            samples=len(images),
            score_norm=snapshot.gate.score_norm,
            topk=snapshot.gate.topk,
            tasks=tuple(
                TaskShare(
                    name=record.name,
                    task=task_of(record),
                    task_name=record.meta.get("task_name"),
                    share=float(share),
                )
                for record, share in zip(
                    snapshot.view.atom_records, by_block.mean(dim=0), strict=True
                )
            ),
            blocks=tuple(tuple(row) for row in by_block.tolist()),
            block_numbers=blocks,
            atoms=measure.top_atoms(snapshot, images),
            prediction=prediction,
            accuracy=accuracy,
        )

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
        """Accuracy on the test images of every task whose atoms are in memory.

        `setting` til compares the classes of the given task only, the others all classes. `history`
        reads the version after each task and fills the whole matrix, and says how far old atoms
        drifted and which of them later tasks use. `unseen` has a column for every task of the
        stream, learned or not (none: in xtail). `compare` adds the same atoms without a threshold.
        """
        begin = time.perf_counter()
        setting = self.test_setting(setting)
        work = self.workspace
        snapshot = self.snapshot(version)
        shown = [work.task(str(number)) for number in snapshot.tasks]
        if unseen or (unseen is None and setting == "xtail"):
            shown += [task for task in work.stream.tasks if task.number not in snapshot.tasks]
        rows = [self._row(snapshot, shown, setting, history=history)]
        if compare and snapshot.gate.threshold > -1:
            rows.append(self._without_threshold(snapshot, shown, setting))
        used = self.config.model_copy(
            update={"moram": snapshot.state.moram, "head": snapshot.state.head}
        )
        return self._record(
            rows,
            shown,
            setting=setting,
            version=snapshot.version,
            used=used,
            mix=None,
            separation=None,
            seconds=time.perf_counter() - begin,
            command=command,
            preset=preset,
        )

    def _row(
        self, snapshot: AtomSnapshot, shown: Sequence[Task], setting: str, *, history: bool
    ) -> Row:
        """The memory on all tasks, after each of them or after the last.

        With a head that knows all classes in advance also before the first.
        """
        measure, count = AtomMeasure(self.workspace), len(snapshot.tasks)
        versions = self._history(snapshot.version, snapshot.tasks) if history else {}
        versions[count] = snapshot.version
        matrix = AccuracyMatrix.empty([task.name for task in shown])
        if history and is_fixed(self.config):
            before = [measure.zero_shot(task, setting) for task in shown]
            matrix = matrix.with_row(0, before)
        banks: dict[int, Rank1Memory] = {}
        for learned, at in self.workspace.telling("evaluate", sorted(versions.items())):
            there = snapshot if at == snapshot.version else self.snapshot(at)
            scores = [measure.accuracy(there, task, setting) for task in shown]
            matrix = matrix.with_row(learned, scores)
            banks[learned] = there.bank
        use, more = None, {}
        if len(banks) == count > 1:
            use = measure.use(snapshot, [banks[place + 1] for place in range(count)])
            more = use_metrics(use)
        row = Row.measured("memory", "memory of atoms", "method", matrix, more=more)
        return row.model_copy(update={"atom_use": use})

    def _without_threshold(
        self, snapshot: AtomSnapshot, shown: Sequence[Task], setting: str
    ) -> Row:
        """The same atoms and head, all kept atoms counting."""
        settings = snapshot.state.moram.model_copy(update={"threshold": -1.0})
        there = replace(snapshot, gate=gate_of(settings, self.config.adapter.rank))
        matrix = AccuracyMatrix.empty([task.name for task in shown])
        measure = AtomMeasure(self.workspace)
        scores = [measure.accuracy(there, task, setting) for task in shown]
        matrix = matrix.with_row(len(snapshot.tasks), scores)
        return Row.measured("memory-all", "memory of atoms, no threshold", "method", matrix)

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks: faa, task_accuracy. Errors as `evaluate`.

        A task counts as inferred right when its atoms have most of an image's weight.
        """
        setting = self.test_setting(setting)
        work, snapshot = self.workspace, self.snapshot(version)
        measure = AtomMeasure(work)
        shown = [work.task(str(number)) for number in tasks]
        scores = [measure.accuracy(snapshot, task, setting) or 0.0 for task in shown]
        return {
            "faa": sum(scores) / len(scores),
            "task_accuracy": measure.task_accuracy(snapshot, shown),
        }

    # Shared ---------------------------------------------------------------------------------

    def read(self, version: str = "HEAD") -> AtomSnapshot:
        """The memory at a version, on the device; the stream is not opened."""
        work = self.workspace
        view = work.store.view(work.version_of(version))
        self._require_own_kind(view)
        state = self._state(view)
        head = RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}")
        return AtomSnapshot(
            version=view.version,
            view=view,
            tasks=tuple(task_of(record) for record in view.atom_records),
            bank=bank_of(view, work.layout).to(work.backbone.device),
            gate=gate_of(state.moram, work.layout.rank),
            state=state,
            head=head.to(work.backbone.device),
        )

    def snapshot(self, version: str = "HEAD") -> AtomSnapshot:
        """The memory at a version, of the tasks of this stream."""
        work, found = self.workspace, self.read(version)
        state = found.state
        if state.class_names != work.stream.class_names:
            raise MismatchError(
                f"the classes of {work.stream.name} are not those of the memory's head",
                expected=", ".join(state.class_names[:8]),
                remedy="the stream that the memory was trained on, or another --store",
            )
        for record in found.view.atom_records:
            self._require_same_task(record)
        if state.head.kind == "text":  # as the atoms of this version make it: some may be pruned
            head = head_under(work, found.bank.recall(found.gate), "text").linear()
            return replace(found, head=RecalledHead.shared(head).to(work.engine.device))
        return found

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> AttachedImages:
        """A version as a module. Raises ConfigError for a task: atoms find themselves."""
        self._refuse_task(task)
        return AttachedAtoms(self.workspace.backbone, self.read(version), precision)

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes of a version's head, in the order of its scores."""
        return self._state(view).class_names

    def _state(self, view: memtool_stores.MemoryView) -> AtomsState:
        state = AtomsState.load(view)
        if state is None or not view.atom_records:
            raise NotFoundError(
                f"the memory holds no atoms at version {view.version}",
                remedy="memtool train-adapter --method moram --task 1 && memtool write --method "
                "moram",
            )
        return state

    def _require_settings(self) -> None:
        """Settings that atoms cannot follow are errors, not ignored."""
        setting = self.config.stream.setting
        if setting not in SETTINGS:
            raise ConfigError(
                f"stream.setting {setting} under method moram",
                expected=f"one of {', '.join(SETTINGS)}",
            )
        super()._require_settings()

    def test_setting(self, setting: str | None = None) -> str:
        """What is known at test time, checked; without a word, as the tasks were cut."""
        cut = self.config.stream.setting
        setting = setting or cut
        if setting not in SETTINGS or (setting not in ("til", cut)):
            raise ConfigError(
                f"setting {setting!r} on tasks that were cut for {cut!r}, under method moram",
                expected=f"til or {cut}" if cut in SETTINGS else f"one of {', '.join(SETTINGS)}",
                remedy=f"--set stream.setting={setting} and a memory that was trained so",
            )
        return setting
