"""The parts of one experiment, made from its configuration and opened when first needed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import memtool_stores
from memtool.adapters.layout import Layout
from memtool.adapters.lora import init_lora
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones import create_backbone
from memtool.config import BackboneSettings, Config, expand, split_store
from memtool.engine import Engine
from memtool.errors import ConfigError, DataError, NotFoundError, did_you_mean
from memtool.heads import FeatureStatistics
from memtool.methods.fixed_head import fixed_head
from memtool.outside import is_file
from memtool.progress import ProgressEvent
from memtool.streams import create_stream
from memtool.streams.task import Samples, Task
from memtool.streams.text import TextTask
from memtool_stores.printable import printable

if TYPE_CHECKING:
    from memtool.backbones.interface import Backbone, FrozenModel
    from memtool.heads import CosineHead
    from memtool.progress import Progress
    from memtool.streams.task import Stream
    from memtool.streams.text import TextStream

Item = TypeVar("Item")

T = TypeVar("T", bound=Task | TextTask)
"""What a task is made of: images or texts."""


class MemoryWorkspace(ABC, Generic[T]):
    """Stream, backbone, engine and store of a configuration and one seed, whatever the data.

    `adapters` is the folder of trained adapters where several memories share them; without one it
    lies in the configuration's `runs`.
    """

    def __init__(
        self,
        config: Config,
        *,
        seed: int,
        progress: Progress | None = None,
        adapters: Path | None = None,
    ) -> None:
        self.config = config
        self.seed = seed
        self.progress = progress
        self.adapter_folder = adapters or config.runs / "adapters"

    @cached_property
    def engine(self) -> Engine:
        """The device; one CPU thread for the small embedded model, all of them otherwise."""
        small = self.config.backbone.name == "nano"
        return Engine(self.config.engine, threads=1 if small else None)

    @property
    @abstractmethod
    def stream(self) -> Stream | TextStream:
        """The tasks."""

    @property
    @abstractmethod
    def backbone(self) -> FrozenModel:
        """The frozen model, on the device."""

    @abstractmethod
    def task(self, name: str) -> T:
        """A task by number (from 1) or by name. Raises NotFoundError for another word."""

    def tell(self, stage: str, step: int, total: int) -> None:
        """Say how far a step is, to whoever listens."""
        if self.progress is not None and self.engine.is_main:
            self.progress(ProgressEvent(stage=stage, step=step, total=total))

    def telling(self, stage: str, items: Sequence[Item]) -> Iterator[Item]:
        """The items of a step one by one; how far it is, is said before and after each."""
        for place, item in enumerate(items):
            self.tell(stage, place, len(items))
            yield item
            self.tell(stage, place + 1, len(items))

    def training_seed(self, number: int) -> int:
        """The seed of the training of task `number`: of its draws and of the order of samples."""
        return self.seed * 1000 + number

    @property
    def scaling(self) -> float:
        """Alpha / r of the configured adapters."""
        return self.config.adapter.alpha / self.config.adapter.rank

    def stacked(self, flat: Tensor, *, trainable: bool = False) -> AdapterValues:
        """Configured adapters of flat values (t, numel), on the device."""
        values = AdapterValues.from_flat(flat, self.layout, self.scaling, trainable=trainable)
        return values.to(self.engine.device)

    def fresh(self, count: int, number: int) -> AdapterValues:
        """New adapters that learn task `number`: A random, the first as the memory's; B zero."""
        generator = self.engine.generator(self.training_seed(number))
        return self.stacked(init_lora(self.layout, count, generator=generator), trainable=True)

    @cached_property
    def layout(self) -> Layout:
        """Where each number of this configuration's adapters lies."""
        sites = self.backbone.sites(self.config.backbone.targets)
        return Layout(sites, self.config.adapter.rank)

    @cached_property
    def space(self) -> memtool_stores.Space:
        """What a store must hold for this backbone and these adapters."""
        settings = self.config.adapter
        return memtool_stores.Space(
            backbone=memtool_stores.Backbone(
                name=self.config.backbone.name, revision="", sha256=self.backbone.sha256
            ),
            layout=memtool_stores.Layout(
                segments=tuple(
                    memtool_stores.Segment(s.name, s.shape, s.offset) for s in self.layout.segments
                ),
                dtype="float32",
                rank=settings.rank,
                alpha=settings.alpha,
                targets=self.config.backbone.targets,
            ),
        )

    @property
    def store_path(self) -> str:
        """The store's address, without the version."""
        return split_store(self.config.store)[0]

    def version_of(self, version: str) -> str:
        """`version`, unless it is HEAD and the store was named as `path@VERSION`."""
        named = split_store(self.config.store)[1]
        return named if version == "HEAD" else version

    @property
    def has_store(self) -> bool:
        """Whether a memory is there."""
        return memtool_stores.MemoryStore.exists(self.store_path)

    @cached_property
    def store(self) -> memtool_stores.MemoryStore:
        """The memory, which must be there and must fit this backbone and these adapters."""
        if not self.has_store:
            raise NotFoundError(
                f"no memory at {self.store_path!r}",
                remedy="memtool train-adapter --task 1 && memtool write, "
                "or --store PATH for a memory elsewhere",
            )
        store = memtool_stores.MemoryStore.open(
            self.store_path, lock_timeout=self.config.lock_timeout
        )
        store.space.check(self.space)
        return store

    def store_or_new(self) -> memtool_stores.MemoryStore:
        """The memory; an empty one is made when there is none."""
        if not self.has_store:
            try:
                memtool_stores.MemoryStore.create(self.store_path, self.space)
            except memtool_stores.StoreError:
                if not self.has_store:  # else another process was first: go on in its memory
                    raise
        return self.store


class Workspace(MemoryWorkspace[Task]):
    """Stream of images, backbone, engine and store of a configuration and one seed."""

    @cached_property
    def stream(self) -> Stream:
        """The tasks."""
        return create_stream(self.config.stream, self.config.backbone.image_size)

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen model, on the device."""
        return open_backbone(self.config.backbone).to(self.engine.device)

    @cached_property
    def fixed_head(self) -> CosineHead:
        """The head over all classes that is never trained (head.kind prototype or text).

        Raises ConfigError for a head of another kind.
        """
        return fixed_head(self.config, self.engine, self.backbone, self.stream)

    def features(self, images: npt.NDArray[np.uint8], recall: Recall | None = None) -> Tensor:
        """Features (n, dim) of images under a recall, on the CPU."""
        backbone = self.backbone
        return self.engine.predict(
            lambda batch: backbone.features(backbone.preprocess(batch), recall), images
        )

    def counted(self, features: Tensor, samples: Samples) -> FeatureStatistics:
        """Moments of the features (n, dim) of samples, by class of the stream, and their reach."""
        statistics = FeatureStatistics(self.backbone.dim, len(self.stream.class_names))
        labels = torch.from_numpy(np.asarray(samples.labels))
        statistics.add(features, labels)
        statistics.keep_reach(features, labels)
        return statistics

    def task(self, name: str, *, held_out: bool = False) -> Task:
        """A task by number (from 1) or by name; with `held_out` also the one to generalise to."""
        tasks, other = self.stream.tasks, self.stream.held_out
        if other is not None and name in (other.name, str(other.number)):
            if held_out:
                return other
            raise ConfigError(
                f"task {other.number} {other.name!r} is held out: nothing is learned from it",
                expected="one of the domains to learn from: " + ", ".join(t.name for t in tasks),
                remedy="--held-out another domain",
            )
        return task_named(name, tasks, self.stream.name)


def open_backbone(settings: BackboneSettings) -> Backbone:
    """The frozen image model of these settings. Raises NotFoundError for weights not there."""
    if settings.weights is not None:
        weights = expand(settings.weights)
        if not is_file(weights):  # named as written: a variable may hold a secret
            raise NotFoundError(
                f"no weights at {printable(str(settings.weights))}",
                expected="a safetensors file",
                remedy="--set backbone.weights=FILE",
            )
        settings = settings.model_copy(update={"weights": weights})
    return create_backbone(settings)


def task_named(name: str, tasks: Sequence[T], stream: str) -> T:
    """The task of a number (from 1) or name. Raises NotFoundError when the stream has none."""
    by_number = re.fullmatch(r"\d+", name) is not None
    for task in tasks:
        if task.name == name or (by_number and task.number == int(name)):
            return task
    if by_number:
        raise NotFoundError(
            f"task {name}: {stream} has {len(tasks)} tasks",
            expected=f"a number from {tasks[0].number} to {tasks[-1].number}, or one of "
            + ", ".join(t.name for t in tasks),
        )
    raise NotFoundError(
        f"no task {name!r} in {stream}",
        expected=did_you_mean(name, [t.name for t in tasks]),
    )


def require_learnable(task: Task) -> None:
    """A task that cannot be learned is an error that names it."""
    seen = len(set(task.train.labels.tolist()))
    if seen < 2:
        raise DataError(
            f"task {task.number} ({task.name}) has {len(task.train)} training images "
            f"of {seen} {'class' if seen == 1 else 'classes'}",
            expected="images of at least two classes",
            remedy="raise stream.train_per_task, or name the tasks to learn with stream.order",
        )
