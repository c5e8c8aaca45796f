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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor

import memtool_stores
from memtool.adapters.peft_files import write_peft
from memtool.adapters.recalls import chosen, every
from memtool.adapters.values import AdapterValues
from memtool.config import Recaller
from memtool.errors import (
    ConfigError,
    MismatchError,
    NotFoundError,
)
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Kind, Record, Row
from memtool.heads import LinearClassifier, RecalledHead, solve_head
from memtool.learning.adapt import adapt
from memtool.methods.attached import AttachedAdapters, AttachedImages
from memtool.methods.exchange import OWN_HEAD, new_folders, require_new
from memtool.methods.measure import share_right
from memtool.methods.method import Method, newest_after_each, require_unmoved
from memtool.methods.modulation.recallers import AdapterMemory, open_memory, synchronise
from memtool.methods.records import recorded, task_of
from memtool.methods.results import (
    PredictorResult,
    RecalledShare,
    RecallResult,
    WrittenAdapter,
)
from memtool.methods.seen import predicted
from memtool.methods.state import (
    classes_of,
    classifier_bytes,
    classifier_of,
    merged,
    own_head_blob,
)
from memtool.methods.subject import first, read_query
from memtool.streams import load_image
from memtool.streams.task import Images, Task
from memtool.tensor_bytes import read_tensors

Numbers = npt.NDArray[np.float64]

PREDICTOR = "task-predictor"
"""Blob of the task predictor: its adapter, its head, and the tasks that it tells apart."""

SUBJECT_SAMPLES = 256
"""Test images of a task that `retrieve --task` measures the recalled adapter on."""


@dataclass(frozen=True, eq=False)
class Stored:
    """The adapters of one version, one a task, in the order written.

    `tasks` are task numbers, `values` (t, numel) float32 as stored, `scaling` (t,), `heads` the
    classifier that was trained with each.
    """

    version: str
    view: memtool_stores.MemoryView
    records: tuple[memtool_stores.AdapterRecord, ...]
    tasks: tuple[int, ...]
    values: Tensor
    scaling: Tensor
    heads: tuple[LinearClassifier, ...]

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, eq=False)
class Predictor:
    """θ_0: which task is it? `value` (numel,), `head` over the places of `tasks`."""

    value: Tensor
    scaling: float
    head: LinearClassifier
    tasks: tuple[int, ...]

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return save(
            {
                "value": self.value.contiguous(),
                "scaling": torch.tensor(self.scaling, dtype=torch.float64),
                "weight": self.head.weight.contiguous(),
                "bias": self.head.bias.contiguous(),
                "tasks": torch.tensor(self.tasks),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Predictor:
        """What `to_bytes` wrote."""
        tensors = read_tensors(
            data, where, value="n", scaling="float64", weight="t d", bias="t", tasks="int64 t"
        )
        return cls(
            tensors["value"],
            float(tensors["scaling"]),
            LinearClassifier(tensors["weight"], tensors["bias"]),
            tuple(tensors["tasks"].tolist()),
        )


class Modulation(Method):
    """The five steps of Modulation over one configuration and seed."""

    version_each: ClassVar[bool] = True

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
        for name in self.config.modulation.memory:
            synchronise(txn, name, self.config.modulation, seed=self.seed)

    # Consolidate ----------------------------------------------------------------------------

    def consolidate(self) -> PredictorResult:
        """Bring every memory up to date; for mts, train the task predictor on all tasks.

        A predictor of the same tasks and settings is left as it is.
        """
        begin = time.perf_counter()
        work, settings = self.workspace, self.config.modulation
        stored = self.stored("HEAD")
        wanted = self.config.stream.setting == "mts"
        predictor = self._predictor(stored) if wanted else None
        asked = {
            "epochs": settings.predictor_epochs,
            "lr": settings.predictor_lr,
            "train": self.config.train.model_dump(mode="json"),
            "seed": self.seed,
        }
        known = self._predictor_settings(stored)
        fresh = wanted and (predictor is None or predictor.tasks != stored.tasks or known != asked)
        accuracy = None
        if fresh:
            predictor, accuracy = self._train_predictor(stored)

        def commit(txn: memtool_stores.Transaction) -> None:
            require_unmoved(txn, stored.view)
            for name in settings.memory:
                synchronise(txn, name, settings, seed=self.seed)
            if fresh and predictor is not None:
                txn.put_blob(PREDICTOR, predictor.to_bytes())

        metadata = {**self._metadata("consolidate"), "seconds": time.perf_counter() - begin}
        if wanted:
            metadata["predictor"] = asked
        described = " ".join(str(number) for number in stored.tasks)
        work.engine.on_main(
            lambda: work.store.run(commit, f"consolidate tasks {described}", metadata=metadata)
        )
        head = work.store.head()
        return PredictorResult(
            version=head,
            tasks=stored.tasks,
            memories=settings.memory,
            epochs=settings.predictor_epochs if fresh else 0,
            seconds=time.perf_counter() - begin,
            train_task_accuracy=accuracy,
            unchanged=head == stored.version,
        )

    def _train_predictor(self, stored: Stored) -> tuple[Predictor, float]:
        """One more adapter and a head over the tasks, on the images of all of them."""
        work, settings = self.workspace, self.config.modulation
        tasks = [work.task(str(number)) for number in stored.tasks]
        images = np.concatenate([task.train.images for task in tasks])
        places = np.repeat(np.arange(len(tasks)), [len(task.train) for task in tasks])
        train = self.config.train.model_copy(
            update={"epochs": settings.predictor_epochs, "lr": settings.predictor_lr}
        )
        trained = adapt(
            work.engine,
            work.backbone,
            work.layout,
            Images(images, places.astype(np.int64)),
            classes=range(len(tasks)),
            class_count=len(tasks),
            adapter=self.config.adapter,
            train=train,
            seed=work.training_seed(0),
            fingerprint=f"predictor {stored.version} {train.model_dump_json()}",
            checkpoint=work.adapter_folder / f".predictor-seed-{self.seed}.checkpoint",
            progress=work.progress,
            stage=f"task predictor of {len(tasks)} tasks",
        )
        predictor = Predictor(trained.values[0], work.scaling, trained.heads[0], stored.tasks)
        return predictor, trained.train_accuracy[0]

    def _predictor(self, stored: Stored) -> Predictor | None:
        if PREDICTOR not in stored.view.blobs():
            return None
        return Predictor.from_bytes(stored.view.blob(PREDICTOR), f"blob {PREDICTOR!r}")

    def _predictor_settings(self, stored: Stored) -> object:
        """What the newest consolidation of this line recorded of its predictor."""
        for version in self.workspace.store.log(stored.version):
            if "predictor" in version.metadata:
                return version.metadata["predictor"]
        return None

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
        work = self.workspace
        name = self.config.modulation.memory[0]
        stored = self.read(version) if task is None else self.stored(version)
        memory = self._memory(name, stored)
        subject, place = str(image or query), None
        if task is not None:
            wanted = work.task(task)
            subject, place = f"task {wanted.number} {wanted.name}", self._place(stored, wanted)
        elif image is not None:
            loaded = load_image(image, self.config.backbone.image_size)
            place = int(self._predicted_tasks(stored, loaded[None])[0])
        if place is not None:
            key = memory.key_of(stored.values[place])
        else:
            assert query is not None
            key = self._given_key(memory, query)
        recalled = memory.recall(key.unsqueeze(0))
        found = recalled.patterns[0].float()
        nearest = place if place is not None else int(recalled.nearest[0])
        truth = stored.values[nearest]
        error = float((found.double() - truth.double()).norm() / truth.double().norm())
        accuracy = None
        if task is not None:
            shown = first(work.task(task).test, SUBJECT_SAMPLES)
            right = self._right(stored, found[None], [shown], [torch.tensor([nearest])], [0])
            accuracy = right[0]
        record = stored.records[nearest]
        prediction = None
        if image is not None:
            recalled_one = AdapterValues.from_flat(found[None], work.layout, record.scaling)
            alone = AttachedAdapters(
                work.backbone,
                recalled_one,
                [stored.heads[nearest]],
                "fp32",
                places=[0],
                adapters=1,
                told=0,
            ).to(work.backbone.device)
            with torch.no_grad():
                seen = alone(torch.tensor(loaded[None], device=work.backbone.device))
            prediction = predicted(seen.probabilities[0].cpu(), classes_of(stored.view), None)
        if out is not None:
            with new_folders(out) as (building,):
                write_peft(
                    building,
                    found,
                    work.layout,
                    alpha=float(record.scaling) * work.layout.rank,
                    base_model=work.backbone.name,
                )
                (building / OWN_HEAD).write_bytes(classifier_bytes(stored.heads[nearest]))
        shares = recalled.coefficients
        return RecallResult(
            version=stored.version,
            subject=subject,
            memory=name,
            adapter=record.name,
            task=stored.tasks[nearest],
            key_numbers=memory.key_length,
            stored=len(stored),
            recall_error=error,
            energy=float(recalled.energy[0]),
            novelty=float(recalled.novelty[0]),
            shares=()
            if shares is None
            else tuple(
                RecalledShare(name=r.name, task=number, share=float(a))
                for r, number, a in zip(stored.records, stored.tasks, shares[0], strict=True)
            ),
            prediction=prediction,
            accuracy=accuracy,
            out=out,
        )

    def _given_key(self, memory: AdapterMemory, path: Path) -> Tensor:
        asked = read_query(path, self.workspace.backbone)
        if asked.ndim == 1 and len(asked) in (memory.key_length, memory.numel):
            return asked[: memory.key_length]
        raise MismatchError(
            f"{path}: query of shape {tuple(asked.shape)}",
            expected=f"({memory.key_length},), a key, or ({memory.numel},), an adapter",
            remedy="a key of the same backbone, targets and rank as the memory",
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
        """Accuracy on the tasks in memory, with exact and with recalled adapters.

        til: the task is known, a row for every memory and one for the exact adapters. mts: the
        predictor says the task. `history` reads the version after each task (til); `compare` adds
        the frozen backbone with a head per task (til), or over all classes (mts).
        """
        begin = time.perf_counter()
        setting = self._setting(setting)
        stored = self.stored(version)
        tasks = [self.workspace.task(str(number)) for number in stored.tasks]
        rows = (
            self._til_rows(stored, tasks, history=history)
            if setting == "til"
            else self._mts_rows(stored, tasks)
        )
        if compare:
            rows.append(self._frozen_row(tasks, given=setting == "til"))
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

    def known_tasks(self, version: str) -> tuple[int, ...]:
        """Numbers of the tasks whose adapters are in memory at a version."""
        return tuple(task_of(r) for r in self.workspace.store.view(version).adapters)

    def measure(
        self, version: str, tasks: Sequence[int], setting: str | None = None
    ) -> dict[str, float]:
        """Metrics of a version on the given tasks by the first memory: faa, and task_accuracy.

        A task without an adapter scores 0. til counts every task as known.
        """
        setting = self._setting(setting)
        stored = self.stored(version)
        recalled = self._recall_all(self.config.modulation.memory[0], stored)
        shown = [self.workspace.task(str(n)).test for n in tasks if n in stored.tasks]
        places = [stored.tasks.index(n) for n in tasks if n in stored.tasks]
        predicted = [torch.full((len(s),), p) for p, s in zip(places, shown, strict=True)]
        right = 1.0
        if setting == "mts":
            predicted = [self._predicted_tasks(stored, samples.images) for samples in shown]
            hits = sum(int((p == own).sum()) for own, p in zip(places, predicted, strict=True))
            right = hits / max(1, sum(len(p) for p in predicted))
        scores = self._right(stored, recalled, shown, predicted, range(len(stored)))
        return {"faa": sum(scores) / len(tasks), "task_accuracy": right}

    def _til_rows(self, stored: Stored, tasks: Sequence[Task], *, history: bool) -> list[Row]:
        """The exact adapters, then every memory, with the task given."""
        count = len(tasks)
        versions = self._history(stored) if history else {}
        versions[count] = stored.version
        names: tuple[Recaller, ...] = self.config.modulation.memory
        accuracy = {name: np.full((count + 1, count), np.nan) for name in ("exact", *names)}
        errors = {name: np.full((count + 1, count), np.nan) for name in names}
        shown = [task.test for task in tasks]
        exact = self._accuracies(stored, stored.values, shown)
        for known, at in self.workspace.telling("evaluate", sorted(versions.items())):
            there = stored if at == stored.version else self.stored(at)
            # The exact adapters and their heads are the same at every version.
            accuracy["exact"][known, :known] = exact[:known]
            for name in names:
                recalled = self._recall_all(name, there)
                errors[name][known, :known] = relative_errors(recalled, there.values)
                accuracy[name][known, :known] = self._accuracies(there, recalled, shown[:known])
        labels = [task.name for task in tasks]
        top = float(np.mean(exact))
        rows = [
            self._row(name, LABELS[name], "method", labels, accuracy[name], errors[name], top, {})
            for name in names
        ]
        rows.append(
            Row.measured(
                "exact",
                "exact adapters from the store",
                "upper bound",
                AccuracyMatrix(tuple(labels), accuracy["exact"]),
            )
        )
        return rows

    def _mts_rows(self, stored: Stored, tasks: Sequence[Task]) -> list[Row]:
        """Every memory under predicted tasks; the exact adapters, task predicted and task given."""
        count = len(tasks)
        shown = [task.test for task in tasks]
        predicted = [self._predicted_tasks(stored, samples.images) for samples in shown]
        hits = sum(int((p == place).sum()) for place, p in enumerate(predicted))
        more = {"task_accuracy": hits / sum(len(p) for p in predicted)}
        labels = [task.name for task in tasks]
        given = self._accuracies(stored, stored.values, shown)
        top = float(np.mean(given))

        def final(scores: Sequence[float]) -> Numbers:
            matrix = np.full((count + 1, count), np.nan)
            matrix[count] = scores
            return matrix

        rows = []
        for name in self.config.modulation.memory:
            recalled = self._recall_all(name, stored)
            scores = self._right(stored, recalled, shown, predicted, range(count))
            errors = final(relative_errors(recalled, stored.values).tolist())
            rows.append(
                self._row(name, LABELS[name], "method", labels, final(scores), errors, top, more)
            )
        scores = self._right(stored, stored.values, shown, predicted, range(count))
        rows.append(
            self._row(
                "exact-predicted",
                "exact adapters, task predicted",
                "upper bound",
                labels,
                final(scores),
                None,
                top,
                more,
            )
        )
        matrix = AccuracyMatrix(tuple(labels), final(given))
        rows.append(Row.measured("exact", "exact adapters, task given", "upper bound", matrix))
        return rows

    def _row(
        self,
        id: str,
        label: str,
        kind: Kind,
        tasks: Sequence[str],
        accuracy: Numbers,
        errors: Numbers | None,
        exact: float,
        more: Mapping[str, float],
    ) -> Row:
        measured = dict(more)
        measured["recall_drop"] = exact - float(accuracy[-1].mean())
        if errors is not None:
            measured["recall_error"] = float(errors[-1].mean())
        return Row.measured(
            id,
            label,
            kind,
            AccuracyMatrix(tuple(tasks), accuracy),
            more=measured,
            recall_error=()
            if errors is None
            else [[None if np.isnan(e) else float(e) for e in row] for row in errors],
        )

    def _frozen_row(self, tasks: Sequence[Task], *, given: bool) -> Row:
        """No adapter: frozen features, with an LDA head per task, or one over all classes."""
        work = self.workspace
        own = {
            task.number: work.counted(work.features(task.train.images), task.train)
            for task in tasks
        }
        if not given:
            own = dict.fromkeys(own, merged(own))
        scores = []
        for task in tasks:
            head = solve_head("lda", own[task.number], self.config.head)
            allowed = task.classes if given else None
            scores.append(share_right(head(work.features(task.test.images), allowed), task.test))
        names = [task.name for task in tasks]
        matrix = AccuracyMatrix.empty(names).with_row(len(names), scores)
        head_of = "LDA head per task, task given" if given else "one LDA head, no task"
        return Row.measured("frozen", f"frozen backbone, {head_of}", "baseline", matrix)

    def _history(self, stored: Stored) -> dict[int, str]:
        """The newest version at which the first i tasks, and no more, were in memory."""
        versions = self.workspace.store.log(stored.version)
        history = ((version.id, self.known_tasks(version.id)) for version in versions)
        return newest_after_each(history, stored.tasks)

    def _recall_all(self, name: Recaller, stored: Stored) -> Tensor:
        """Every adapter of a version, recalled from its own key: (t, numel) float32."""
        memory = self._memory(name, stored)
        return memory.recall(memory.key_of(stored.values)).patterns.float()

    def _memory(self, name: Recaller, stored: Stored) -> AdapterMemory:
        return open_memory(name, stored.view, self.config.modulation)

    def _accuracies(self, stored: Stored, values: Tensor, shown: Sequence[Images]) -> list[float]:
        """Accuracy on every task through its own adapter of `values` (t, numel)."""
        places = [torch.full((len(samples),), place) for place, samples in enumerate(shown)]
        return self._right(stored, values, shown, places, range(len(values)))

    def _right(
        self,
        stored: Stored,
        values: Tensor,
        shown: Sequence[Images],
        places: Sequence[Tensor],
        rows: Sequence[int],
    ) -> list[float]:
        """Share of right answers on each set of samples, all of them in one stream of batches.

        Sample i of set s uses adapter and head `places[s][i]`, a place of `stored`; a single number
        stands for the whole set. `rows` says which place of `stored` each row of `values` is.
        """
        engine, backbone = self.workspace.engine, self.workspace.backbone
        row_of = {place: row for row, place in enumerate(rows)}
        if len(values) == 1 and len(places) == 1 and len(places[0]) == 1:
            row_of = {int(places[0][0]): 0}
        index = torch.cat(
            [p.expand(len(s)) if len(p) == 1 else p for p, s in zip(places, shown, strict=True)]
        )
        rows_index = torch.tensor([row_of[int(place)] for place in index])
        stack = AdapterValues.from_flat(
            values, self.workspace.layout, stored.scaling[sorted(row_of)]
        ).to(engine.device)
        head = RecalledHead.of_tasks(stored.heads, range(len(stored.heads))).to(engine.device)

        def logits(images: Tensor, rows: Tensor, owners: Tensor) -> Tensor:
            features = backbone.features(backbone.preprocess(images), chosen(stack, rows))
            return head(features, torch.nn.functional.one_hot(owners, len(stored.heads)).float())

        images = np.concatenate([samples.images for samples in shown])
        labels = torch.from_numpy(np.concatenate([samples.labels for samples in shown]))
        # A recalled adapter differs by 1e-4 or less, and bfloat16 by more: it would be measured.
        scores = engine.predict(logits, images, rows_index, index, exact=True)
        right = scores.argmax(1) == labels
        parts = right.split([len(samples) for samples in shown])
        return [float(part.double().mean()) for part in parts]

    def _fitting_predictor(self, stored: Stored) -> Predictor:
        """The task predictor of the tasks in memory. Raises NotFoundError, MismatchError."""
        predictor = self._predictor(stored)
        if predictor is None:
            raise NotFoundError(
                f"the memory at version {stored.version} has no task predictor",
                remedy="--set stream.setting=mts and memtool consolidate, which trains it; "
                "or name the task with --task",
            )
        if predictor.tasks != stored.tasks:
            raise MismatchError(
                f"the task predictor knows tasks {list(predictor.tasks)}",
                expected=f"tasks {list(stored.tasks)}, which are in memory",
                remedy="memtool consolidate trains it anew",
            )
        return predictor

    def _predicted_tasks(self, stored: Stored, images: npt.NDArray[np.uint8]) -> Tensor:
        """The place of the task that the predictor sees in every image (n,)."""
        predictor = self._fitting_predictor(stored)
        engine, backbone = self.workspace.engine, self.workspace.backbone
        values = AdapterValues.from_flat(
            predictor.value[None], self.workspace.layout, predictor.scaling
        ).to(engine.device)
        head = predictor.head.to(engine.device)

        def logits(batch: Tensor) -> Tensor:
            return head(backbone.features(backbone.preprocess(batch), every(values)))

        return engine.predict(logits, images).argmax(1)

    # Shared ---------------------------------------------------------------------------------

    def stored(self, version: str = "HEAD") -> Stored:
        """The adapters of a version, of the tasks of this stream; errors as `read`."""
        found = self.read(version)
        for record in found.records:
            self._require_same_task(record)
        return found

    def read(self, version: str = "HEAD") -> Stored:
        """The adapters of a version; the stream is not opened.

        Raises NotFoundError for an empty memory, or an adapter without a head.
        """
        work = self.workspace
        view = work.store.view(work.version_of(version))
        records = view.adapters
        if not records:
            raise NotFoundError(
                f"the memory {work.store_path!r} holds no adapters at version {view.version}",
                remedy="memtool train-adapter --task 1 && memtool write",
            )
        heads = []
        for record in records:
            name = own_head_blob(record.name)
            if name not in view.blobs():
                raise NotFoundError(
                    f"adapter {record.name!r} came without a trained head",
                    remedy="an adapter made by memtool train-adapter",
                )
            heads.append(classifier_of(view.blob(name), f"blob {name!r}"))
        return Stored(
            version=view.version,
            view=view,
            records=records,
            tasks=tuple(task_of(record) for record in records),
            values=torch.from_numpy(view.values().copy()),
            scaling=torch.tensor([record.scaling for record in records], dtype=torch.float32),
            heads=tuple(heads),
        )

    def attach(
        self, version: str = "HEAD", *, task: str | None = None, precision: str = "fp32"
    ) -> AttachedImages:
        """A version as a module: its adapters as the first configured memory recalls them.

        `task` is that of every input; without one the predictor says it, where there is one.
        """
        stored, work = self.read(version), self.workspace
        told = predictor = None
        if task is not None:
            told = stored.tasks.index(task_of(recorded(stored.view, task)))
        else:
            found = self._fitting_predictor(stored)
            value = AdapterValues.from_flat(found.value[None], work.layout, found.scaling)
            predictor = (value, found.head)
        recalled = self._recall_all(self.config.modulation.memory[0], stored)
        values = AdapterValues.from_flat(recalled, work.layout, stored.scaling)
        attached = AttachedAdapters(
            work.backbone,
            values,
            stored.heads,
            precision,
            places=range(len(stored)),
            adapters=len(stored),
            told=told,
            predictor=predictor,
        )
        return attached.to(work.backbone.device)

    def class_names(self, view: memtool_stores.MemoryView) -> tuple[str, ...]:
        """The classes that a version tells apart, in the order of its scores."""
        return classes_of(view)

    def _place(self, stored: Stored, task: Task) -> int:
        if task.number not in stored.tasks:
            raise NotFoundError(
                f"no adapter of task {task.number} at version {stored.version}",
                expected=f"one of the tasks in memory: {', '.join(map(str, stored.tasks))}",
                remedy=f"memtool train-adapter --task {task.number} && memtool write",
            )
        return stored.tasks.index(task.number)


LABELS: Mapping[Recaller, str] = {
    "hopfield": "Hopfield",
    "hopfield-published": "Hopfield, as published (dot, beta 25)",
    "bayes-pcn": "BayesPCN",
    "bayes-pcn-published": "BayesPCN, as published",
}


def relative_errors(recalled: Tensor, exact: Tensor) -> Numbers:
    """|recalled − exact| / |exact| of every row (t, numel): (t,) float64."""
    difference = (recalled.double() - exact.double()).norm(dim=1)
    errors: Numbers = (difference / exact.double().norm(dim=1)).numpy()
    return errors
