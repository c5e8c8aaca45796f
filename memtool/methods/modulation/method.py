"""Modulation: whole adapters, recalled from an associative memory by a part of themselves.

    adapt        train one adapter per task
    write        append it to the store, and to every configured memory, one version each
    consolidate  train the task predictor, where the task of an input is not given
    retrieve     complete the adapter of a task from its key
    evaluate     accuracy, or loss, with recalled adapters against the exact ones, at any version

The key of an adapter is the first share of its own numbers; a memory gives back the rest. In til
the task of an input is known. In mts, and of texts, one more adapter with a head over the tasks
says which task it is; inputs of all tasks then run in one pass, each through its own recalled
adapter. A prompt keeps its adapter while it is answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import memtool_stores
from memtool.adapters.values import AdapterValues
from memtool.errors import ConfigError
from memtool.evaluation.inside import Inside
from memtool.evaluation.record import Record
from memtool.methods.attached import Attached, AttachedAdapters, TaskOf
from memtool.methods.export import require_new
from memtool.methods.in_store import classes_of
from memtool.methods.method import Method, newest_after_each, require_unmoved
from memtool.methods.modulation import predictor
from memtool.methods.modulation.attached import RecalledTexts
from memtool.methods.modulation.measure import (
    Seen,
    accuracies,
    answering,
    frozen_row,
    predictions,
    relative_errors,
    rows,
    share_predicted,
)
from memtool.methods.modulation.predictor import PREDICTED, PREDICTOR, Predictor
from memtool.methods.modulation.recallers import open_memory, recall_all, synchronise
from memtool.methods.modulation.retrieve import (
    asked_key,
    outcome_of,
    place_of,
    shares,
    write_recalled,
)
from memtool.methods.modulation.stored import Stored
from memtool.methods.records import numbered, recorded, task_of
from memtool.methods.results import PredictorResult, RecallResult, WrittenAdapter
from memtool.methods.subject import subject_of
from memtool.streams.task import Task


class Modulation(Method):
    """The five steps of Modulation over one configuration and seed."""

    reads: ClassVar[tuple[str, ...]] = ("images", "texts")
    version_each: ClassVar[bool] = True

    @property
    def has_head(self) -> bool:
        """Every adapter is used with the head that was trained with it, or of texts without."""
        return False

    # Write ----------------------------------------------------------------------------------

    def _require_settings(self) -> None:
        """A task has one adapter in these memories."""
        if self.config.adapter.per_task > 1:
            raise ConfigError(
                f"adapter.per_task is {self.config.adapter.per_task}",
                expected="1: Modulation recalls the one adapter of a task",
                remedy="--set adapter.per_task=1, or method mira",
            )

    def _also_commit(
        self, txn: memtool_stores.Transaction, added: Sequence[WrittenAdapter]
    ) -> None:
        """The memories take up what was added, in the same version."""
        del added
        tasks = [task_of(record) for record in txn.adapters]
        for number in tasks:
            if tasks.count(number) > 1:
                names = [r.name for r in txn.adapters if task_of(r) == number]
                raise ConfigError(
                    f"task {number} would have {len(names)} adapters: {', '.join(names)}",
                    expected="one adapter a task",
                    remedy="another --store, or method mira",
                )
        self._synchronise(txn)

    def _synchronise(self, txn: memtool_stores.Transaction) -> None:
        for name in self.config.modulation.memory:
            synchronise(txn, name, self.config.modulation, seed=self.seed)

    # Consolidate ----------------------------------------------------------------------------

    def task_written(self, task: Task) -> None:
        """Of texts consolidate: the version after each task tells the tasks so far apart."""
        del task
        if self.workspace.reads == "texts":
            self.consolidate()

    def all_written(self) -> None:
        """Consolidate: the predictor tells all tasks apart."""
        self.consolidate()

    def consolidate(self) -> PredictorResult:
        """Bring every memory up to date; where none is given, train the predictor on all tasks.

        A predictor of the same tasks and settings is left as it is.
        """
        begin = time.perf_counter()
        work, settings = self.workspace, self.config.modulation
        stored = self.stored()
        metadata = self._metadata("consolidate")
        trained, accuracy = None, None
        if self.config.stream.setting in PREDICTED:
            metadata["predictor"] = asked = predictor.made_with(work)
            known = Predictor.load(stored.view)
            same = known is not None and known.tasks == stored.tasks
            if not same or predictor.recorded(work.store, stored.version) != asked:
                trained, accuracy = predictor.train(work, stored)

        def commit(txn: memtool_stores.Transaction) -> None:
            require_unmoved(txn, stored.view)
            self._synchronise(txn)
            if trained is not None:
                txn.put_blob(PREDICTOR, trained.to_bytes())

        metadata["seconds"] = time.perf_counter() - begin
        words = f"consolidate tasks {numbered(stored.tasks)}"
        work.engine.on_main(lambda: work.store.run(commit, words, metadata=metadata))
        head = work.store.head()
        return PredictorResult(
            version=head,
            tasks=stored.tasks,
            memories=settings.memory,
            epochs=0 if trained is None else settings.predictor_epochs,
            seconds=time.perf_counter() - begin,
            train_task_accuracy=accuracy,
            unchanged=head == stored.version,
        )

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
    ) -> RecallResult:
        """Complete an adapter from its key, by the first configured memory.

        The key is that of a task, of the task that the predictor sees in an image or a prompt, or
        the tensor `query` of a safetensors file: (d_k,), or a whole adapter (numel,) of which the
        first d_k numbers count. `out` is a folder that the recalled adapter is written to.
        """
        shown = image if prompt is None else None  # an image may come with a prompt
        if sum(one is not None for one in (task, shown, prompt, query)) != 1:
            brought = "--prompt" if self.workspace.reads == "texts" else "--image"
            raise ConfigError(
                "what should recall?", expected=f"exactly one of --task, {brought} and --query"
            )
        if out is not None:
            require_new(out)
        work, name = self.workspace, self.config.modulation.memory[0]
        stored = self.read(version) if task is None else self.stored(version)
        memory = open_memory(name, stored.view, self.config.modulation)
        subject, place = None, None
        if query is None:
            subject = subject_of(work, task=task, image=image, prompt=prompt)
            place = place_of(work, stored, subject)
            key = memory.key_of(stored.values[place])
        else:
            key = asked_key(memory, work, query)
        recalled = memory.recall(key[None])
        found = recalled.patterns.float()
        own = stored.only(int(recalled.nearest[0]) if place is None else place)
        outcome = {} if subject is None else outcome_of(work, own, found[0], subject)
        if out is not None:
            write_recalled(work, own, found[0], out)
        return RecallResult(
            version=stored.version,
            subject=str(query) if subject is None else subject.words,
            memory=name,
            adapter=own.records[0].name,
            task=own.tasks[0],
            key_numbers=memory.key_length,
            stored=len(stored),
            recall_error=float(relative_errors(found, own.values)[0]),
            energy=float(recalled.energy[0]),
            novelty=float(recalled.novelty[0]),
            shares=shares(stored, recalled),
            out=out,
            **outcome,
        )

    # Evaluate -------------------------------------------------------------------------------

    def evaluate(
        self,
        *,
        setting: str | None = None,
        version: str = "HEAD",
        history: bool = False,
        compare: bool = False,
        command: str | None = None,
        preset: str | None = None,
    ) -> Record:
        """Accuracy, or the loss of texts, on the tasks in memory, by exact and recalled adapters.

        til: the task is known, a row for every memory and one for the exact adapters. mts, and of
        texts: the predictor says the task. `history` reads the version after each task, where it
        has what it needs; `compare` adds the frozen backbone: a language model as it is, or with a
        head per task (til), or over all classes (mts).
        """
        begin = time.perf_counter()
        setting, work = self._setting(setting), self.workspace
        stored = self.stored(version)
        tasks = [work.task(str(number)) for number in stored.tasks]
        given = setting not in PREDICTED
        through = self._through(stored, history=history, given=given)
        measured = rows(work, tasks, through, given=given)
        if compare:
            measured.append(frozen_row(work, tasks, given=given))
        return self._record(
            measured,
            tasks,
            setting=setting,
            version=stored.version,
            used=self.config,
            mix=None,
            separation=self.config.modulation.separation,
            seconds=time.perf_counter() - begin,
            command=command,
            preset=preset,
        )

    def inside(self, tasks: Sequence[Task], version: str = "HEAD") -> Inside:
        """Whose adapter the tasks' test samples get, where the task is predicted."""
        learned = super().inside(tasks, version)
        if self._setting(None) not in PREDICTED:
            return learned
        return predictions(self.workspace, self.stored(version), tasks).model_copy(
            update={"curves": learned.curves}
        )

    def _setting(self, given: str | None) -> str:
        """What is known at test time: as given, else as the stream was cut."""
        setting = given or self.config.stream.setting
        if self.workspace.reads == "texts" and setting != "trace":
            raise ConfigError(f"setting {setting!r} on tasks of texts", expected="trace")
        if self.workspace.reads == "images" and setting not in ("til", "mts"):
            raise ConfigError(
                f"setting {setting!r} cannot be evaluated by Modulation",
                expected="til, where the task is given, or mts, where it is predicted",
                remedy=f"--setting til, or method mira for {setting}",
            )
        return setting

    def _through(self, stored: Stored, *, history: bool, given: bool) -> Iterator[Stored]:
        """A version; with `history`, first the newest that knew its first i tasks, for every i.

        Where the task is not given, those of them that have a predictor of their tasks.
        """
        versions = {len(stored): stored.version}
        if history:
            log = self.workspace.store.log(stored.version)
            known = ((version.id, self.known_tasks(version.id)) for version in log)
            versions = {**newest_after_each(known, stored.tasks), **versions}
        for _, at in self.workspace.telling("evaluate", sorted(versions.items())):
            there = stored if at == stored.version else self.stored(at)
            tells = None if given else Predictor.load(there.view)
            if there is stored or given or (tells is not None and tells.tasks == there.tasks):
                yield there

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks whose adapters are in memory at a version."""
        return tuple(task_of(r) for r in self.workspace.store.view(version).adapters)

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks by the first memory: faa, and task_accuracy.

        A task without an adapter has a faa of 0. til counts every task as known. Of texts the loss.
        """
        setting, work = self._setting(setting), self.workspace
        settings, stored = self.config.modulation, self.stored(version)
        recalled = recall_all(settings.memory[0], stored.view, stored.values, settings)
        if work.reads == "texts":
            return self._measure_texts(stored, recalled, tasks)
        own = [stored.tasks.index(number) for number in tasks if number in stored.tasks]
        shown = [work.task(str(stored.tasks[place])).test for place in own]
        places = [torch.full((len(s),), place) for place, s in zip(own, shown, strict=True)]
        if setting == "mts":
            tells = Predictor.fitting(stored)
            places = [tells.predict(work, samples) for samples in shown]
        scores = accuracies(work, stored, recalled, shown, places)
        right = share_predicted(places, own) if setting == "mts" else 1.0
        return {"faa": sum(scores) / len(tasks), "task_accuracy": right}

    def _measure_texts(
        self, stored: Stored, values: Tensor, tasks: Sequence[int]
    ) -> dict[str, float]:
        """As `measure`, by these adapters (t, numel); prompts of a task without one go astray."""
        work = self.workspace
        shown = [work.task(str(number)) for number in tasks]
        seen = Seen.of(work, stored, shown)
        own = [stored.tasks.index(n) if n in stored.tasks else -1 for n in tasks]
        scores = answering(work, stored, values, seen.place_of).scores(shown, "measure")
        found = {
            "loss": sum(scores.losses) / len(tasks),
            "task_accuracy": share_predicted(seen.places, own),
        }
        if scores.scores is not None:
            found["faa"] = sum(scores.scores) / len(tasks)
        return found

    # Shared ---------------------------------------------------------------------------------

    def stored(self, version: str = "HEAD") -> Stored:
        """The adapters of a version, of the tasks of this stream; errors as `read`."""
        found = self.read(version)
        for record in found.records:
            self._require_same_task(record)
        return found

    def read(self, version: str = "HEAD") -> Stored:
        """The adapters of a version; the stream is not opened. Errors as `Stored.read`."""
        return Stored.read(self.workspace, version)

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> Attached:
        """A version as a module: its adapters as the first configured memory recalls them.

        `task` is that of every input; without one the predictor says it, where there is one.
        """
        stored, work, settings = self.read(version), self.workspace, self.config.modulation
        told = tells = None
        if task is not None:
            told = stored.tasks.index(task_of(recorded(stored.view, task)))
        else:
            found = Predictor.fitting(stored)
            tells = (found.values(work), found.head)
        recalled = recall_all(settings.memory[0], stored.view, stored.values, settings)
        values = AdapterValues.from_flat(recalled, work.layout, stored.scaling)
        if work.reads == "texts":
            of = TaskOf(told, tells)
            texts = RecalledTexts(work.backbone, stored, values, of, precision)
            return texts.to(work.backbone.device)
        attached = AttachedAdapters(
            work.backbone,
            values,
            stored.heads,
            precision,
            places=range(len(stored)),
            adapters=len(stored),
            told=told,
            predictor=tells,
        )
        return attached.to(work.backbone.device)

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes that a version tells apart, in the order of its scores; none of texts."""
        return classes_of(view)
