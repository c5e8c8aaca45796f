"""MIRA: adapters in a memory of learned keys, recalled per sample without a task label.

    adapt        train J adapters per task (stage 1)
    write        append them to the store, one version
    consolidate  learn the keys (stage 2), one version
    retrieve     which mixture does this input recall?
    evaluate     accuracy on every task, at any version

The first two are what all methods do (`memtool.methods.method`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

import memtool_stores
from memtool.errors import (
    ConfigError,
    MismatchError,
    NotFoundError,
)
from memtool.evaluation.course import Course
from memtool.evaluation.inside import Inside
from memtool.evaluation.record import Record, Row
from memtool.learning.known import frozen_scores, is_fixed, learned_under
from memtool.methods.attached import AttachedImages
from memtool.methods.export import require_new
from memtool.methods.in_store import classes_of
from memtool.methods.kept import fingerprint_of
from memtool.methods.method import Method, newest_after_each
from memtool.methods.mira.attached import AttachedMixture, attached_alone
from memtool.methods.mira.consolidate import consolidate, require_can_learn
from memtool.methods.mira.inventory import consolidated_before
from memtool.methods.mira.look import width_of
from memtool.methods.mira.maps import key_map, weight_map
from memtool.methods.mira.measure import Measure, drift, held_out_of
from memtool.methods.mira.read import DECODERS
from memtool.methods.mira.recall import MemoryModel, memory_blocks
from memtool.methods.mira.retrieve import retrieved
from memtool.methods.mira.state import QUERY_MODULES, MemoryState, Snapshot
from memtool.methods.outcome import share_right
from memtool.methods.records import out_of_runs, recorded, task_of
from memtool.methods.results import ConsolidateResult, RetrieveResult
from memtool.settings import AT_ONCE, Config
from memtool.streams.task import Task
from memtool.tensor_bytes import load_arrays

if TYPE_CHECKING:
    from memtool.methods.explanation import Explanation
    from memtool.methods.retrospect import Choices, Moment

SETTINGS = ("dil", "til", "cil", "vil", "dg", "dgcl", "mtl", "xtail")
"""Settings that `evaluate` knows: task inferred (dil, cil, vil, mtl, xtail), given (til), or never
seen (dg; dgcl beside the tasks)."""


class Mira(Method):
    """The five steps over one configuration and seed."""

    reads: ClassVar[tuple[str, ...]] = ("images", "texts")
    any_layout: ClassVar[bool] = True
    consolidates: ClassVar[str | None] = "keys and head"
    measures_unseen: ClassVar[bool] = True

    @classmethod
    def open(cls, config: Config, **given: Any) -> Any:
        """As `Method.open`; over texts it is a memory of prompts."""
        if config.stream.setting == "trace":
            from memtool.methods.mira.prompts import PromptMemory

            return PromptMemory.open(config, **given)
        return super().open(config, **given)

    @property
    def key_epochs(self) -> int:
        """Epochs of key learning."""
        return self.config.consolidate.epochs

    def reading_numbers(self, view: memtool_stores.MemoryView) -> int:
        """As `Method.reading_numbers`: keys, query modules and decoders."""
        found = {name: view.blob(name) for name in (QUERY_MODULES, DECODERS) if view.has_blob(name)}
        arrays = [a for n, data in found.items() for a in load_arrays(data, f"blob {n!r}").values()]
        return super().reading_numbers(view) + sum(int(array.bits.size) for array in arrays)

    def cost(self, *, numbers: int, parameters: int, tokens: int) -> Mapping[str, Any]:
        """What an image costs beside the pass under what it recalls: see `ImageCost`."""
        from memtool.methods.mira.cost import image_cost

        del numbers, parameters, tokens
        work = self.workspace
        return asdict(image_cost(self.config, work.stream, work.backbone, work.layout))

    def require_able(self) -> None:
        """As `Method.require_able`: key learning, the blocks that are looked at or have a memory,
        and the head.
        """
        memory, backbone = self.config.memory, self.workspace.backbone
        require_can_learn(self.config)
        width_of(memory, backbone, memory_blocks(memory, backbone, self.workspace.layout.blocks))
        self.workspace.require_fitting(())

    def _beneath(self, task: Task) -> tuple[MemoryModel | None, str]:
        """The consolidated memory, where adapters are residual; none before the first task."""
        if not self.config.adapter.residual or not self.workspace.has_store:
            return None, ""
        snapshot = self.snapshot()
        if snapshot.state is None or task.number in snapshot.state.tasks:
            return None, ""
        if snapshot.state.memory.mix != "delta":
            raise ConfigError(
                f"an adapter on top of a memory of mix {snapshot.state.memory.mix!r}",
                expected="mix delta: what is added stays added",
                remedy="--mix delta, or --set adapter.residual=false",
            )
        return snapshot.model, snapshot.version

    def _fingerprint(self, task: Task) -> str:
        """As ever; under a head that knows all classes also of what that head is."""
        decides = super()._fingerprint(task)
        fixed = learned_under(self.config, self.workspace.stream)
        return fingerprint_of({"trained": decides, "head": fixed}) if fixed else decides

    # Consolidate ----------------------------------------------------------------------------

    def consolidate(self) -> ConsolidateResult:
        """Give every adapter in memory its key, and solve the head; one version.

        Only the images of tasks that were not consolidated before are read. Running it again
        without new adapters or other settings changes nothing. Errors as
        `memtool.methods.mira.consolidate.consolidate`.
        """
        began = time.perf_counter()
        done = consolidated_before(self.workspace) if self.workspace.has_store else None
        if done is not None:
            return done
        snapshot = self.snapshot(recalls=self.config.adapter.residual)
        metadata = self._metadata("consolidate")
        return consolidate(self.workspace, snapshot, began=began, metadata=metadata)

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
        """The mixture that a task's test images, one image, or a query recall.

        `query` is a safetensors file with a tensor `query` (d,) or (memories, d): what a memory
        would be asked. `out` is a folder that the recalled adapter is written to as a PEFT
        directory (the mean coefficients, exact for them).
        """
        if prompt is not None or sum(one is not None for one in (task, image, query)) != 1:
            raise ConfigError(
                "what should recall?", expected="exactly one of --task, --image and --query"
            )
        if out is not None:
            require_new(out)
        snapshot = self.read(version) if task is None else self.snapshot(version)
        return retrieved(self.workspace, snapshot, task=task, image=image, query=query, out=out)

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
        """Accuracy on the test images of every task that the memory has learned.

        `setting` dil, cil, vil, mtl and xtail infer the task; til is given it and recalls its
        adapter exactly, with the head trained with it; dg measures on the domain that is held out,
        dgcl on it and on the others.
        `history` reads the version after each task and fills the whole matrix, and says how far old
        coefficients drifted: of earlier versions what nobody measured before. `compare` adds hard
        choice, uniform mixture and the oracle adapter.
        `unseen` has a column for every task of the stream, learned or not (none: in xtail). Raises
        ConfigError for it where the task is given or no task is learned in turn.
        """
        begin = time.perf_counter()
        setting = self._setting(setting)
        snapshot = self.snapshot(version)
        measure = Measure(self.workspace)
        learned = self._learned(snapshot, setting)
        shown = learned
        if unseen and setting in ("til", *AT_ONCE):
            raise ConfigError(
                f"--unseen under setting {setting}",
                expected="a setting that infers the task: dil, cil, vil, dgcl or xtail",
                remedy="memtool eval without --unseen",
            )
        if unseen or (unseen is None and setting == "xtail"):
            there = {task.number for task in learned}
            shown = [*learned, *(t for t in self.workspace.stream.tasks if t.number not in there)]
        if setting == "dg":
            shown = [held_out_of(self.workspace.stream)]
            rows = [measure.generalised(snapshot, learned, shown)]
        elif setting == "til":
            versions = {len(learned): snapshot.version}
            if history:
                versions = self._history(snapshot, learned, "til")
            matrix = measure.told(versions, learned, self.snapshot)
            rows = [Row.measured("memory", "task given, exact recall", "method", matrix)]
        else:
            rows = [self._in_turn(snapshot, learned, shown, history=history)]
        if compare and setting != "til":
            rows += measure.other_ways(snapshot, learned, shown)
        return self.record(
            rows,
            shown,
            setting=setting,
            snapshot=snapshot,
            seconds=time.perf_counter() - begin,
            command=command,
            preset=preset,
        )

    def _in_turn(
        self, snapshot: Snapshot, learned: Sequence[Task], shown: Sequence[Task], *, history: bool
    ) -> Row:
        """The memory on all tasks, after each of them or after the last; `shown` begin as learned.

        Under a head that knows all classes also before the first of them.
        """
        measure = Measure(self.workspace)
        versions = {len(learned): snapshot.version}
        if history:
            versions = self._history(snapshot, learned, "dil")
        course = Course(shown, self.workspace.unseen)
        if history and is_fixed(self.config) and snapshot.consolidated()[2].of_directions:
            frozen = [
                share_right(frozen_scores(self.workspace, task.test.images), task.test)
                for task in course.tested
            ]
            course.add(0, frozen)
        then: dict[int, Tensor] = {}
        more: dict[str, float] = {}
        for count, at in self.workspace.telling("evaluate", sorted(versions.items())):
            if at != snapshot.version:
                found = measure.earlier(at, self.snapshot, course.tested, count - 1)
                course.add(count, found[0])
                then[count] = found[1]
                continue
            scored = measure.scores(snapshot, course.tested)
            course.add(count, scored.accuracy)
            then[count] = scored.coefficients[count - 1]
            more["task_accuracy"] = scored.task_accuracy
            if history:
                measure.keep(snapshot.view, course.tested, scored, count - 1)
        if len(then) == len(learned):
            before = [then[count] for count in range(1, len(learned))]
            more |= drift(before, scored.coefficients[: len(learned) - 1])
        more |= scored.more
        ms = scored.ms_per_input
        return course.row("memory", "memory", "method", more=more, ms_per_input=ms)

    def _setting(self, setting: str | None) -> str:
        """What is known at test time, checked; without a word, as the tasks were cut."""
        setting = setting or self.config.stream.setting
        if setting not in SETTINGS:
            raise ConfigError(
                f"setting {setting!r} cannot be evaluated from one memory",
                expected=" or ".join(SETTINGS),
            )
        cut = self.workspace.stream.setting
        if setting not in ("til", cut):
            raise ConfigError(
                f"setting {setting!r} on tasks that were cut for {cut!r}",
                expected=f"til or {cut}",
                remedy=f"--set stream.setting={setting} and a memory that was trained so",
            )
        return setting

    def record(
        self,
        rows: Sequence[Row],
        learned: Sequence[Task],
        *,
        setting: str,
        snapshot: Snapshot,
        seconds: float,
        command: str | None = None,
        preset: str | None = None,
    ) -> Record:
        """The record of rows measured on the learned tasks at a version."""
        state = snapshot.state
        settings = state.memory if state else self.config.memory
        used = self.config
        if state is not None:
            # What the memory was consolidated with, whatever the configuration says now.
            used = used.model_copy(update={"memory": state.memory, "head": state.head})
        return self._record(
            rows,
            learned,
            setting=setting,
            version=snapshot.version,
            used=used,
            mix=settings.mix,
            separation=settings.separation,
            seconds=seconds,
            command=command,
            preset=preset,
        )

    def _learned(self, snapshot: Snapshot, setting: str) -> list[Task]:
        """The tasks in the order in which they were learned."""
        if setting == "til":
            numbers = list(dict.fromkeys(task_of(record) for record in snapshot.view.adapters))
            if not numbers:
                raise NotFoundError(
                    f"the memory holds no adapters at version {snapshot.version}",
                    remedy="memtool write",
                )
        else:
            numbers = list(snapshot.consolidated()[0].tasks)
        return [self.workspace.task(str(number)) for number in numbers]

    def _history(self, snapshot: Snapshot, learned: Sequence[Task], setting: str) -> dict[int, str]:
        """The newest version at which the first i tasks, and no more, were learned, for every i."""
        store = self.workspace.store

        def known(version: memtool_stores.Version) -> tuple[int, ...]:
            if setting != "til":
                return out_of_runs(version.metadata.get("learned") or ())
            records = store.view(version.id).adapters
            return tuple(dict.fromkeys(task_of(record) for record in records))

        history = ((version.id, known(version)) for version in store.log(snapshot.version))
        return newest_after_each(history, [task.number for task in learned])

    def after_each(self, tasks: Sequence[Task], version: str = "HEAD") -> list[str]:
        """The newest versions before `version` after each of `tasks`, learned in this order.

        Raises NotFoundError for a task that no version was consolidated after.
        """
        found = self._history(self.snapshot(version), tasks, "dil")
        for count, task in enumerate(tasks, start=1):
            if count not in found:
                raise NotFoundError(
                    f"no version of {self.workspace.store_path!r} after task {task.number} "
                    f"{task.name} alone was consolidated",
                    remedy="memtool run, in another --store",
                )
        return [found[count] for count in range(1, len(tasks) + 1)]

    def look_back(self, tasks: Sequence[Task]) -> list[Moment]:
        """As `LooksBack.look_back`: keys and weights of old inputs after each task."""
        from memtool.methods.mira.interference import look_back

        return look_back(self, tasks)

    def choices(self, pair: tuple[Task, Task]) -> Choices:
        """As `LooksBack.choices`."""
        from memtool.methods.mira.interference import choices

        return choices(self, pair)

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks that a version can be measured on; none before consolidation."""
        view = self.workspace.store.view(version)
        if self.config.stream.setting == "til":
            return tuple(dict.fromkeys(task_of(record) for record in view.adapters))
        state = MemoryState.load(view)
        return state.tasks if state is not None and view.keys() is not None else ()

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks: faa, task_accuracy. Errors as `evaluate`.

        Where the task is given, one without an adapter scores 0.
        """
        setting = self._setting(setting)
        measure = Measure(self.workspace)
        snapshot = self.snapshot(version)
        shown = [self.workspace.task(str(number)) for number in tasks]
        if setting == "til":
            here = {task_of(record) for record in snapshot.view.adapters}
            own = [measure.own_accuracy(snapshot, task) for task in shown if task.number in here]
            return {"faa": sum(own) / len(tasks), "task_accuracy": 1.0}
        scored = measure.scores(snapshot, shown)
        mean = sum(scored.accuracy) / len(scored.accuracy)
        return {"faa": mean, "task_accuracy": scored.task_accuracy}

    def explain(
        self, *, layer: str | None = None, block: int | None = None, **subject: Any
    ) -> Explanation:
        """Why an image is recognised as what it is; arguments as in `explain.explain`."""
        from memtool.methods.mira.explain import explain

        if layer is not None or block is not None:
            raise ConfigError(
                f"--layer and --block under method {self.config.method}",
                expected="method moram, where every adapted map has atoms of its own",
            )
        return explain(self, **subject)

    # Around the steps of a run --------------------------------------------------------------

    def task_written(self, task: Task) -> None:
        """Consolidate what was written of a task, unless its keys are there already.

        Tasks that are learned at once are consolidated together: see `all_written`.
        """
        if self.config.stream.setting in AT_ONCE:
            return
        state = self.snapshot().state
        if state is None or task.number not in state.tasks:
            self.consolidate()

    def all_written(self) -> None:
        """Consolidate tasks that are learned at once, together, unless that is done already."""
        if self.config.stream.setting in AT_ONCE and self.snapshot().state is None:
            self.consolidate()

    def inside(self, tasks: Sequence[Task], version: str = "HEAD") -> Inside:
        """What the tasks' test images recall, examples, and keys.

        Nothing is recalled where every task is given (til).
        """
        keys = key_map(self.snapshot(version))
        shown = (
            Inside() if self.config.stream.setting == "til" else weight_map(self, tasks, version)
        )
        learned = super().inside(tasks, version).curves
        return shown.model_copy(update={"keys": keys, "curves": learned})

    def require_same_settings(self, remedy: str) -> None:
        """Raise ConfigError where the memory was consolidated by other settings than these."""
        state, config = self.snapshot().state, self.config
        where = f"the memory {self.workspace.store_path!r} was consolidated with other "
        if state is not None and state.consolidate != config.consolidate:
            raise ConfigError(where + "keys or epochs", remedy=remedy)
        if state is not None and (state.memory, state.head) != (config.memory, config.head):
            raise ConfigError(where + "settings", remedy=remedy)

    # Shared ---------------------------------------------------------------------------------

    def read(self, version: str = "HEAD", *, recalls: bool = True) -> Snapshot:
        """The memory at a version, on the device; the stream is not opened.

        One that need not recall holds none of its values but one.
        """
        work, held = self.workspace, self.config.engine.resident if recalls else 0
        return Snapshot.read(work.store, work.version_of(version), work.backbone, work.layout, held)

    def snapshot(self, version: str = "HEAD", *, recalls: bool = True) -> Snapshot:
        """As `read`, and the stream is that which the memory was trained on."""
        work, snapshot = self.workspace, self.read(version, recalls=recalls)
        state = snapshot.state
        if state is not None and state.class_names != work.stream.class_names:
            raise MismatchError(
                f"the classes of {work.stream.name} are not those of the memory's head",
                expected=", ".join(state.class_names[:8]),
                remedy="the stream that the memory was trained on, or another --store",
            )
        for record in snapshot.view.adapters:
            self._require_same_task(record)
        return snapshot

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> AttachedImages:
        """A version as a module; with `task` the exact adapter of that task and its own head.

        Raises ConfigError for a memory that was never consolidated, and for a task of several
        adapters; NotFoundError for a task that is not there.
        """
        snapshot = self.read(version)
        if task is None:
            return AttachedMixture(snapshot, precision)
        return attached_alone(
            self.workspace.backbone,
            snapshot,
            recorded(snapshot.view, task),
            self.config.head,
            precision,
        )

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes that a version tells apart, in the order of its scores."""
        state = MemoryState.load(view)
        return state.class_names if state is not None else classes_of(view)
