"""MoRAM: a memory of rank-1 atoms that find themselves, on any stream of images or texts.

    adapt        train r new atoms at every adapted map, through the gate, on top of those in memory
    write        append them; of images count the features of their task, and solve the head; a
                 version a task
    consolidate  nothing to learn: of images the head again, under other head settings
    retrieve     which tasks' atoms do the tokens of this input choose, and what comes of it?
    evaluate     accuracy, or the loss of texts, on every task, at any version

Every token chooses atoms by its own response to their keys (`memtool.adapters.atoms`): there is no
router, no replay and no further loss, and older atoms are frozen. A language model keeps its own
head. That of images is solved from the running moments of the features, each task's as they are
when it is written (lda, ridge, ncm); or trained with the atoms, every class by its last task
(grown), or going on from the head before (shared). With a head for each task, the gate's weight on
the atoms of a task is its coefficient.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import memtool_stores
from memtool.adapters.atoms import AtomGate
from memtool.errors import ConfigError, MismatchError, NotFoundError
from memtool.evaluation.inside import Inside
from memtool.evaluation.record import Record
from memtool.heads import RecalledHead
from memtool.learning.adapt import Adapted, require_learned
from memtool.learning.known import head_under, learned_under
from memtool.learning.objective import objective_of
from memtool.learning.past_inputs import PastInputs
from memtool.memories.rank1 import Rank1Memory, require_linear
from memtool.methods.attached import Attached
from memtool.methods.exchange import ReadAdapter
from memtool.methods.in_store import HEAD, feature_statistics
from memtool.methods.kept import fingerprint_of
from memtool.methods.method import Method, require_unmoved
from memtool.methods.moram import beneath
from memtool.methods.moram.about import ABOUT, SETTINGS, require_learnable
from memtool.methods.moram.as_atoms import as_atoms
from memtool.methods.moram.attached import AttachedAnswers, AttachedAtoms
from memtool.methods.moram.learn import AtomLearner, decides_of_texts, head_to_go_on_from
from memtool.methods.moram.measure import AtomMeasure
from memtool.methods.moram.prune import dead_atoms, prune
from memtool.methods.moram.rows import memory_row, without_threshold
from memtool.methods.moram.state import (
    AtomSnapshot,
    AtomsState,
    bank_of,
    gate_of,
    gate_settings,
    resolved,
    solve,
    trained_heads,
)
from memtool.methods.moram.written import Written
from memtool.methods.records import task_of
from memtool.methods.results import AsAtoms, AtomsResult, HeadResult, PruneResult, TaskShare
from memtool.methods.subject import subject_of
from memtool.methods.training import Trained
from memtool.sections import MoramSettings
from memtool.streams.task import Task

if TYPE_CHECKING:
    from memtool.methods.explanation import AtomMap


class Moram(Method):
    """The steps over one configuration and seed."""

    kind: ClassVar[Literal["adapter", "atoms"]] = ABOUT.kind
    reads: ClassVar[tuple[str, ...]] = ("images", "texts")
    version_each: ClassVar[bool] = True
    consolidates: ClassVar[str | None] = None
    measures_unseen: ClassVar[bool] = True

    @property
    def settings(self) -> MoramSettings:
        """The configured gate, with a number for topk."""
        return resolved(self.config.moram, self.config.adapter.rank)

    @property
    def gate(self) -> AtomGate:
        """The configured gate."""
        return gate_of(self.config.moram, self.config.adapter.rank)

    @property
    def reads_texts(self) -> bool:
        """Whether its samples are texts."""
        return self.workspace.reads == "texts"

    # Adapt ----------------------------------------------------------------------------------

    def require_able(self) -> None:
        """As `Method.require_able`: atoms of an image model are at its linear layers."""
        if not self.reads_texts:
            require_linear(self.workspace.layout.sites)

    @property
    def needs_before(self) -> str | None:
        """As `Method.needs_before`: the atoms that new ones learn on top of."""
        return "atoms learn on top of those of earlier tasks"

    def _train(self, task: Task, fingerprint: str, checkpoint: Path) -> Trained:
        work = self.workspace
        require_learnable(self.config)
        work.require_fitting([task])
        bank, source = Rank1Memory(work.layout.sites), "zero"
        past = None
        if self.settings.keys == "free":
            told = self.config.past
            past = PastInputs(work.layout, told.energy, rule=told.rule)
        start = None
        if work.has_store:
            view = work.store.view("HEAD")
            self._require_own_kind(view)
            if rows := beneath.rows_beneath(view, task):
                beneath.require_same_gate(work, self._settings_of(view), self.settings)
                bank = bank_of(view, work.layout, rows)
                source = f"zero on top of {rows} tasks, version {view.version}"
                if past is not None:
                    past = beneath.past_beneath(work, view, rows)
                start = head_to_go_on_from(work, view)
        on_top_of = beneath.beneath_digest(work, task)
        learner = AtomLearner(work, bank, self.gate, objective=objective_of(work, start), past=past)
        stage = self.stage(task)
        fit = learner.learn(task, stage, fingerprint=fingerprint, checkpoint=checkpoint)
        flat = learner.bank.fresh().float().cpu().unsqueeze(0)
        if self.reads_texts:
            return Trained(Adapted(flat, (), (), fit), source, on_top_of)
        require_learned(fit, len(task.classes), [flat], self.config.train.lr, stage)
        recall = learner.recall()
        head = learner.objective.learned_head(recall)
        accuracy = learner.objective.training_accuracy(recall, task)
        return Trained(Adapted(flat, (head,), (accuracy,), fit), source, on_top_of)

    def _fingerprint(self, task: Task) -> str:
        work, config = self.workspace, self.config
        on_top_of = beneath.beneath_digest(work, task)
        if self.reads_texts:
            decides = decides_of_texts(work, task, on_top_of)
        else:
            decides = {
                "trained": super()._fingerprint(task),
                "moram": self.settings.decides(),
                "head goes on": config.head.kind == "shared",
                "beneath": on_top_of,
            }
            if fixed := learned_under(config, work.stream):
                decides["head"] = fixed
        if self.settings.keys == "free":
            decides["past"] = config.past.decides()
        return fingerprint_of(decides)

    def learn(self, task: Task, *, fresh: bool = False) -> None:
        """Train and write a task, unless its atoms are in memory; `fresh` as in `adapt`.

        Raises ConfigError where another task is in its place, or its atoms were trained with other
        settings, data or another model.
        """
        work, place = self.workspace, task.number - 1
        records = work.store.view("HEAD").atom_records if work.has_store else ()
        if place >= len(records):
            return super().learn(task, fresh=fresh)
        remedy = "another --store and --set runs=DIR, or --fresh to begin this one anew"
        if task_of(records[place]) != task.number:
            raise ConfigError(
                f"the memory {work.store_path!r} holds task {task_of(records[place])} in the place "
                f"of task {task.number} {task.name}, which was forgotten or never learned",
                expected="the tasks of the stream, in its order",
                remedy=remedy,
            )
        known = (records[place].meta.get("provenance") or {}).get("fingerprint")
        if known != self._fingerprint(task):
            raise ConfigError(
                f"the memory {work.store_path!r} holds atoms {records[place].name!r} that were "
                f"trained with other settings, data or model than task {task.number} {task.name}",
                remedy=remedy,
            )
        return None

    # Write ----------------------------------------------------------------------------------

    def _append(
        self, txn: memtool_stores.Transaction, adapter: ReadAdapter
    ) -> memtool_stores.AdapterRecord:
        """Append the atoms of a task, and what is kept beside them.

        Raises MismatchError for atoms that were trained on top of others than those in memory.
        """
        work = self.workspace
        beneath.require_new_task(txn, adapter)
        beneath.require_trained_here(work, txn.base, adapter)
        return Written(work, self.settings, txn, adapter).append()

    def _as_atoms(self, foreign: Sequence[ReadAdapter]) -> tuple[AsAtoms, ...]:
        if not foreign:
            return ()
        snapshot = self.snapshot()
        return tuple(as_atoms(self.workspace, adapter, snapshot) for adapter in foreign)

    # Consolidate ----------------------------------------------------------------------------

    def consolidate(self) -> HeadResult:
        """Solve the head again, under the head settings of now; atoms learn nothing here."""
        work, config = self.workspace, self.config
        view = work.store.view("HEAD")
        self._require_own_kind(view)
        self._require_atoms(view)
        state = AtomsState.load(view)
        tasks = beneath.tasks_of(view)
        if state is None:
            return HeadResult(version=view.version, tasks=tasks, unchanged=True)
        result = HeadResult(
            version=view.version,
            tasks=tasks,
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
        prompt: str | None = None,
        query: Path | None = None,
        version: str = "HEAD",
        out: Path | None = None,
    ) -> AtomsResult:
        """Which tasks' atoms an input, or test samples of a task, choose; and what comes of it.

        There is no `query` and nothing to write to `out`: every token of every layer asks for
        itself and gets a mixture of its own.
        """
        if query is not None or out is not None:
            flag = "--prompt TEXT" if self.reads_texts else "--image FILE"
            raise ConfigError(
                f"{'--query' if query is not None else '--out'} under method moram: every token "
                "of every layer asks for itself, and gets a mixture of its own",
                expected=f"--task or {flag.split()[0]} alone",
                remedy=f"memtool explain {flag}, which maps atoms to tokens",
            )
        work = self.workspace
        subject = subject_of(work, task=task, image=image, prompt=prompt)
        snapshot = self.read(version) if subject.task is None else self.snapshot(version)
        measure = AtomMeasure(work)
        shares, blocks = measure.shares(snapshot, subject.samples)
        by_block = shares.double().mean(dim=0)
        prediction, answer, accuracy, loss = measure.of_subject(snapshot, subject)
        return AtomsResult(
            version=snapshot.version,
            subject=subject.words,
            samples=len(subject),
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
            atoms=measure.top_atoms(snapshot, subject.samples),
            prediction=prediction,
            accuracy=accuracy,
            answer=answer,
            loss=loss,
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
        """Accuracy, or the loss of texts, on the test samples of every task with atoms in memory.

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
        there = self._after_each(snapshot) if history else {len(snapshot.tasks): snapshot}
        rows = [memory_row(work, there, shown, setting, history=history)]
        if compare and snapshot.gate.threshold > -1:
            rows.append(without_threshold(work, snapshot, shown, setting))
        used: dict[str, Any] = {"moram": snapshot.settings}
        if snapshot.state is not None:
            used["head"] = snapshot.state.head
        return self._record(
            rows,
            shown,
            setting=setting,
            version=snapshot.version,
            used=self.config.model_copy(update=used),
            mix=None,
            separation=None,
            seconds=time.perf_counter() - begin,
            command=command,
            preset=preset,
        )

    def _after_each(self, snapshot: AtomSnapshot) -> dict[int, AtomSnapshot]:
        """The memory after so many tasks, for every number of them that a version has."""
        count = len(snapshot.tasks)
        versions = beneath.history(self.workspace, snapshot.version, snapshot.tasks)
        return {n: self.snapshot(at) for n, at in versions.items() if n < count} | {count: snapshot}

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks whose atoms a version has, in the order written."""
        return beneath.tasks_of(self.workspace.store.view(version))

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks: faa, task_accuracy, of texts the loss.

        A task counts as inferred right when its atoms have most of a sample's weight. Errors as
        `evaluate`.
        """
        setting = self.test_setting(setting)
        work, snapshot = self.workspace, self.snapshot(version)
        measure = AtomMeasure(work)
        shown = [work.task(str(number)) for number in tasks]
        return {
            **measure.figures(snapshot, shown, setting),
            "task_accuracy": measure.task_accuracy(snapshot, shown),
        }

    def explain(self, **subject: Any) -> AtomMap:
        """Which atoms the tokens choose at one adapted map; arguments as in `explain_atoms`."""
        from memtool.methods.moram.explain import explain_atoms

        return explain_atoms(self, **subject)

    def inside(self, tasks: Sequence[Task], version: str = "HEAD") -> Inside:
        """Whose atoms the tasks' test samples choose, and examples."""
        shown = AtomMeasure(self.workspace).inside(self.snapshot(version), tasks)
        return shown.model_copy(update={"curves": super().inside(tasks, version).curves})

    def dead_atoms(self, below: float) -> PruneResult:
        """As `prune.dead_atoms`."""
        return dead_atoms(self, below)

    def prune(self, found: PruneResult) -> PruneResult:
        """As `prune.prune`."""
        return prune(self, found)

    def require_same_settings(self, remedy: str) -> None:
        """Raise ConfigError where the memory was begun with another gate or head."""
        state = AtomsState.load(self.workspace.store.view())
        if state is not None and (state.moram, state.head) != (self.settings, self.config.head):
            raise ConfigError(
                f"the memory {self.workspace.store_path!r} was begun with another gate or head",
                remedy=remedy,
            )

    # Shared ---------------------------------------------------------------------------------

    def read(self, version: str = "HEAD") -> AtomSnapshot:
        """The memory at a version, on the device; the stream is not opened.

        Raises NotFoundError where it holds no atoms.
        """
        work = self.workspace
        view = work.store.view(work.version_of(version))
        self._require_own_kind(view)
        self._require_atoms(view)
        settings, state, head = self._settings_of(view), AtomsState.load(view), None
        if state is not None:
            head = RecalledHead.from_bytes(view.blob(HEAD), f"blob {HEAD!r}")
            head = head.to(work.backbone.device)
        return AtomSnapshot(
            version=view.version,
            view=view,
            tasks=beneath.tasks_of(view),
            bank=bank_of(view, work.layout).to(work.backbone.device),
            settings=settings,
            gate=gate_of(settings, work.layout.rank, work.engine.settings.atom_scores),
            state=state,
            head=head,
        )

    def snapshot(self, version: str = "HEAD") -> AtomSnapshot:
        """The memory at a version, of the tasks of this stream; MismatchError for another."""
        work, found = self.workspace, self.read(version)
        state = found.state
        if state is not None and state.class_names != work.stream.class_names:
            raise MismatchError(
                f"the classes of {work.stream.name} are not those of the memory's head",
                expected=", ".join(state.class_names[:8]),
                remedy="the stream that the memory was trained on, or another --store",
            )
        for record in found.view.atom_records:
            self._require_same_task(record)
        if state is not None and state.head.kind == "text":
            # As the atoms of this version make it: some may be pruned.
            head = head_under(work, found.recall, "text").linear()
            return replace(found, head=RecalledHead.shared(head).to(work.engine.device))
        return found

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> Attached:
        """A version as a module. Raises ConfigError for a task: atoms find themselves."""
        if task is not None:
            raise ConfigError(
                f"task {task!r} for a memory of atoms, which find themselves",
                remedy="attach without a task",
            )
        kind = AttachedAnswers if self.reads_texts else AttachedAtoms
        return kind(self.workspace.backbone, self.read(version), precision)

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes of a version's head, in the order of its scores; none of texts."""
        self._require_atoms(view)
        state = AtomsState.load(view)
        return () if state is None else state.class_names

    def _require_atoms(self, view: memtool_stores.MemoryView) -> None:
        if not view.atom_records or (AtomsState.load(view) is None and not self.reads_texts):
            example = "--preset moram-trace" if self.reads_texts else "--method moram"
            raise NotFoundError(
                f"the memory holds no atoms at version {view.version}",
                remedy=f"memtool train-adapter {example} --task 1 && memtool write {example}",
            )

    def _settings_of(self, view: memtool_stores.MemoryView) -> MoramSettings:
        settings = gate_settings(view, self.workspace.layout.rank)
        assert settings is not None
        return settings

    def test_setting(self, setting: str | None = None) -> str:
        """What is known at test time, checked; without a word, as the tasks were cut."""
        cut = self.config.stream.setting
        setting = setting or cut
        if self.reads_texts and setting != "trace":
            raise ConfigError(
                f"setting {setting!r} on a stream of texts", expected="trace: no task is known"
            )
        if setting not in SETTINGS or (setting not in ("til", cut)):
            raise ConfigError(
                f"setting {setting!r} on tasks that were cut for {cut!r}, under method moram",
                expected=f"til or {cut}" if cut in SETTINGS else f"one of {', '.join(SETTINGS)}",
                remedy=f"--set stream.setting={setting} and a memory that was trained so",
            )
        return setting
