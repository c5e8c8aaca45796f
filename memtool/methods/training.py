"""Training the adapters of a task: the step of all methods that makes folders under `runs`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from memtool.alone import alone
from memtool.errors import AlreadyExistsError, ConfigError, DataError
from memtool.learning.adapt import Adapted, Beneath, Lesson, adapt, batches_of
from memtool.learning.known import compared, fixed_head, is_fixed
from memtool.learning.learner import Learner
from memtool.methods.exchange import AdapterFolder, write_adapter
from memtool.methods.export import require_new
from memtool.methods.in_store import classifier_bytes
from memtool.methods.kept import fingerprint_of
from memtool.methods.records import number_of, task_of
from memtool.methods.results import AdaptResult
from memtool.methods.writing import AdapterWriter
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


@dataclass(frozen=True, eq=False)
class _Job:
    """A task whose adapters are wanted, their folders, and the hash of what decides them."""

    task: Task
    folders: Sequence[AdapterFolder]
    fingerprint: str


class AdapterTrainer(AdapterWriter[Workspace]):
    """The step that trains: whole adapters with a head, or on texts without one.

    A method whose adapters are trained otherwise overrides `_train` and `_fingerprint`.
    """

    def require_able(self) -> None:
        """Raise ConfigError or CapacityError for what would fail only once adapters are there.

        It is asked before anything is learned; here everything can be done.
        """

    def adapt(self, task: str, *, fresh: bool = False) -> list[AdaptResult]:
        """Train the adapters of a task and write each as a PEFT directory under `runs`.

        A finished one of the same settings is left as it is, unless `fresh`; an interrupted one
        goes on where it was. Raises AlreadyExistsError for a finished one of other settings,
        BusyError while another process trains the same, CorruptError for a file that is not what
        was written.
        """
        return self.adapt_together([task], fresh=fresh)[0]

    def adapt_together(
        self, tasks: Sequence[str], *, fresh: bool = False
    ) -> list[list[AdaptResult]]:
        """As `adapt`, of tasks whose unfinished ones are trained in one pass; see `in_passes`.

        Each ends as if it had been trained alone, up to rounding. What was interrupted goes on with
        the same unfinished tasks.
        """
        work = self.workspace
        chosen = [work.task(task) for task in tasks]
        for task in chosen:
            self._require_learnable(task)
        self.require_able()
        jobs = [_Job(task, self._folders(task), self._fingerprint(task)) for task in chosen]
        found = [self._finished(job, fresh) for job in jobs]
        with ExitStack() as held:
            left = [job for job, finished in zip(jobs, found, strict=True) if not finished]
            for job in sorted(left, key=lambda job: job.task.number):
                name = job.folders[0].path
                lock = alone(work.adapter_folder / f".{name.name}.lock", f"training {name}")
                work.engine.on_main(partial(held.enter_context, lock))
            # Another process may have finished them since.
            found = [self._finished(job, fresh) for job in jobs]
            left = [job for job, finished in zip(jobs, found, strict=True) if not finished]
            trained = iter(self._trained(left, fresh) if left else ())
            return [finished or next(trained) for finished in found]

    def in_passes(self, tasks: Sequence[Task], most: int) -> list[list[Task]]:
        """Tasks by the passes that train them: at most so many in one, all of equally many steps.

        Of tasks of other numbers of samples the steps may differ: these have passes of their own.
        """
        settings, parts = self.config, self.config.engine.accumulate
        alike: dict[tuple[int, ...], list[Task]] = {}
        for task in tasks:
            batches = batches_of(self._lesson(task, None), settings.adapter, settings.train)
            alike.setdefault(batches.rhythm(parts), []).append(task)
        return [
            some[low : low + most] for some in alike.values() for low in range(0, len(some), most)
        ]

    @property
    def trained_apart(self) -> str | None:
        """Why several tasks cannot be trained in one pass, in words; None: they can."""
        if type(self)._train is not AdapterTrainer._train:
            return f"method {self.config.method} has a training of its own"
        if self.workspace.reads == "texts":
            return "a language model learns one task at a time"
        if self.config.adapter.residual:
            return "adapter.residual has adapters learn on top of a memory"
        if self.config.train.stop_at is not None:
            return "train.stop_at ends the training of each task in an epoch of its own"
        return None

    @property
    def needs_before(self) -> str | None:
        """What the training of a task needs of those before it, in words; None: nothing."""
        adapter = self.config.adapter
        if adapter.residual:
            return "adapter.residual has adapters learn on top of the memory of earlier tasks"
        if adapter.warm_start != "none":
            return f"adapter.warm_start {adapter.warm_start} begins at the adapters of earlier ones"
        return None

    def is_trained(self, task: Task) -> bool:
        """Whether the adapters of a task are finished; errors as of `adapt`."""
        job = _Job(task, self._folders(task), self._fingerprint(task))
        return bool(self._finished(job, fresh=False))

    def _folders(self, task: Task) -> list[AdapterFolder]:
        place = self.workspace.adapter_folder
        return [AdapterFolder(place / name) for name in self.adapter_names(task)]

    def _finished(self, job: _Job, fresh: bool) -> list[AdaptResult]:
        """What there is of these adapters already; empty where they are to be trained."""
        folders = job.folders
        complete = [folder for folder in folders if folder.is_complete]
        for folder in folders:
            if folder not in complete:
                require_new(folder.path)
        if fresh or not complete:
            return []
        if any(folder.about().fingerprint != job.fingerprint for folder in complete):
            raise AlreadyExistsError(
                f"{complete[0].path} was trained with other settings, data or backbone",
                remedy="the same command with --fresh, or with --set runs=DIR",
            )
        if len(complete) < len(folders):
            return []
        return [folder.result().model_copy(update={"skipped": True}) for folder in folders]

    def _trained(self, jobs: Sequence[_Job], fresh: bool) -> list[list[AdaptResult]]:
        """Train the adapters of tasks and write them; the caller holds their locks."""
        work, first = self.workspace, jobs[0]
        fingerprint = first.fingerprint
        if len(jobs) > 1:
            fingerprint = fingerprint_of([job.fingerprint for job in jobs])
        # A file for each set of settings: none loses the progress of another.
        name = f".{first.folders[0].path.name}-{fingerprint[:8]}.checkpoint"
        checkpoint = work.adapter_folder / name
        if fresh:
            work.engine.on_main(lambda: checkpoint.unlink(missing_ok=True))
        if len(jobs) == 1:
            trained = [self._train(first.task, fingerprint, checkpoint)]
        else:
            trained = self._train_together([job.task for job in jobs], fingerprint, checkpoint)
        results = [self._results(*pair) for pair in zip(jobs, trained, strict=True)]

        def write_all() -> None:
            for job, training, found in zip(jobs, trained, results, strict=True):
                self._write_task(job, training, found)
            checkpoint.unlink(missing_ok=True)

        work.engine.on_main(write_all)
        return results

    def _results(self, job: _Job, training: Trained) -> list[AdaptResult]:
        """What is said of each adapter of a task."""
        work, trained, count = self.workspace, training.adapted, self.config.adapter.per_task
        accuracies = trained.train_accuracy or (None,) * len(job.folders)
        return [
            AdaptResult(
                path=folder.path,
                name=folder.path.name,
                task=job.task.number,
                task_name=job.task.name,
                seed=self.seed,
                train_accuracy=accuracy,
                loss=trained.fit.losses[-1] / count,
                seconds=trained.fit.seconds / count,
                parameters=work.layout.numel,
                bytes=work.layout.numel * 4,
                resumed=trained.fit.resumed_at > 0,
                losses=tuple(loss / count for loss in trained.fit.losses),
            )
            for folder, accuracy in zip(job.folders, accuracies, strict=True)
        ]

    def _write_task(self, job: _Job, training: Trained, results: Sequence[AdaptResult]) -> None:
        """Write the folders of the adapters of a task."""
        trained = training.adapted
        heads = [head.of_classes(job.task.classes) for head in trained.heads]
        for index, (folder, result) in enumerate(zip(job.folders, results, strict=True)):
            write_adapter(
                folder,
                self.workspace,
                job.task,
                value=trained.values[index],
                head=classifier_bytes(heads[index]) if heads else None,
                result=result,
                fingerprint=job.fingerprint,
                warm_start=training.source,
                beneath=training.beneath,
            )

    def _train(self, task: Task, fingerprint: str, checkpoint: Path) -> Trained:
        """Train the adapters of a task; an interrupted training goes on from the checkpoint."""
        if self.workspace.reads == "texts":
            return self._train_on_texts(task, fingerprint, checkpoint)
        return self._train_together([task], fingerprint, checkpoint)[0]

    def _train_together(
        self, tasks: Sequence[Task], fingerprint: str, checkpoint: Path
    ) -> list[Trained]:
        """As `_train`, of tasks of images in one pass; the fingerprint is of all."""
        work = self.workspace
        starts, begun = zip(*map(self._warm_start, tasks), strict=True)
        beneath, version = self._beneath(tasks[0])
        on_top = "" if beneath is None else f" on top of version {version}"
        sources = [source + on_top for source in begun]
        adapted = adapt(
            work.engine,
            work.backbone,
            work.layout,
            list(map(self._lesson, tasks, starts)),
            class_count=len(work.stream.class_names),
            adapter=self.config.adapter,
            train=self.config.train,
            beneath=beneath,
            known=fixed_head(work) if is_fixed(self.config) else None,
            biased=self.config.head.bias,
            fingerprint=" ".join([fingerprint, *sources]),
            checkpoint=checkpoint,
            progress=work.progress,
        )
        return [Trained(*pair) for pair in zip(adapted, sources, strict=True)]

    def _lesson(self, task: Task, start: Tensor | None) -> Lesson:
        """What the adapters of a task of images learn from."""
        return Lesson(
            task.train,
            compared(self.config, self.workspace.stream, task),
            self.workspace.training_seed(task.number),
            start,
            self.stage(task),
        )

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
            "adapter": work.adapter_decides,
            "train": self.config.train.decides(),
            "seed": self.seed,
        }
        if not self.config.head.bias:
            decides["bias"] = False
        if work.reads == "texts":
            decides |= {"text": work.text_settings(), "epochs": work.epochs(task)}
        return fingerprint_of(decides)

    def _require_learnable(self, task: Task) -> None:
        """Raise DataError for a task without images of two classes, or without a text."""
        if self.workspace.reads == "images":
            require_learnable(task)
        elif not len(task.train):
            raise DataError(
                f"task {task.number} ({task.name}) has no training texts",
                expected="a stream of folders with train.json: a file of lines is for testing",
                remedy="--set stream.source=FILE.yaml",
            )

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
        if own := [record.name for record in earlier if record.ragged]:
            raise ConfigError(
                f"adapter.warm_start {kind} from {own[0]!r}, whose layout is its own",
                expected="earlier adapters of the rank and layers that are trained here",
                remedy="--warm-start none",
            )
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

    def stage(self, task: Task) -> str:
        """What progress calls the training of a task."""
        return f"task {task.number}/{self.workspace.stream.count} {task.name}: adapt"

    def adapter_names(self, task: Task) -> list[str]:
        """Names of the adapters of a task, one folder each."""
        stem = f"task-{task.number}-seed-{self.seed}"
        count = self.config.adapter.per_task
        return [stem] if count == 1 else [f"{stem}-adapter-{j + 1}" for j in range(count)]
