"""Modulation: whole adapters, recalled from an associative memory by a part of themselves.

    adapt        train one adapter per task
    write        append it to the store, and to every configured memory, one version each
    consolidate  mts: train the task predictor; til: there is nothing to learn
    retrieve     complete the adapter of a task from its key
    evaluate     accuracy with recalled adapters against the exact ones, at any version

The key of an adapter is the first share of its own numbers; a memory gives back the rest. In til
the task of an input is known. In mts one more adapter with a head over the tasks says which task
it is; inputs of all tasks then run in one pass, each through its own recalled adapter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch

import memtool_stores
from memtool.adapters.values import AdapterValues
from memtool.errors import ConfigError
from memtool.evaluation.record import Record
from memtool.methods.attached import AttachedAdapters, AttachedImages
from memtool.methods.export import require_new
from memtool.methods.in_store import classes_of
from memtool.methods.method import Method, newest_after_each, require_unmoved
from memtool.methods.modulation import predictor
from memtool.methods.modulation.measure import (
    accuracies,
    frozen_row,
    mts_rows,
    relative_errors,
    share_predicted,
    til_rows,
)
from memtool.methods.modulation.predictor import PREDICTOR, Predictor
from memtool.methods.modulation.recallers import (
    AdapterMemory,
    open_memory,
    recall_all,
    synchronise,
)
from memtool.methods.modulation.retrieve import Subject, prediction, shares, write_recalled
from memtool.methods.modulation.stored import Stored
from memtool.methods.records import recorded, task_of
from memtool.methods.results import PredictorResult, RecallResult, WrittenAdapter


class Modulation(Method):
    """The five steps of Modulation over one configuration and seed."""

    version_each: ClassVar[bool] = True
    has_baselines: ClassVar[bool] = False

    @property
    def has_head(self) -> bool:
        """Every adapter is used with the head that was trained with it."""
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

    def all_written(self) -> None:
        """Consolidate: the predictor tells all tasks apart."""
        self.consolidate()

    def consolidate(self) -> PredictorResult:
        """Bring every memory up to date; for mts, train the task predictor on all tasks.

        A predictor of the same tasks and settings is left as it is.
        """
        begin = time.perf_counter()
        work, settings = self.workspace, self.config.modulation
        stored = self.stored()
        metadata = self._metadata("consolidate")
        trained, accuracy = None, None
        if self.config.stream.setting == "mts":
            metadata["predictor"] = asked = predictor.made_with(self.config, self.seed)
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
        words = f"consolidate tasks {' '.join(str(number) for number in stored.tasks)}"
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

        The key is that of a task, of the task that the predictor sees in an image (mts), or the
        tensor `query` of a safetensors file: (d_k,), or a whole adapter (numel,) of which the first
        d_k numbers count. `out` is a folder that the recalled adapter is written to.
        """
        if prompt is not None or sum(one is not None for one in (task, image, query)) != 1:
            raise ConfigError(
                "what should recall?", expected="exactly one of --task, --image and --query"
            )
        if out is not None:
            require_new(out)
        work, name = self.workspace, self.config.modulation.memory[0]
        stored = self.read(version) if task is None else self.stored(version)
        memory = open_memory(name, stored.view, self.config.modulation)
        subject = self._subject(stored, memory, task, image, query)
        recalled = memory.recall(subject.key[None])
        found = recalled.patterns.float()
        nearest = int(recalled.nearest[0]) if subject.place is None else subject.place
        own = stored.only(nearest)
        accuracy, seen = None, None
        if subject.samples is not None:
            (accuracy,) = accuracies(work, own, found, [subject.samples])
        if subject.image is not None:
            seen = prediction(work, own, found[0], subject.image)
        if out is not None:
            write_recalled(work, own, found[0], out)
        return RecallResult(
            version=stored.version,
            subject=subject.words,
            memory=name,
            adapter=own.records[0].name,
            task=own.tasks[0],
            key_numbers=memory.key_length,
            stored=len(stored),
            recall_error=float(relative_errors(found, own.values)[0]),
            energy=float(recalled.energy[0]),
            novelty=float(recalled.novelty[0]),
            shares=shares(stored, recalled),
            prediction=seen,
            accuracy=accuracy,
            out=out,
        )

    def _subject(
        self,
        stored: Stored,
        memory: AdapterMemory,
        task: str | None,
        image: Path | None,
        query: Path | None,
    ) -> Subject:
        """The one that is not None."""
        if task is not None:
            return Subject.task(stored, memory, self.workspace.task(task))
        if image is not None:
            return Subject.picture(stored, memory, self.workspace, image)
        assert query is not None
        return Subject.query(memory, self.workspace, query)

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
        """Accuracy on the tasks in memory, with exact and with recalled adapters.

        til: the task is known, a row for every memory and one for the exact adapters. mts: the
        predictor says the task. `history` reads the version after each task (til); `compare` adds
        the frozen backbone with a head per task (til), or over all classes (mts).
        """
        begin = time.perf_counter()
        setting, work = self._setting(setting), self.workspace
        stored = self.stored(version)
        tasks = [work.task(str(number)) for number in stored.tasks]
        if setting == "til":
            rows = til_rows(work, stored, tasks, self._through(stored, history=history))
        else:
            rows = mts_rows(work, stored, tasks)
        if compare:
            rows.append(frozen_row(work, tasks, given=setting == "til"))
        return self._record(
            rows,
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

    def _setting(self, given: str | None) -> str:
        """What is known at test time: as given, else as the stream was cut."""
        setting = given or self.config.stream.setting
        if setting not in ("til", "mts"):
            raise ConfigError(
                f"setting {setting!r} cannot be evaluated by Modulation",
                expected="til, where the task is given, or mts, where it is predicted",
                remedy=f"--setting til, or method mira for {setting}",
            )
        return setting

    def _through(self, stored: Stored, *, history: bool) -> Iterator[Stored]:
        """A version; with `history`, first the newest that knew its first i tasks, for every i."""
        versions = {len(stored): stored.version}
        if history:
            log = self.workspace.store.log(stored.version)
            known = ((version.id, self.known_tasks(version.id)) for version in log)
            versions = {**newest_after_each(known, stored.tasks), **versions}
        for _, at in self.workspace.telling("evaluate", sorted(versions.items())):
            yield stored if at == stored.version else self.stored(at)

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks whose adapters are in memory at a version."""
        return tuple(task_of(r) for r in self.workspace.store.view(version).adapters)

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks by the first memory: faa, and task_accuracy.

        A task without an adapter scores 0. til counts every task as known.
        """
        setting, work = self._setting(setting), self.workspace
        settings, stored = self.config.modulation, self.stored(version)
        recalled = recall_all(settings.memory[0], stored.view, stored.values, settings)
        own = [stored.tasks.index(number) for number in tasks if number in stored.tasks]
        shown = [work.task(str(stored.tasks[place])).test for place in own]
        places = [torch.full((len(s),), place) for place, s in zip(own, shown, strict=True)]
        if setting == "mts":
            tells = Predictor.fitting(stored)
            places = [tells.predict(work, samples.images) for samples in shown]
        scores = accuracies(work, stored, recalled, shown, places)
        right = share_predicted(places, own) if setting == "mts" else 1.0
        return {"faa": sum(scores) / len(tasks), "task_accuracy": right}

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
    ) -> AttachedImages:
        """A version as a module: its adapters as the first configured memory recalls them.

        `task` is that of every input; without one the predictor says it, where there is one.
        """
        stored, work, settings = self.read(version), self.workspace, self.config.modulation
        told = tells = None
        if task is not None:
            told = stored.tasks.index(task_of(recorded(stored.view, task)))
        else:
            found = Predictor.fitting(stored)
            value = AdapterValues.from_flat(found.value[None], work.layout, found.scaling)
            tells = (value, found.head)
        recalled = recall_all(settings.memory[0], stored.view, stored.values, settings)
        attached = AttachedAdapters(
            work.backbone,
            AdapterValues.from_flat(recalled, work.layout, stored.scaling),
            stored.heads,
            precision,
            places=range(len(stored)),
            adapters=len(stored),
            told=told,
            predictor=tells,
        )
        return attached.to(work.backbone.device)

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes that a version tells apart, in the order of its scores."""
        return classes_of(view)
