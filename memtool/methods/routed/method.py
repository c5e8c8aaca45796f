"""A method of one's own: whole adapters, mixed for every input by weights that a rule gives.

    adapt        train an adapter of each task, of images with a head
    write        append it to the store
    consolidate  keep what the rule keeps of every new task
    retrieve     the weights that an input gets, and what comes of it
    evaluate     accuracy, or the loss of texts, on every task, at any version

The rule sees an input as the frozen model does (`memtool.learning.looks`): `keep` says what stays
of the training samples of a task, `weights` how much each task counts for an input. Prompts keep
their weights while they are answered.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

import memtool_stores
from memtool.adapters.stock import Stock
from memtool.adapters.values import AdapterValues
from memtool.errors import ConfigError
from memtool.evaluation.inside import Inside
from memtool.evaluation.record import Record, Row
from memtool.learning.looks import FINAL, PromptLook, looks
from memtool.methods.about import require_trained_head
from memtool.methods.attached import Attached
from memtool.methods.explanation import Explanation
from memtool.methods.in_store import classes_of
from memtool.methods.method import Method, newest_after_each, require_unmoved
from memtool.methods.outcome import predicted, share_right, told_of
from memtool.methods.records import in_runs, numbered, recorded, task_of
from memtool.methods.results import AdapterCoefficient, RetrieveResult, RoutedResult
from memtool.methods.routed import measure
from memtool.methods.routed.attached import RoutedImages, RoutedTexts
from memtool.methods.routed.explain import explain
from memtool.methods.routed.memory import (
    Kept,
    RoutedMemory,
    Routing,
    kept_blob,
    kept_bytes,
    known_tasks,
    of_prompts,
    read_kept,
)
from memtool.methods.stored_values import values_of
from memtool.methods.subject import subject_of
from memtool.sections import Settings
from memtool.settings import AT_ONCE, Config
from memtool.streams.task import Images, Task, Texts


class Routed(Method, ABC):
    """The steps over one configuration and seed; a subclass has a `name`, `keep` and `weights`.

    Its `Settings`, where it has any, are the section of its name; `settings` are those in force.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("images", "texts")
    any_layout: ClassVar[bool] = True
    consolidates: ClassVar[str | None] = "what is kept of each task"

    @classmethod
    def open(cls, config: Config, **given: Any) -> Self:
        """As `Method.open`. Raises ConfigError without a name, or for a head fixed in advance."""
        if not isinstance(getattr(cls, "name", None), str):
            raise ConfigError(
                f"method {config.method}: the class {cls.__name__} has no name",
                expected='a line as name = "nearest-mean"',
            )
        require_trained_head(config)
        return super().open(config, **given)

    @property
    def settings(self) -> Any:
        """The section of this method; the base of all settings where it has none."""
        return getattr(self.config, self.name.replace("-", "_"), Settings())

    @abstractmethod
    def keep(self, looks: Tensor) -> Mapping[str, Tensor]:
        """What is kept of a task, by name, of what its training samples look like (n, dim)."""

    @abstractmethod
    def weights(self, looks: Tensor, kept: Sequence[Kept]) -> Tensor:
        """How much each task counts, (n, tasks), for inputs that look like (n, dim).

        `kept` has what was kept of every task, in order.
        """

    # Consolidate ----------------------------------------------------------------------------

    def consolidate(self) -> RoutedResult:
        """Keep what the rule keeps of every new task; the samples of the others are not read."""
        begin, work = time.perf_counter(), self.workspace
        view = work.store.view("HEAD")
        self._require_own_kind(view)
        tasks = tuple(dict.fromkeys(task_of(record) for record in view.adapters))
        new = [task for task in tasks if not view.has_blob(kept_blob(task))]
        kept: dict[int, Kept] = {}
        for number in work.telling("consolidate: keep", new):
            samples = self.samples_of(view, number)
            if samples is not None:
                kept[number] = self.kept_of(samples, self.look_in(view))
        learn = self.learnt(view, kept)
        result = RoutedResult(
            version=view.version,
            tasks=tasks,
            new=tuple(kept),
            seconds=0.0,
            unchanged=not kept and learn is None,
        )
        if result.unchanged:
            return result
        blobs = {kept_blob(n): kept_bytes(one, self.config.method) for n, one in kept.items()}

        def commit(txn: memtool_stores.Transaction) -> None:
            require_unmoved(txn, view)
            for name, data in blobs.items():
                txn.put_blob(name, data)
            if learn is not None:
                learn(txn)

        seconds = time.perf_counter() - begin
        metadata = {**self._metadata("consolidate"), "learned": in_runs(tasks), "seconds": seconds}
        message = f"consolidate tasks {numbered(tasks)}"
        work.engine.on_main(lambda: work.store.run(commit, message, metadata=metadata))
        return result.model_copy(update={"version": work.store.head(), "seconds": seconds})

    def kept_of(self, samples: Images | Texts, look: PromptLook) -> Mapping[str, Tensor]:
        """What is kept of samples."""
        return self.keep(looks(self.workspace, samples, look))

    def samples_of(self, view: memtool_stores.MemoryView, number: int) -> Images | Texts | None:
        """What is kept of a task is kept of these samples; None where there are none of it."""
        del view
        found: Images | Texts = self.workspace.task(str(number)).train
        return found

    def learnt(
        self, view: memtool_stores.MemoryView, new: Mapping[int, Kept]
    ) -> Callable[[memtool_stores.Transaction], None] | None:
        """What consolidation also writes, with what is kept of new tasks; here nothing, None."""
        del view, new
        return None

    def task_written(self, task: Task) -> None:
        """Consolidate it."""
        del task
        if self.config.stream.setting not in AT_ONCE:
            self.consolidate()

    def all_written(self) -> None:
        """Consolidate tasks that are learned at once, together."""
        self.consolidate()

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
    ) -> RetrieveResult:
        """The weights that an input, or test samples of a task, get; and what comes of it.

        Raises ConfigError for anything but one subject, and for `query` and `out`.
        """
        if query is not None or out is not None:
            raise ConfigError(
                f"{'--query' if query is not None else '--out'} under method {self.name}",
                expected="--task, --image or --prompt alone",
            )
        work = self.workspace
        subject = subject_of(work, task=task, image=image, prompt=prompt)
        memory = self.read(version) if subject.task is None else self.snapshot(version)
        samples, alone = subject.samples, subject.task is None
        outcome: dict[str, Any] = {}
        if isinstance(samples, Images):
            scores, weights = measure.scores(work, memory, samples)
            if alone:
                assert memory.head is not None
                chances = memory.head.probabilities(scores)[0]
                outcome["prediction"] = predicted(chances, classes_of(memory.view), None)
            else:
                outcome["accuracy"] = share_right(scores, samples)
        else:
            weights = measure.weights_of(work, memory, samples)
            answering = measure.answering(work, memory)
            if alone:
                outcome["answer"] = answering.answers(samples.prompts)[0]
                outcome |= told_of(self.novelty(memory.view, samples.prompts[0]))
            else:
                encoded = work.backbone.encode(samples.prompts, samples.answers)
                outcome["loss"] = answering.loss(encoded)
        mean = of_prompts(weights).double().mean(dim=0).tolist()
        return RetrieveResult(
            version=memory.version,
            subject=subject.words,
            samples=len(subject),
            mix="delta",
            separation=self.name,
            adapters=tuple(
                AdapterCoefficient(name=record.name, task=task_of(record), coefficient=one)
                for record, one in zip(memory.records, mean, strict=True)
            ),
            blocks=measure.by_memory(weights),
            block_numbers=measure.memories_of(work, memory),
            **outcome,
        )

    def explain(
        self, *, layer: str | None = None, block: int | None = None, **subject: Any
    ) -> Explanation:
        """What comes out without each adapter; arguments as in `explain.explain`."""
        if layer is not None or (block is not None and self.scope != "token"):
            raise ConfigError(
                f"--layer and --block under method {self.name}",
                expected="method moram, where every adapted map has atoms of its own",
            )
        return explain(self, block=block, **subject)

    def inside(self, tasks: Sequence[Task], version: str = "HEAD") -> Inside:
        """What the tasks' test samples recall, and examples."""
        shown = measure.inside(self.workspace, self.snapshot(version), tasks)
        return shown.model_copy(update={"curves": super().inside(tasks, version).curves})

    # Evaluate -------------------------------------------------------------------------------

    def evaluate(
        self,
        *,
        setting: str | None = None,
        version: str = "HEAD",
        history: bool = False,
        compare: bool = False,
        rivals: Sequence[str] = (),
        command: str | None = None,
        preset: str | None = None,
    ) -> Record:
        """Accuracy, or the loss of texts, on the test samples of every task in memory.

        `history` also reads the version after each task, measured where nobody did before;
        `compare` adds a hard choice, the uniform mixture, of texts the frozen model, and the oracle
        adapter; `rivals` as `rival_rows`. The task is never given.
        """
        begin, work = time.perf_counter(), self.workspace
        cut = self._setting(setting)
        memory = self.snapshot(version)
        shown = self.shown(memory.view, memory.tasks)
        held_out = None if work.unseen is not None else work.stream.held_out
        if held_out is not None:
            shown = [held_out]
        there = {len(shown): memory}
        if history and held_out is None:
            log = work.store.log(memory.version)
            known = ((one.id, self.known_in(work.store.view(one.id))) for one in log)
            for learned, at in sorted(newest_after_each(known, memory.tasks).items()):
                count = sum(task.number in memory.tasks[:learned] for task in shown)
                if count < len(shown):
                    there[count] = self.snapshot(at)
        label, ways = self._label(memory, shown), [measure.as_they_are] * len(shown)
        if len(there) > 1:
            rows = [measure.history_row(work, label, shown, there)]
        else:
            now = {len(shown): (memory, ways)}
            rows = [measure.row(work, "memory", label, "method", shown, now)]
        if compare:
            rows += measure.other_rows(work, memory, shown)
        rows += self.rival_rows(rivals, memory, shown)
        return self._record(
            rows,
            shown,
            setting=cut,
            version=memory.version,
            used=self.config,
            mix="delta",
            separation=None,
            seconds=time.perf_counter() - begin,
            command=command,
            preset=preset,
        )

    def rival_rows(
        self, rivals: Sequence[str], memory: RoutedMemory, tasks: Sequence[Task]
    ) -> list[Row]:
        """What others make of the same adapters, by the names of `rivals`; here of none."""
        del rivals, memory, tasks
        return []

    def _label(self, memory: RoutedMemory, tasks: Sequence[Task]) -> str:
        """The name of the method's row; it says how many adapters only distract."""
        numbers = {task.number for task in tasks}
        others = sum(task_of(record) not in numbers for record in memory.records)
        if self.workspace.stream.held_out is not None or not others:
            return f"memory, {self.name}"
        return f"memory, {self.name} ({others} of {len(memory.records)} adapters distract)"

    def _setting(self, setting: str | None) -> str:
        """What is known at test time: as the tasks were cut. Raises ConfigError for another."""
        cut = self.config.stream.setting
        if setting not in (None, cut):
            raise ConfigError(
                f"setting {setting!r} on tasks that were cut for {cut!r}", expected=cut
            )
        return cut

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks that a version can be measured on."""
        return self.known_in(self.workspace.store.view(version))

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks: faa, task_accuracy, of texts the loss."""
        self._setting(setting)
        work, memory = self.workspace, self.snapshot(version)
        shown = self.shown(memory.view, tasks)
        ways = [measure.as_they_are] * len(shown)
        row = measure.row(work, "memory", "memory", "method", shown, {len(shown): (memory, ways)})
        found = {"task_accuracy": measure.task_accuracy(work, memory, shown)}
        for name, line in (("loss", row.loss), ("faa", row.accuracy)):
            last = [score for score in line[-1] if score is not None] if line else []
            if last:
                found[name] = sum(last) / len(last)
        return found

    # Shared ---------------------------------------------------------------------------------

    @property
    def look(self) -> PromptLook:
        """How prompts are seen."""
        return FINAL

    def look_in(self, view: memtool_stores.MemoryView) -> PromptLook:
        """The same in a version, with what it is looked at under."""
        del view
        return self.look

    @property
    def scope(self) -> str:
        """What has weights of its own: the model, a block or a token, as in `memory.scope`."""
        return "model"

    def novelty(self, view: memtool_stores.MemoryView, prompt: str) -> float | None:
        """How unlike all that a version learned from a prompt is; None where nothing tells."""
        del view, prompt
        return None

    def by_token(
        self, memory: RoutedMemory, prompt: str, block: int | None
    ) -> tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]:
        """The tokens of a prompt and the weights at each; none where tokens have no weights."""
        del memory, prompt, block
        return (), ()

    def known_in(self, view: memtool_stores.MemoryView) -> tuple[int, ...]:
        """Numbers of the tasks that a version can recall, in the order written."""
        return known_tasks(view)

    def remedy_in(self, view: memtool_stores.MemoryView) -> str:
        """What helps where a version can recall nothing."""
        if view.adapters:
            return "memtool consolidate"
        return "memtool train-adapter --task 1 && memtool write, then memtool consolidate"

    def kept_in(self, view: memtool_stores.MemoryView, tasks: Sequence[int]) -> list[Kept]:
        """What the rule goes by, of each of these tasks."""
        return [read_kept(view, kept_blob(task)) for task in tasks]

    def values_in(
        self, view: memtool_stores.MemoryView, records: Sequence[memtool_stores.AdapterRecord]
    ) -> AdapterValues | Stock:
        """The adapters of these records."""
        work = self.workspace
        return values_of(view, records, work.layout, work.backbone.all_sites)

    def routing(
        self,
        values: AdapterValues | Stock,
        owners: Sequence[int],
        kept: Sequence[Kept],
        look: PromptLook,
    ) -> Routing:
        """The rule over adapters, each with an owner, and what was kept of their tasks."""
        return Routing(values, owners, kept, self.weights, self.config.method, look)

    def shown(self, view: memtool_stores.MemoryView, tasks: Sequence[int]) -> list[Task]:
        """The tasks of the stream that have these numbers in the memory."""
        del view
        return [self.workspace.task(str(number)) for number in tasks]

    def read(self, version: str = "HEAD") -> RoutedMemory:
        """The memory at a version, on the device; the stream is not opened."""
        work = self.workspace
        return RoutedMemory.read(work, version, self, work.backbone.device)

    def snapshot(self, version: str = "HEAD") -> RoutedMemory:
        """The memory at a version, of the tasks of this stream; MismatchError for another."""
        found = self.read(version)
        for record in found.view.adapters:
            self._require_same_task(record)
        return found

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> Attached:
        """A version as a module; with `task` the adapters of that task alone, for every input."""
        memory, backbone = self.read(version), self.workspace.backbone
        if task is not None:
            number = task_of(recorded(memory.view, task))
            memory.routing.only(memory.tasks.index(number))
        kind = RoutedTexts if self.workspace.reads == "texts" else RoutedImages
        return kind(backbone, memory, precision)

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes that a version tells apart, in the order of its scores; none of texts."""
        return classes_of(view)
