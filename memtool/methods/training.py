"""Training the adapters of a task: the step of all methods that makes folders under `runs`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memtool.alone import alone
from memtool.errors import AlreadyExistsError, ConfigError, DataError
from memtool.learning.adapt import Adapted, Beneath, adapt
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
        work = self.workspace
        chosen = work.task(task)
        self._require_learnable(chosen)
        self.require_able()
        fingerprint = self._fingerprint(chosen)
        folders = self._folders(chosen)
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
        return bool(self._finished(self._folders(task), self._fingerprint(task), fresh=False))

    def _folders(self, task: Task) -> list[AdapterFolder]:
        place = self.workspace.adapter_folder
        return [AdapterFolder(place / name) for name in self.adapter_names(task)]

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
                seconds=trained.fit.seconds / self.config.adapter.per_task,
                parameters=work.layout.numel,
                bytes=work.layout.numel * 4,
                resumed=trained.fit.resumed_at > 0,
                losses=tuple(loss / self.config.adapter.per_task for loss in trained.fit.losses),
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
            classes=compared(self.config, work.stream, task),
            class_count=len(work.stream.class_names),
            adapter=self.config.adapter,
            train=self.config.train,
            seed=work.training_seed(task.number),
            start=start,
            beneath=beneath,
            known=fixed_head(work) if is_fixed(self.config) else None,
            biased=self.config.head.bias,
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
