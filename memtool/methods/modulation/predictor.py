"""The task predictor: one more adapter θ_0 and a head over the tasks.

It learns on the images, or prompts, of all tasks which of them one is of. Of a text it sees neither
the answer nor padding. A version keeps it in a blob; the consolidation that trained it recorded
under which settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import memtool_stores
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.errors import MismatchError, NotFoundError
from memtool.heads import LinearClassifier
from memtool.learning.adapt import Lesson, adapt
from memtool.learning.looks import Labelled, feature_model, of_each
from memtool.methods.modulation.stored import Stored
from memtool.streams.task import Images, Texts
from memtool.tensor_bytes import read_tensors
from memtool.workspace import Workspace

PREDICTOR = "task-predictor"
"""Blob of the task predictor: its adapter, its head, and the tasks that it tells apart."""

PREDICTED = ("mts", "trace")
"""Settings in which nobody says the task of an input."""


@dataclass(frozen=True, eq=False)
class Predictor:
    """θ_0: which task is it? `value` (numel,), `head` over the places of `tasks`."""

    value: Tensor
    scaling: float
    head: LinearClassifier
    tasks: tuple[int, ...]

    @classmethod
    def load(cls, view: memtool_stores.MemoryView) -> Predictor | None:
        """That of a version, where it has one."""
        if not view.has_blob(PREDICTOR):
            return None
        return cls.from_bytes(view.blob(PREDICTOR), f"blob {PREDICTOR!r}")

    @classmethod
    def fitting(cls, stored: Stored) -> Predictor:
        """That of the tasks in memory. Raises NotFoundError, MismatchError."""
        found = cls.load(stored.view)
        if found is None:
            told = "--set stream.setting=mts and " if stored.heads else ""
            raise NotFoundError(
                f"the memory at version {stored.version} has no task predictor",
                remedy=f"{told}memtool consolidate, which trains it; or name the task with --task",
            )
        if found.tasks != stored.tasks:
            raise MismatchError(
                f"the task predictor knows tasks {list(found.tasks)}",
                expected=f"tasks {list(stored.tasks)}, which are in memory",
                remedy="memtool consolidate trains it anew",
            )
        return found

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

    def values(self, work: Workspace) -> AdapterValues:
        """Its adapter."""
        return AdapterValues.from_flat(self.value[None], work.layout, self.scaling)

    def logits(self, work: Workspace) -> Callable[[Tensor], Tensor]:
        """What maps preprocessed images, or prompts, to logits (b, tasks), on the device."""
        model, device = feature_model(work.backbone), work.engine.device
        recall, head = every(self.values(work).to(device)), self.head.to(device)
        return lambda inputs: head(model.features(inputs, recall))

    def predict(self, work: Workspace, samples: Images | Texts) -> Tensor:
        """The place of the task that it sees in every image or prompt (n,)."""
        return of_each(work, samples, self.logits(work)).argmax(1)


def made_with(work: Workspace) -> dict[str, Any]:
    """The settings that decide what a predictor becomes, as a consolidation records them."""
    config = work.config
    of_texts = {"text": work.text_settings()} if work.reads == "texts" else {}
    return {
        "epochs": config.modulation.predictor_epochs,
        "lr": config.modulation.predictor_lr,
        "train": config.train.decides(),
        "seed": work.seed,
        **of_texts,
    }


def recorded(store: memtool_stores.MemoryStore, version: str) -> object:
    """The settings that the newest consolidation up to a version recorded of its predictor."""
    for one in store.log(version):
        if "predictor" in one.metadata:
            return one.metadata["predictor"]
    return None


def train(work: Workspace, stored: Stored) -> tuple[Predictor, float]:
    """A predictor of the tasks in memory, and its accuracy on the samples that it learned from."""
    settings = work.config.modulation
    tasks = [work.task(str(number)) for number in stored.tasks]
    samples: Any = type(tasks[0].train).joined([task.train for task in tasks])
    places = np.repeat(np.arange(len(tasks)), [len(task.train) for task in tasks])
    changes = {"epochs": settings.predictor_epochs, "lr": settings.predictor_lr}
    if work.reads == "texts":
        changes["augment"] = "none"
    learning = work.config.train.model_copy(update=changes)
    lesson = Lesson(
        Labelled.of(work, samples, places.astype(np.int64)),
        range(len(tasks)),
        work.training_seed(0),
        stage=f"task predictor of {len(tasks)} tasks",
    )
    (trained,) = adapt(
        work.engine,
        feature_model(work.backbone),
        work.layout,
        [lesson],
        class_count=len(tasks),
        adapter=work.config.adapter,
        train=learning,
        fingerprint=f"predictor {stored.version} {learning.model_dump_json()}",
        checkpoint=work.adapter_folder / f".predictor-seed-{work.seed}.checkpoint",
        progress=work.progress,
    )
    predictor = Predictor(trained.values[0], work.scaling, trained.heads[0], stored.tasks)
    return predictor, trained.train_accuracy[0]
