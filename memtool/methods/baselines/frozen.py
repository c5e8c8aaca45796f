"""The frozen backbone under every kind of head: what the adapters have to beat."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.engine import Batch, Batches
from memtool.evaluation.course import Course
from memtool.evaluation.record import Row
from memtool.heads import LinearHead
from memtool.methods.baselines.reading import (
    TITLES,
    ClosedForms,
    Predict,
    Reading,
    accuracies,
    random_reading,
)
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace

_READINGS: tuple[Reading, ...] = ("ridge", "lda", "ncm", "routed", "linear")


def frozen(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """The frozen features under every kind of head, the linear one trained task after task."""
    begin = time.perf_counter()
    train = [frozen_features(work, task.train) for task in tasks]
    spent = time.perf_counter() - begin
    readings = (*_READINGS, *random_reading(work))
    courses = {reading: Course(tasks, work.unseen) for reading in readings}
    samples = [task.test for task in courses[readings[0]].tested]
    test = [frozen_features(work, each) for each in samples]
    closed = ClosedForms(work, len(tasks))
    head = LinearHead(work.backbone.dim, len(work.stream.class_names))
    trained = 0.0
    for number, (task, features) in enumerate(zip(tasks, train, strict=True), start=1):
        closed.count(features, task)
        begin = time.perf_counter()
        train_head(work, head, features, task)
        trained += time.perf_counter() - begin
        for reading in readings:
            predict = _predictor(reading, closed, head)
            courses[reading].add(number, accuracies(predict, test, samples))
    return _rows(courses, spent, trained)


def frozen_at_once(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """As `frozen`, the linear head trained on all tasks as one: the last line only."""
    begin = time.perf_counter()
    train = [frozen_features(work, task.train) for task in tasks]
    spent = time.perf_counter() - begin
    closed = ClosedForms(work, len(tasks))
    for task, features in zip(tasks, train, strict=True):
        closed.count(features, task)
    begin = time.perf_counter()
    head = LinearHead(work.backbone.dim, len(work.stream.class_names))
    train_head(work, head, torch.cat(train), Task.pooled(tasks))
    trained = time.perf_counter() - begin
    samples = [task.test for task in tasks]
    test = [frozen_features(work, each) for each in samples]
    courses = {reading: Course(tasks, None) for reading in (*_READINGS, *random_reading(work))}
    for reading, course in courses.items():
        predict = _predictor(reading, closed, head)
        course.add(len(tasks), accuracies(predict, test, samples))
    return _rows(courses, spent, trained)


def _predictor(reading: Reading, closed: ClosedForms, head: LinearHead) -> Predict:
    return head.classifier().to("cpu") if reading == "linear" else closed.solve(reading)


def _rows(courses: Mapping[Reading, Course], spent: float, trained: float) -> list[Row]:
    """A row a reading, of features that took so long and a linear head that took so long."""
    return [
        course.row(
            f"frozen-{reading}",
            f"frozen + {TITLES[reading]}",
            "baseline",
            seconds=spent + trained if reading == "linear" else spent,
        )
        for reading, course in courses.items()
    ]


def frozen_features(work: Workspace, samples: Images) -> Tensor:
    """Features (n, dim) of the backbone as it is, on the CPU."""
    backbone = work.backbone
    return work.engine.predict(
        lambda images: backbone.features(backbone.preprocess(images)), samples.images
    )


def train_head(work: Workspace, head: LinearHead, features: Tensor, task: Task) -> None:
    """The budget of an adapter (epochs, batch, rate), spent on a head alone."""
    settings = work.config.train

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch.inputs, task.classes).float(), batch.labels)

    batches = Batches(
        features.numpy(),
        np.asarray(task.train.labels),
        settings.batch_size,
        settings.epochs_for(len(task.train)),
        work.training_seed(task.number),
    )
    stage = f"{task.name}: baseline, frozen, linear head"
    work.engine.fit(head, batches, loss, settings, stage=stage, progress=work.progress)
