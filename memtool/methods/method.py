"""What every method does alike: train the adapters of a task, and append them to the memory.

A method says what happens on the arrows of the one flow (adapt, write, consolidate, retrieve,
evaluate). The first two are here; the folder of each method adds how a memory is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

import memtool_stores
from memtool.alone import alone
from memtool.errors import (
    AlreadyExistsError,
    ChangedMeanwhileError,
    ConfigError,
    MismatchError,
)
from memtool.evaluation.record import (
    BackboneIdentity,
    DataIdentity,
    Environment,
    Metrics,
    Record,
    Row,
    Run,
    TaskIdentity,
)
from memtool.learning.adapt import Adapted, Beneath, adapt
from memtool.learning.learner import Learner
from memtool.methods.exchange import AdapterFolder, write_adapter
from memtool.methods.export import require_new
from memtool.methods.in_store import classifier_bytes
from memtool.methods.kept import fingerprint_of
from memtool.methods.records import number_of, task_of
from memtool.methods.results import AdaptResult, PruneResult, WriteResult
from memtool.methods.writing import AdapterWriter
from memtool.paths import without_home
from memtool.progress import Progress
from memtool.reports.figures import Pictures
from memtool.settings import Config
from memtool.streams.task import Task
from memtool.workspace import Workspace, require_learnable


@dataclass(frozen=True, eq=False)
class Trained:
    """The adapters of a task after training.

    `source` says in words what training started from; `beneath` is the digest of what they were
    trained on top of, where they mean nothing without it.
    """

    adapted: Adapted
    source: str
    beneath: str = ""


class Method(AdapterWriter[Workspace]):
    """The steps that all methods share, over one configuration and seed."""

    reads: ClassVar[tuple[str, ...]] = ("images",)
    """What it learns from: "images", "texts"."""
    consolidates: ClassVar[str | None] = ""
    """What consolidation learns, in words; None of a method that has nothing to learn there."""
    has_baselines: ClassVar[bool] = True
    """Whether a run measures baselines beside the memory."""
    measures_unseen: ClassVar[bool] = False
    """Whether it can be evaluated on tasks that are not in memory."""

    @classmethod
    def open(
        cls,
        config: Config,
        *,
        seed: int,
        progress: Progress | None = None,
        adapters: Path | None = None,
    ) -> Self:
        """Nothing is read yet: stream, backbone and store open when first needed.

        `adapters` as in `Workspace`.
        """
        return cls(Workspace(config, seed=seed, progress=progress, adapters=adapters))

    # What a method says of itself -----------------------------------------------------------

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `measure` can give of one version on a fixed set of tasks; the first one matters."""
        of_answers = ("faa", "task_accuracy")
        return ("loss", *of_answers) if self.workspace.reads == "texts" else of_answers

    @property
    def has_head(self) -> bool:
        """Whether retrieval ends in a head of the configured kind; a language model has its own."""
        return self.workspace.reads != "texts"

    @property
    def key_epochs(self) -> int | None:
        """Epochs of key learning; None of a method without keys to learn."""
        return None

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks that a version can be measured on."""
        raise NotImplementedError

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """The `metrics` of a version, means over the given tasks, where they can be had."""
        raise NotImplementedError

    # What only some can ---------------------------------------------------------------------

    def explain(
        self,
        *,
        task: str | None = None,
        image: Path | None = None,
        prompt: str | None = None,
        layer: str | None = None,
        block: int | None = None,
        version: str = "HEAD",
        out: Path | None = None,
    ) -> Any:
        """Why an input, or the test samples of a task, is recognised as what it is.

        `layer` and `block` name an adapted map; `out` is a plot (.svg, .png) or a page (.html).
        Raises ConfigError where a method cannot say it.
        """
        del task, image, prompt, layer, block, version, out
        raise ConfigError(
            f"explain is about mixtures; method {self.config.method} recalls adapters whole",
            expected="method mira, or moram for its atoms",
            remedy="memtool retrieve, which says how well an adapter was recalled",
        )

    def dead_atoms(self, below: float) -> PruneResult:
        """Which atoms add less than `below` of the average, and what taking them out does."""
        del below
        raise ConfigError(
            f"--atoms-below under method {self.config.method}",
            expected="method moram, whose memory is made of atoms",
            remedy="--preset moram, as the memory was made with, or --set method=moram",
        )

    def prune(self, found: PruneResult) -> PruneResult:
        """Take the atoms that `dead_atoms` found out of the memory, as one version."""
        raise NotImplementedError  # `dead_atoms` has refused

    # Around the steps of a run --------------------------------------------------------------

    def task_written(self, task: Task) -> None:
        """What a run does once the adapters of a task are in memory: here nothing."""

    def all_written(self) -> None:
        """What a run does once the adapters of all tasks are in memory: here nothing."""

    def require_same_settings(self, remedy: str) -> None:
        """Raise ConfigError where a run cannot go on in what the memory is; here it always can."""
        del remedy

    def pictures(self, tasks: Sequence[Task]) -> Pictures:
        """What a report shows of the memory beside the tables; here nothing."""
        del tasks
        return Pictures()

    # Adapt ----------------------------------------------------------------------------------

    def adapt(self, task: str, *, fresh: bool = False) -> list[AdaptResult]:
        """Train the adapters of a task and write each as a PEFT directory under `runs`.

        A finished one of the same settings is left as it is, unless `fresh`; an interrupted one
        goes on where it was. Raises AlreadyExistsError for a finished one of other settings,
        BusyError while another process trains the same, CorruptError for a file that is not what
        was written.
        """
        work = self.workspace
        chosen = work.task(task)
        self._require_learnable(chosen)
        fingerprint = self._fingerprint(chosen)
        folders = [AdapterFolder(work.adapter_folder / name) for name in self.adapter_names(chosen)]
        finished = self._finished(folders, fingerprint, fresh)
        if finished:
            return finished
        lock = work.adapter_folder / f".{folders[0].path.name}.lock"
        with ExitStack() as held:
            doing = f"training {folders[0].path}"
            work.engine.on_main(lambda: held.enter_context(alone(lock, doing)))
            # Another process may have finished them since.
            return self._finished(folders, fingerprint, fresh) or self._trained(
                chosen, folders, fingerprint, fresh
            )

    def _finished(
        self, folders: Sequence[AdapterFolder], fingerprint: str, fresh: bool
    ) -> list[AdaptResult]:
        """What there is of these adapters already; empty where they are to be trained."""
        complete = [folder for folder in folders if folder.is_complete]
        for folder in folders:
            if folder not in complete:
                require_new(folder.path)
        if fresh or not complete:
            return []
        if any(folder.about().fingerprint != fingerprint for folder in complete):
            raise AlreadyExistsError(
                f"{complete[0].path} was trained with other settings, data or backbone",
                remedy="the same command with --fresh, or with --set runs=DIR",
            )
        if len(complete) < len(folders):
            return []
        return [folder.result().model_copy(update={"skipped": True}) for folder in folders]

    def _trained(
        self, chosen: Task, folders: Sequence[AdapterFolder], fingerprint: str, fresh: bool
    ) -> list[AdaptResult]:
        """Train adapters and write them; the caller holds their lock."""
        work = self.workspace
        names = [folder.path.name for folder in folders]
        # A file for each set of settings: none loses the progress of another.
        checkpoint = work.adapter_folder / f".{names[0]}-{fingerprint[:8]}.checkpoint"
        if fresh:
            work.engine.on_main(lambda: checkpoint.unlink(missing_ok=True))
        training = self._train(chosen, fingerprint, checkpoint)
        trained = training.adapted
        accuracies = trained.train_accuracy or (None,) * len(folders)
        results = [
            AdaptResult(
                path=folder.path,
                name=name,
                task=chosen.number,
                task_name=chosen.name,
                seed=self.seed,
                train_accuracy=accuracy,
                loss=trained.fit.losses[-1] / self.config.adapter.per_task,
                seconds=trained.fit.seconds,
                parameters=work.layout.numel,
                bytes=work.layout.numel * 4,
                resumed=trained.fit.resumed_at > 0,
            )
            for name, folder, accuracy in zip(names, folders, accuracies, strict=True)
        ]

        def write_all() -> None:
            heads = [head.of_classes(chosen.classes) for head in trained.heads]
            for index, (folder, result) in enumerate(zip(folders, results, strict=True)):
                write_adapter(
                    folder,
                    work,
                    chosen,
                    value=trained.values[index],
                    head=classifier_bytes(heads[index]) if heads else None,
                    result=result,
                    fingerprint=fingerprint,
                    warm_start=training.source,
                    beneath=training.beneath,
                )
            checkpoint.unlink(missing_ok=True)

        work.engine.on_main(write_all)
        return results

    def _train(self, task: Task, fingerprint: str, checkpoint: Path) -> Trained:
        """Train the adapters of a task; an interrupted training goes on from the checkpoint."""
        work = self.workspace
        if work.reads == "texts":
            return self._train_on_texts(task, fingerprint, checkpoint)
        start, source = self._warm_start(task)
        beneath, version = self._beneath(task)
        if beneath is not None:
            source = f"{source} on top of version {version}"
        adapted = adapt(
            work.engine,
            work.backbone,
            work.layout,
            task.train,
            classes=task.classes,
            class_count=len(work.stream.class_names),
            adapter=self.config.adapter,
            train=self.config.train,
            seed=work.training_seed(task.number),
            start=start,
            beneath=beneath,
            fingerprint=f"{fingerprint} {source}",
            checkpoint=checkpoint,
            progress=work.progress,
            stage=self.stage(task),
        )
        return Trained(adapted, source)

    def _train_on_texts(self, task: Task, fingerprint: str, checkpoint: Path) -> Trained:
        """One adapter, from zero: a language model brings its head.

        Raises ConfigError for several adapters a task, and for another start.
        """
        work, adapter = self.workspace, self.config.adapter
        if adapter.per_task > 1 or adapter.warm_start != "none" or adapter.residual:
            raise ConfigError(
                "adapter.per_task, adapter.warm_start or adapter.residual on a stream of texts",
                expected="one adapter a task, which starts at zero",
                remedy="--set adapter.per_task=1 --warm-start none --set adapter.residual=false",
            )
        work.require_fitting([task])
        learner = Learner(work, 1)
        learner.values = work.fresh(1, task.number)
        stage = self.stage(task)
        fit = learner.learn(task, stage, fingerprint=fingerprint, checkpoint=checkpoint)
        return Trained(Adapted(learner.values.flat().float().cpu(), (), (), fit), "zero")

    def _fingerprint(self, task: Task) -> str:
        """The hash of all that decides what training a task gives."""
        work = self.workspace
        decides = {
            "backbone": work.backbone.sha256,
            "stream": work.stream.fingerprint,
            "task": task.number,
            "targets": self.config.backbone.targets,
            "adapter": self.config.adapter.model_dump(mode="json"),
            "train": self.config.train.model_dump(mode="json"),
            "seed": self.seed,
        }
        if work.reads == "texts":
            learning = {"prompt_tokens", "answer_tokens", "long_prompts", "dropout"}
            text = self.config.text.model_dump(mode="json", include=learning)
            decides |= {"text": text, "epochs": work.epochs(task)}
        return fingerprint_of(decides)

    def _require_learnable(self, task: Task) -> None:
        """Raise DataError for a task without images of two classes."""
        if self.workspace.reads == "images":
            require_learnable(task)

    def _warm_start(self, task: Task) -> tuple[Tensor | None, str]:
        """The value that training starts from, and a word for it: the ids it was made of."""
        kind = self.config.adapter.warm_start
        if kind == "none" or not self.workspace.has_store:
            return None, "zero"
        view = self.workspace.store.view("HEAD")
        earlier = [
            record
            for record in view.adapters
            if 0 < (number_of(record) or 0) < task.number
            and record.meta.get("seed") in (None, self.seed)
        ]
        if kind == "previous" and earlier:
            last = max(task_of(record) for record in earlier)
            earlier = [record for record in earlier if task_of(record) == last]
        if not earlier:
            return None, "zero"
        values = torch.from_numpy(view.values([record.id for record in earlier]).copy())
        return values.mean(dim=0), " ".join(record.id for record in earlier)

    def _beneath(self, task: Task) -> tuple[Beneath | None, str]:
        """The memory that a residual adapter is trained on top of, and its version."""
        if self.config.adapter.residual:
            raise ConfigError(
                f"residual adapters under method {self.config.method}, task {task.number}",
                expected="method mira, whose mixtures an adapter can be added to",
            )
        return None, ""

    def learn(self, task: Task, *, fresh: bool = False) -> None:
        """Train and write the adapters of a task, unless it was done; `fresh` as in `adapt`."""
        self.adapt(str(task.number), fresh=fresh)
        folder = self.workspace.adapter_folder
        self.write([folder / name for name in self.adapter_names(task)])

    def stage(self, task: Task) -> str:
        """What progress calls the training of a task."""
        return f"task {task.number}/{self.workspace.stream.count} {task.name}: adapt"

    def adapter_names(self, task: Task) -> list[str]:
        """Names of the adapters of a task, one folder each."""
        stem = f"task-{task.number}-seed-{self.seed}"
        count = self.config.adapter.per_task
        return [stem] if count == 1 else [f"{stem}-adapter-{j + 1}" for j in range(count)]

    # Write ----------------------------------------------------------------------------------

    def write(
        self,
        directories: Sequence[Path] | None = None,
        *,
        task: str | None = None,
        as_atoms: bool = False,
    ) -> WriteResult:
        """As `AdapterWriter.write`, in one of several processes."""
        write = partial(super().write, directories, task=task, as_atoms=as_atoms)
        return self.workspace.engine.on_main(write)

    # Shared ---------------------------------------------------------------------------------

    def _require_same_task(self, record: memtool_stores.AdapterRecord) -> None:
        """An adapter in memory belongs to the task of its number in this stream."""
        number, name = record.meta.get("task"), record.meta.get("task_name")
        if name is None:
            return
        here = self.workspace.task(str(number))
        if here.name != name:
            raise MismatchError(
                f"adapter {record.name!r} was trained on task {number} {name!r}; task {number} "
                f"of this stream is {here.name!r}",
                remedy="the stream settings that the memory was trained with "
                "(memtool show says them), or another --store",
            )

    def _record(
        self,
        rows: Sequence[Row],
        learned: Sequence[Task],
        *,
        setting: str,
        version: str,
        used: Config,
        mix: str | None,
        separation: str | None,
        seconds: float,
        command: str | None,
        preset: str | None,
    ) -> Record:
        """The record of rows measured on the learned tasks at a version, under settings `used`."""
        work = self.workspace
        classes = work.stream.class_names
        run = Run(
            method=self.config.method,
            setting=setting,
            preset=preset,
            configuration=used.recorded(),
            command=command,
            mix=mix,
            separation=separation,
            backbone=BackboneIdentity(name=work.backbone.name, sha256=work.backbone.sha256),
            data=DataIdentity(name=work.stream.name, fingerprint=work.stream.fingerprint),
            tasks=tuple(
                TaskIdentity(
                    name=task.name,
                    domain=task.domain,
                    classes=tuple(classes[c] for c in task.classes),
                    prompt=task.prompt,
                    test_samples=len(task.test),
                )
                for task in learned
            ),
            class_order=classes,
            seed=self.seed,
            store=without_home(work.store_path),
            store_version=version,
            created=datetime.now(UTC),
        )
        environment = Environment.here(str(work.engine.device), seconds)
        return Record(run=run, metrics=Metrics(rows=tuple(rows)), environment=environment)


def require_unmoved(txn: memtool_stores.Transaction, view: memtool_stores.MemoryView) -> None:
    """Raise ChangedMeanwhileError where a transaction begins at another version than was read."""
    if txn.base.version != view.version:
        raise ChangedMeanwhileError(
            f"the memory moved on to version {txn.base.version} while {view.version} was worked on",
            remedy="the same command again; nothing was changed",
        )


def newest_after_each(
    history: Iterable[tuple[str, tuple[int, ...]]], order: Sequence[int]
) -> dict[int, str]:
    """Of versions with the tasks that each knows, newest first: the one after every task.

    By number of tasks i: the newest version that knows the first i of `order`, and no more.
    """
    found: dict[int, str] = {}
    for version, tasks in history:
        if tasks and tasks == tuple(order[: len(tasks)]):
            found.setdefault(len(tasks), version)
    return found
