"""The parts of one experiment, made from its configuration and opened when first needed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import memtool_stores
from memtool.adapters.layout import Layout, Site
from memtool.adapters.lora import init_lora
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones import create_backbone
from memtool.engine import Engine, available_bytes
from memtool.errors import (
    CapacityError,
    ConfigError,
    DataError,
    MemtoolError,
    NotFoundError,
    did_you_mean,
)
from memtool.heads import FeatureStatistics, ProjectedMoments
from memtool.heads.random_projection import ProjectionBytes
from memtool.outside import is_file
from memtool.paths import expand, split_store
from memtool.pictured import album_of
from memtool.progress import ProgressEvent
from memtool.remembered import remembered
from memtool.settings import Config
from memtool.streams import create_stream
from memtool.streams.task import Images, Stream, Task
from memtool_stores.printable import printable

if TYPE_CHECKING:
    from memtool.backbones.interface import FrozenModel
    from memtool.progress import Progress

Item = TypeVar("Item")

PROJECTION_SHARE = 0.75
"""The part of the memory that is left which a random projection may take."""

_log = logging.getLogger(__name__)


class Workspace:
    """Stream, backbone, engine and store of a configuration and one seed.

    `reads` says whether samples are "images" or "texts". `adapters` is the folder of trained
    adapters where several memories share them; without one it lies in the configuration's `runs`.
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
        self._made: dict[str, Any] = {}
        self.adapter_folder = adapters or config.runs / "adapters"
        self.reads: Literal["images", "texts"] = (
            "texts" if config.stream.setting == "trace" else "images"
        )

    @cached_property
    def engine(self) -> Engine:
        """The device; one CPU thread for the small embedded model, all of them otherwise."""
        small = self.config.backbone.name == "nano"
        return Engine(self.config.engine, threads=1 if small else None)

    @cached_property
    def stream(self) -> Stream:
        """The tasks. Raises ConfigError where `text.epochs` does not name one number for each."""
        stream = create_stream(self.config.stream, self.config.backbone.image_size)
        epochs = self.config.text.epochs
        if self.reads == "texts" and epochs is not None and len(epochs) != len(stream.tasks):
            raise ConfigError(
                f"text.epochs has {len(epochs)} numbers for {len(stream.tasks)} tasks",
                expected="one number a task, or none for train.epochs",
            )
        return stream

    @property
    def dtype(self) -> torch.dtype:
        """That of a language model's weights: bfloat16 where the engine computes so."""
        return torch.bfloat16 if self.engine.precision == "bf16" else torch.float32

    @cached_property
    def backbone(self) -> Any:
        """The frozen model, on the device: a `Backbone` of images, or a `CausalLM`."""
        return open_backbone(self.config, dtype=self.dtype).to(self.engine.device)

    def task(self, name: str, *, held_out: bool = False) -> Task:
        """A task by number (from 1) or by name; with `held_out` also the one to generalise to.

        Raises NotFoundError for another word, ConfigError for a task that is held out.
        """
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

    @property
    def unseen(self) -> Task | None:
        """The domain that is tested after every task and never learned from (setting dgcl)."""
        return self.stream.held_out if self.config.stream.setting == "dgcl" else None

    def epochs(self, task: Task) -> int:
        """Passes over the training samples of a task; over all tasks at once, number 0, as many."""
        train, named = self.config.train, self.config.text.epochs if self.reads == "texts" else None
        at_once = 1 if task.number else len(self.stream.tasks)
        if named is None:
            return train.epochs_for(len(task.train), at_once)
        epochs = named[task.number - 1] if task.number else round(sum(named) / len(named))
        return train.epochs_for(len(task.train), at_once, epochs)

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
        draw = self.config.adapter.draw
        flat = init_lora(self.layout, count, generator=generator, draw=draw)
        return self.stacked(flat, trainable=True)

    def _sites(self) -> tuple[Site, ...]:
        """What an adapter changes: the targets, in the blocks that `adapter.blocks` says."""
        config, depth = self.config, self.backbone.depth
        begin = config.adapted_from(depth)
        sites = self.backbone.sites(config.backbone.targets)
        found = tuple(site for site in sites if site.block >= begin)
        if not found:
            last = max(site.block for site in sites)
            raise ConfigError(
                f"adapter.blocks from-look with a look at block {begin} of {self.backbone.name}, "
                f"whose last adapted block is {last} of {depth}",
                expected=f"a look at one of the blocks 0 to {last}",
                remedy=f"--set memory.look_at={min(2, last)}",
            )
        return found

    @property
    def adapter_decides(self) -> dict[str, Any]:
        """What of the adapters decides a training: their settings, and in which block they begin.

        As a number where they do not begin in the first.
        """
        decides: dict[str, Any] = self.config.adapter.decides()
        if "blocks" in decides:
            decides["blocks"] = self.config.adapted_from(self.backbone.depth)
        return decides

    @cached_property
    def layout(self) -> Layout:
        """Where each number of this configuration's adapters lies."""
        rank = self.config.adapter.rank
        layout = Layout(self._sites(), rank)
        narrow = [site for site in layout.sites if rank > min(site.in_features, site.out_features)]
        if narrow:
            width = min(min(site.in_features, site.out_features) for site in narrow)
            _log.warning(
                "adapter.rank %d is above the width of %d of %d adapted maps (%d of %s): a rank of "
                "%d can be any change of it, and more is only slower",
                *(rank, len(narrow), len(layout.sites), width, narrow[0].name, width),
            )
        return layout

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
                remedy="memtool train-adapter --task 1 && memtool write; memtool import DIR --base "
                "MODEL for LoRA of a language model; or --store PATH for a memory elsewhere",
            )
        store = memtool_stores.MemoryStore.open(
            self.store_path, lock_timeout=self.config.lock_timeout
        )
        self._require_same_blocks(store)
        store.space.check(self.space)
        return store

    def _require_same_blocks(self, store: memtool_stores.MemoryStore) -> None:
        """Raise ConfigError where its adapters sit in other blocks than those that are set."""
        if store.space.layout.segments == self.space.layout.segments:
            return
        then, here = remembered(store), self.config.recorded()
        blocks = here["adapter"]["blocks"]
        pairs = [("adapter.blocks", then.get("adapter.blocks", "all"), blocks)]  # all, of before
        if blocks != "all":
            pairs.append(("memory.look_at", then.get("memory.look_at"), here["memory"]["look_at"]))
        for key, made, now in pairs:
            if then and made != now:
                words = [",".join(map(str, v)) if isinstance(v, list) else v for v in (made, now)]
                raise ConfigError(
                    f"{key} {words[1]}, and the adapters of {self.store_path!r} were made with "
                    f"{words[0]}: they are in other blocks",
                    remedy=f"--set {key}={words[0]}, or another --store",
                )

    def commit(
        self,
        function: Callable[[memtool_stores.Transaction], None],
        message: str,
        metadata: Mapping[str, Any],
    ) -> str:
        """Commit to the memory, as `MemoryStore.run`; the newest version.

        Where there is no memory one is made, which appears with what is committed, or not at all.
        """
        if not self.has_store:
            try:
                return memtool_stores.MemoryStore.create(
                    self.store_path,
                    self.space,
                    lock_timeout=self.config.lock_timeout,
                    first=lambda made: made.run(function, message, metadata),
                ).head()
            except MemtoolError:
                if not self.has_store:  # else another process was first: go on in its memory
                    raise
        self.store.run(function, message, metadata)
        return self.store.head()

    def once(self, name: str, make: Callable[[], Item]) -> Item:
        """What `make` gives, which is made once for this workspace."""
        if name not in self._made:
            self._made[name] = make()
        found: Item = self._made[name]
        return found

    def features(self, images: npt.NDArray[np.uint8], recall: Recall | None = None) -> Tensor:
        """Features (n, dim) of images under a recall, on the CPU."""
        backbone = self.backbone
        return self.engine.predict(
            lambda batch: backbone.features(backbone.preprocess(batch), recall), images
        )

    def counted(self, features: Tensor, samples: Images) -> FeatureStatistics:
        """Moments of the features (n, f) of samples, by class of the stream, and their reach.

        And those of a random projection, where `head.kind` asks for it.
        """
        statistics = self.statistics(features.shape[1])
        labels = torch.from_numpy(np.asarray(samples.labels))
        statistics.add(features, labels)
        statistics.keep_reach(features, labels)
        if statistics.projected is not None and self.config.head.penalty == "folds":
            statistics.projected.measure(features, labels)
        return statistics

    def statistics(self, dim: int) -> FeatureStatistics:
        """Moments of no features (n, dim) yet, of all that `head.kind` needs."""
        classes, head = len(self.stream.class_names), self.config.head
        if head.kind != "rp-ridge":
            return FeatureStatistics(dim, classes)
        projected = ProjectedMoments(dim, head.width, self.seed, classes)
        return FeatureStatistics(dim, classes, projected)

    def projection_bytes(self, width: int) -> ProjectionBytes:
        """What moments of a random projection so wide take, of all tasks."""
        samples = [len(task.train) for task in self.stream.tasks]
        return ProjectionBytes.of(width, len(self.stream.class_names), samples)

    def require_room_for_projection(self) -> None:
        """Raise CapacityError where a random projection is wider than the memory allows."""
        width, available = self.config.head.width, available_bytes(torch.device("cpu"))
        needed, most = self.projection_bytes(width), int(available * PROJECTION_SHARE)
        if needed.total <= most:
            return
        fits = width
        while fits > 1 and self.projection_bytes(fits).total > available // 2:  # safe by far
            fits //= 2
        raise CapacityError(
            f"head.width {width:,} takes about {needed.total:,} bytes: {needed.kept:,} for the "
            f"moments of all tasks and {needed.solving:,} to solve the head",
            expected=f"at most {most:,}: model and images need some of the {available:,} bytes "
            "that the machine has left",
            remedy=f"--set head.width={fits}",
        )

    def text_settings(self) -> dict[str, Any]:
        """The settings of texts that decide what is learned from them, limits as in force."""
        said = self.config.text.model_dump(mode="json", include={"long_prompts", "dropout"})
        limits = {
            "prompt_tokens": self.backbone.prompt_tokens,
            "answer_tokens": self.backbone.answer_tokens,
        }
        return {**limits, **said}

    def require_fitting(self, tasks: Sequence[Task]) -> None:
        """Raise DataError for a prompt that is refused, before any work: too long, or its pictures.

        It names the task and whether the text is for training or testing. Of images CapacityError
        for a random projection that is wider than the memory of the machine allows.
        """
        if self.reads == "images" and self.config.head.kind == "rp-ridge":
            self.require_room_for_projection()
        if self.reads != "texts":
            return
        refused = self.config.text.long_prompts == "refuse"
        for task in tasks:
            for part, samples in (("train", task.train), ("test", task.test)):
                if not refused and not any(album_of(one) for one in samples.prompts):
                    continue  # of pictures one may be broken, or have no place in its prompt
                try:
                    self.backbone.encode(samples.prompts)
                except DataError as error:
                    raise DataError(
                        f"task {task.number} {task.name}, {part}: {error.message}",
                        expected=error.expected,
                        remedy=error.remedy,
                    ) from error


def open_backbone(config: Config, *, dtype: torch.dtype = torch.float32) -> FrozenModel:
    """The frozen model of a configuration, on the CPU; `dtype` is that of a language model.

    Raises NotFoundError for weights that are not there, ConfigError for a name that is none.
    """
    settings = config.backbone
    if config.stream.setting == "trace":
        from memtool.backbones.causal_lm import create_causal_lm

        return create_causal_lm(settings, config.text, dtype=dtype)
    if settings.weights is not None and settings.weights != "random":
        weights = expand(settings.weights)
        if not is_file(weights):  # named as written: a variable may hold a secret
            raise NotFoundError(
                f"no weights at {printable(str(settings.weights))}",
                expected="a safetensors file",
                remedy="--set backbone.weights=FILE",
            )
        settings = settings.model_copy(update={"weights": weights})
    return create_backbone(settings)


def task_named(name: str, tasks: Sequence[Task], stream: str) -> Task:
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
