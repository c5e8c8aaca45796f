"""What a study will cost, before it begins: steps, time from a measured step, bytes on the disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtool.adapters.mixing import Mixture
from memtool.adapters.recalls import given_for_each
from memtool.adapters.values import AdapterValues, Recall
from memtool.errors import CapacityError
from memtool.experiments.plan import training_steps
from memtool.experiments.studies.study import OpenStudy, Variant
from memtool.learning.adapt import Lesson, adapt
from memtool.methods import open_method
from memtool.methods.method import Method
from memtool.workspace import Workspace

MOST_SECONDS = 12 * 3600
"""A study that takes longer on this machine is told so."""

TIMED = {"step": (1, 2), "pass": (1, 16)}
"""Adapters of the two steps, and of the two passes, that are timed; of another number time is on
the line through both."""

OTHER_WAYS = 4
"""Passes over the test images that an evaluation makes beside the memory's own: hard choice, a
uniform mixture, no negative weights, the true task's adapters."""

FOLDER_BYTES = 24_000
"""Of an adapter beside its numbers: three small files of whole blocks, here and in the store."""

RUN_BYTES = 2_000_000
"""Of a run beside its adapters: record, report, results, and the manifests of its versions."""


@dataclass(frozen=True)
class PointCost:
    """What the runs of a point take that are not done: `left` of `runs`, and steps of training."""

    label: str
    runs: int
    left: int
    steps: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class StudyCost:
    """What is left of a study: its points, and the bytes that are free where it lies."""

    points: tuple[PointCost, ...]
    free: int

    @property
    def steps(self) -> int:
        """Steps of training adapters."""
        return sum(point.steps for point in self.points)

    @property
    def seconds(self) -> float:
        """Of the processor, for training, consolidation and evaluation on this machine; about."""
        return sum(point.seconds for point in self.points)

    @property
    def bytes(self) -> int:
        """On the disk, about, at most."""
        return sum(point.bytes for point in self.points)


@dataclass(frozen=True, eq=False)
class _Left:
    """The runs of a point that are not done, one of them opened."""

    variant: Variant
    runs: int
    left: int
    method: Method | None

    @property
    def steps(self) -> int:
        """Steps of training adapters, of one run."""
        return 0 if self.method is None else sum(training_steps(self.method.workspace))

    @property
    def bytes(self) -> int:
        """Of all of these runs, at most."""
        return 0 if self.method is None else self.left * _bytes(self.method)


def require_room(study: OpenStudy) -> None:
    """Raise CapacityError where what is left of a study has no room on the disk."""
    _require_room(study, _all_left(study))


def cost_of(study: OpenStudy) -> StudyCost:
    """The cost of what is left of a study, from a step of training and passes that are timed now.

    They are timed with few adapters, and scaled. Opens data and backbone. Raises CapacityError as
    `require_room`.
    """
    every = _all_left(study)
    _require_room(study, every)
    clock = _Clock()
    points = []
    for one in every:
        seconds = 0.0 if one.method is None else _seconds(study, one.method, one.steps, clock)
        points.append(
            PointCost(
                label=one.variant.label,
                runs=one.runs,
                left=one.left,
                steps=one.left * one.steps,
                seconds=one.left * seconds,
                bytes=one.bytes,
            )
        )
    return StudyCost(tuple(points), _free(study.folder))


def _require_room(study: OpenStudy, every: Sequence[_Left]) -> None:
    needed, free = sum(one.bytes for one in every), _free(study.folder)
    if needed <= free:
        return
    largest = max(every, key=lambda one: one.bytes)
    raise CapacityError(
        f"study {study.study.name} takes about {needed:,} bytes in {study.folder}, "
        f"{largest.bytes:,} of them at point {largest.variant.label}",
        expected=f"at most the {free:,} bytes that are free there",
        remedy="--out on a larger disk, or fewer --points or seeds",
    )


def _all_left(study: OpenStudy) -> list[_Left]:
    still, found = study.sweep.open_jobs(), []
    for variant in study.variants:
        jobs = [job for job in study.sweep.jobs if study.variant_of(job) is variant]
        left = [job for job in still if job in jobs]
        method = None
        if left:
            method = open_method(study.sweep.config_of(left[0]), seed=left[0].seed)
            method.require_able()
        found.append(_Left(variant, len(jobs), len(left), method))
    return found


def _bytes(method: Method) -> int:
    """Of one run, at most: adapters as folders and in the store, moments, heads and keys."""
    work = method.workspace
    config, tasks = work.config, work.stream.tasks
    adapters, numbers = config.adapter.per_task * len(tasks), work.layout.numel
    classes, dim = len(work.stream.class_names), work.backbone.dim
    head = 4 * (dim + 1) * max(len(task.classes) for task in tasks)
    of_adapters = adapters * (2 * (4 * numbers + head) + FOLDER_BYTES)
    wide = dim * (1 + bool(config.head.beside)) + 1
    moments = len(tasks) * 8 * (wide + classes) * wide
    if config.head.kind == "rp-ridge":
        moments += work.projection_bytes(config.head.width).kept
    cost = _cost(method)
    read = 4 * cost.get("read_numbers", 0) * len(tasks)  # keys and their like, at every version
    return of_adapters + moments + cost.get("queries_bytes", 0) + read + RUN_BYTES


def _cost(method: Method) -> Mapping[str, Any]:
    numbers = method.workspace.layout.numel
    return method.cost(numbers=numbers, parameters=0, tokens=0) or {}


def _seconds(study: OpenStudy, method: Method, steps: int, clock: _Clock) -> float:
    """Of one run, from a step of training and passes of test images that are timed here."""
    work = method.workspace
    config, tasks = work.config, work.stream.tasks
    count = config.adapter.per_task
    train = sum(len(task.train) for task in tasks)
    tests = [len(task.test) for task in tasks]
    frozen = clock.a_pass(work, 0)
    mixed = clock.a_pass(work, max(1, count * (len(tasks) + 1) // 2))
    cost = _cost(method)
    look = (cost.get("frozen", 0.0) + cost.get("first_adapter", 0.0)) * frozen
    learned = steps * clock.a_step(work) + train * count * frozen  # and its training accuracy
    keys = train * (2 * mixed + look + 3 * (method.key_epochs or 0) * mixed)
    read = sum(tests) * (len(tasks) + OTHER_WAYS) + study.study.passes(tests)
    return learned + keys + read * (mixed + look)


_Timed = Callable[[Workspace, int], float]
"""Seconds of something with so many adapters."""


class _Clock:
    """Times a step of training and a pass of a test image, each once for all points.

    In seconds of the processor, all threads together, so that others on the machine do not count;
    on another device in seconds.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, str], float] = {}

    def a_step(self, work: Workspace) -> float:
        """A step that trains all adapters of a task; nothing of it is kept."""
        return self._on_the_line("step", work.config.adapter.per_task, work, self._a_step)

    def a_pass(self, work: Workspace, adapters: int) -> float:
        """A pass of one image under a mixture of so many adapters; 0: of the frozen model."""
        if not adapters:
            return self._once("pass", 0, work, self._a_pass)
        return self._on_the_line("pass", adapters, work, self._a_pass)

    def _a_step(self, work: Workspace, adapters: int) -> float:
        adapter = work.config.adapter.model_copy(update={"per_task": adapters})
        task, size = work.stream.tasks[0], work.config.train.batch_size
        short = {"epochs": 1, "iterations": None, "steps": 0, "lr": 1e-6}

        def steps(count: int) -> None:
            some = task.train.chosen(np.arange(count * size) % len(task.train))
            adapt(
                work.engine,
                work.backbone,
                work.layout,
                [Lesson(some, task.classes, work.seed, stage="a step that is timed")],
                class_count=len(work.stream.class_names),
                adapter=adapter,
                train=work.config.train.model_copy(update=short),
            )

        steps(1)  # the first also allocates
        one, several = (self._timed(work, partial(steps, n)) for n in (1, 3))
        return max(several - one, several / 6) / 2

    def _a_pass(self, work: Workspace, adapters: int) -> float:
        task = work.stream.tasks[0]
        images = task.test.images[np.arange(32) % len(task.test)]
        recall = _mixture(work, adapters) if adapters else None
        work.features(images[:8], recall)
        return self._timed(work, lambda: work.features(images, recall)) / len(images)

    def _on_the_line(self, what: str, adapters: int, work: Workspace, timed: _Timed) -> float:
        """For so many adapters, on the line through two numbers of them, never below the first."""
        few, more = TIMED[what]
        first = self._once(what, few, work, timed)
        if adapters == few:
            return first
        each = (self._once(what, more, work, timed) - first) / (more - few)
        return first + max(each, 0.0) * (adapters - few)

    def _once(self, what: str, adapters: int, work: Workspace, timed: _Timed) -> float:
        key = (what, adapters, work.config.memory.mix)
        if key not in self._known:
            self._known[key] = timed(work, adapters)
        return self._known[key]

    def _timed(self, work: Workspace, deed: Callable[[], object]) -> float:
        clock = time.process_time if work.engine.device.type == "cpu" else time.perf_counter
        begin = clock()
        deed()
        return clock() - begin


def _mixture(work: Workspace, adapters: int) -> Recall:
    """So many adapters, whose parts may differ from sample to sample."""
    flat = torch.zeros(adapters, work.layout.numel)
    values = AdapterValues.from_flat(flat, work.layout, work.scaling).to(work.engine.device)
    mix = work.config.memory.mix

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        shares = torch.full((len(hidden), 1, adapters), 1 / adapters, device=hidden.device)
        return given_for_each(values, shares, mix)(block, hidden)

    return recall


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there: Sequence[Path] = (folder.absolute(), *folder.absolute().parents)
    return shutil.disk_usage(next(one for one in there if one.exists())).free
