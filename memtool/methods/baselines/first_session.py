"""First-session adaptation: learn an adapter on the first task, then only solve heads.

The adapter is that of the memory's first task, under a linear head that is left behind, and never
learns again. So features of old tasks stay what they were, and heads in closed form from running
moments are exact. Rivals differ in what they count and solve: a `FirstSession` each. Domain
generalisation has all sources in its first session.

`first_session.epochs` are its passes; none: those of every adapter.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memtool.evaluation.course import Course
from memtool.evaluation.record import Row
from memtool.heads import FeatureStatistics, ProjectedMoments
from memtool.learning.learner import Learner
from memtool.methods.baselines.frozen import frozen_features
from memtool.methods.baselines.reading import Predict, accuracies, accuracy
from memtool.methods.baselines.sources import HeldOut
from memtool.settings import HeadSettings
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace


@dataclass(frozen=True)
class FirstSession:
    """A rival: which features it counts, and what it solves of their moments.

    `beside` puts the frozen features before the adapted ones; `projected` counts a random
    projection too, `head.width` wide. `head` makes a classifier of the moments so far.
    """

    id: str
    title: str
    head: Callable[[FeatureStatistics, HeadSettings], Predict]
    beside: bool = False
    projected: bool = False

    def require(self, work: Workspace) -> None:
        """Raise CapacityError where the random projection does not fit into memory."""
        if self.projected:
            work.require_room_for_projection()

    def in_turn(self, work: Workspace, tasks: Sequence[Task]) -> list[Row]:
        """One row, with the whole matrix; seconds are those of learning, counting and solving."""
        self.require(work)
        begin = time.perf_counter()
        learner = self._adapted(work, tasks[0], f"task 1/{len(tasks)} {tasks[0].name}")
        counted = self._nothing(work)
        seconds = time.perf_counter() - begin
        course = Course(tasks, work.unseen)
        samples = [task.test for task in course.tested]
        test = [self._features(learner, each) for each in samples]
        for number, task in enumerate(tasks, start=1):
            begin = time.perf_counter()
            self._count(counted, learner, task.train)
            predict = self.head(counted, work.config.head)
            seconds += time.perf_counter() - begin
            course.add(number, accuracies(predict, test, samples))
        return [course.row(self.id, self.title, "baseline", seconds=seconds)]

    def on_sources(
        self, work: Workspace, sources: Sequence[Task], held_out: Images
    ) -> list[HeldOut]:
        """The same with all source domains in the first session."""
        self.require(work)
        begin = time.perf_counter()
        learner = self._adapted(work, Task.pooled(sources), "all sources")
        counted = self._nothing(work)
        for task in sources:
            self._count(counted, learner, task.train)
        predict = self.head(counted, work.config.head)
        seconds = time.perf_counter() - begin
        kept = [task.validation for task in sources if len(task.validation)]
        scores = accuracies(predict, [self._features(learner, each) for each in kept], kept)
        found = accuracy(predict, self._features(learner, held_out), held_out)
        mean = sum(scores) / len(scores) if scores else None
        return [HeldOut(self.id, self.title, "baseline", found, mean, seconds)]

    def _adapted(self, work: Workspace, task: Task, where: str) -> Learner:
        """One LoRA that learned a task, or all of them as one."""
        learner = Learner(_with_epochs(work), 1)
        learner.learn(task, f"{where}: baseline, {self.title}")
        return learner

    def _nothing(self, work: Workspace) -> FeatureStatistics:
        """The moments of no features yet."""
        classes, dim = len(work.stream.class_names), work.backbone.dim * (1 + self.beside)
        if not self.projected:
            return FeatureStatistics(dim, classes)
        projected = ProjectedMoments(dim, work.config.head.width, work.seed, classes)
        return FeatureStatistics(dim, classes, projected)

    def _features(self, learner: Learner, samples: Images) -> Tensor:
        """Features (n, dim), or (n, 2 dim) with the frozen ones, on the CPU."""
        adapted = learner.features_of(samples)
        if not self.beside:
            return adapted
        return torch.cat([frozen_features(learner.work, samples), adapted], dim=1)

    def _count(self, counted: FeatureStatistics, learner: Learner, samples: Images) -> None:
        """Count the training images of a task, and measure on one of five what its λ is worth."""
        features = self._features(learner, samples)
        labels = torch.from_numpy(np.asarray(samples.labels))
        counted.add(features, labels)
        if counted.projected is not None:
            counted.projected.measure(features, labels)


def _with_epochs(work: Workspace) -> Workspace:
    """The same parts under the epochs of the first session."""
    epochs = work.config.first_session.epochs
    if epochs is None:
        return work
    _ = work.stream, work.backbone, work.engine, work.layout  # opened once, for both
    other = copy.copy(work)
    train = work.config.train.model_copy(update={"epochs": epochs, "iterations": None})
    other.config = work.config.model_copy(update={"train": train})
    return other
