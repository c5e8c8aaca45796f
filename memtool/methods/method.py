"""What a method is: what happens on the arrows of the one flow, and what it says of itself.

The first two, adapt and write, are the same for most (`training`, `writing`); the folder of each
method adds consolidate, retrieve and evaluate, and how a memory is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import memtool_stores
from memtool.errors import (
    ChangedMeanwhileError,
    ConfigError,
    MismatchError,
)
from memtool.evaluation.inside import Inside
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
from memtool.methods.attached import Attached
from memtool.methods.calibration import told_of
from memtool.methods.explanation import AnyExplanation
from memtool.methods.inside import curves
from memtool.methods.results import (
    Consolidated,
    PruneResult,
    Retrieved,
    WriteResult,
)
from memtool.methods.training import AdapterTrainer
from memtool.paths import without_home
from memtool.progress import Progress
from memtool.settings import Config
from memtool.streams.task import Task
from memtool.workspace import Workspace


class Method(AdapterTrainer, ABC):
    """The steps that all methods share, over one configuration and seed."""

    reads: ClassVar[tuple[str, ...]] = ("images",)
    """What it learns from: "images", "texts"."""
    consolidates: ClassVar[str | None] = ""
    """What consolidation learns, in words; None of a method that has nothing to learn there."""
    measures_unseen: ClassVar[bool] = False
    """Whether it can be evaluated on tasks that are not in memory."""
    rivals: ClassVar[tuple[str, ...]] = ()
    """What else its adapters can be compared with: other packages that mix them."""

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

    def reading_numbers(self, view: memtool_stores.MemoryView) -> int:
        """How many numbers of a version say how its adapters are read: keys, and what learns so."""
        keys = view.keys()
        return 0 if keys is None else int(keys.size)

    def cost(self, *, numbers: int, parameters: int, tokens: int) -> Mapping[str, Any] | None:
        """What recalling adds to a model; None where it is not counted.

        An adapter has so many `numbers`; a language model so many `parameters`, a prompt so many
        `tokens`, which are 0 of images.
        """
        del numbers, parameters, tokens
        return None

    # What every method does its own way -----------------------------------------------------

    @abstractmethod
    def consolidate(self) -> Consolidated:
        """Let the memory learn what it chooses by, as one version; nothing where nothing is new."""

    @abstractmethod
    def retrieve(
        self,
        *,
        task: str | None = None,
        image: Path | None = None,
        prompt: str | None = None,
        query: Path | None = None,
        version: str = "HEAD",
        out: Path | None = None,
    ) -> Retrieved:
        """What one subject recalls: test samples of a task, an image, a prompt, or a query.

        `out` is a folder for the recalled adapter. Raises ConfigError for anything but one subject,
        and for what a method has not.
        """

    @abstractmethod
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
        """The memory on the test samples of its tasks.

        `setting` is what is known at test time; `history` also measures the versions after each
        task; `compare` adds other ways to use the same memory. `command` and `preset` are recorded.
        """

    @abstractmethod
    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks that a version can be measured on."""

    @abstractmethod
    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """The `metrics` of a version, means over the given tasks, where they can be had."""

    @abstractmethod
    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> Attached:
        """A version as a module; no stream is opened. `task` is that of every input."""

    @abstractmethod
    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes that a version tells apart, in the order of its scores; none of texts."""

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
    ) -> AnyExplanation:
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

    def novelties(
        self, view: memtool_stores.MemoryView, prompts: Sequence[str]
    ) -> list[float | None]:
        """How unlike all that a version learned from prompts are; None where nothing tells."""
        del view
        return [None] * len(prompts)

    def dead_atoms(self, below: float) -> PruneResult:
        """Which atoms add less than `below` of the average, and what taking them out does."""
        del below
        raise self._no_atoms()

    def prune(self, found: PruneResult) -> PruneResult:
        """Take the atoms that `dead_atoms` found out of the memory, as one version."""
        del found
        raise self._no_atoms()

    def _no_atoms(self) -> ConfigError:
        return ConfigError(
            f"--atoms-below under method {self.config.method}",
            expected="method moram, whose memory is made of atoms",
            remedy="--preset moram, as the memory was made with, or --set method=moram",
        )

    # Around the steps of a run --------------------------------------------------------------

    def task_written(self, task: Task) -> None:
        """What a run does once the adapters of a task are in memory: here nothing."""

    def all_written(self) -> None:
        """What a run does once the adapters of all tasks are in memory: here nothing."""

    def require_same_settings(self, remedy: str) -> None:
        """Raise ConfigError where a run cannot go on in what the memory is; here it always can."""
        del remedy

    def inside(self, tasks: Sequence[Task], version: str = "HEAD") -> Inside:
        """What a report shows of the memory beside its scores; here how it learned.

        `tasks` are those whose test samples are looked at.
        """
        del tasks
        return Inside(curves=curves(self.workspace.store, version))

    # Train and write ------------------------------------------------------------------------

    def learn(self, task: Task, *, fresh: bool = False) -> None:
        """Train and write the adapters of a task, unless it was done; `fresh` as in `adapt`."""
        self.adapt(str(task.number), fresh=fresh)
        folder = self.workspace.adapter_folder
        self.write([folder / name for name in self.adapter_names(task)])

    def write(self, directories: Sequence[Path] | None = None, **given: Any) -> WriteResult:
        """As `AdapterWriter.write`, in one of several processes."""
        return self.workspace.engine.on_main(partial(super().write, directories, **given))

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
        engine = work.engine
        environment = Environment.here(str(engine.device), seconds, kernels=engine.kernels)
        first, *others = rows
        if setting != "til":  # a calibration is of tasks that are not given
            told = told_of(work.store.view(version))
            first = first.model_copy(update={"metrics": {**first.metrics, **told}})
        return Record(run=run, metrics=Metrics(rows=(first, *others)), environment=environment)


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
