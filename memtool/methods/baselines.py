"""Baselines: the same backbone, data, head and budget, without a memory.

    frozen + ridge, lda, ncm    closed-form heads on the frozen features
    frozen + LDA per task       a head per task, chosen by LDA of the task on the same features
    frozen + linear             one linear head, trained task after task
    sequential LoRA             one adapter and one linear head, trained task after task
    sequential LoRA + ridge     the same adapter under a ridge head from running statistics
    sequential LoRA + LDA per task   the same under a head per task, chosen by LDA of the task

Each sees a task's images only while it learns that task, as the memory does. Hard choice, uniform
mixture and oracle adapter read the memory itself and are in `Mira.evaluate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.values import AdapterValues, Recall
from memtool.config import HeadSettings
from memtool.engine import Batch, Batches
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.record import Row
from memtool.heads import FeatureStatistics, LinearClassifier, RecalledHead, solve_head
from memtool.methods.adapt import adapt
from memtool.methods.consolidate import SHRINKAGE
from memtool.methods.recall import every
from memtool.methods.workspace import Workspace
from memtool.streams.task import Task

CLOSED_FORM = {"ridge": "ridge", "lda": "LDA", "ncm": "nearest class mean"}


def frozen(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """The frozen features under every kind of head; all matrices whole."""
    begin = time.perf_counter()
    train = [_features(work, None, task.train.images) for task in tasks]
    test = [_features(work, None, task.test.images) for task in tasks]
    spent = time.perf_counter() - begin
    classes = len(work.stream.class_names)
    names = [task.name for task in tasks]
    statistics = FeatureStatistics(work.backbone.dim, classes)
    closed = {kind: AccuracyMatrix.empty(names) for kind in CLOSED_FORM}
    routed = AccuracyMatrix.empty(names)
    router = FeatureStatistics(work.backbone.dim, len(tasks))
    own: list[LinearClassifier] = []
    linear = AccuracyMatrix.empty(names)
    head = nn.Linear(work.backbone.dim, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    trained = 0.0
    for count, task in enumerate(tasks, start=1):
        statistics.add(train[count - 1], _labels(task.train.labels))
        for kind, matrix in closed.items():
            solved = solve_head(kind, statistics, _head_settings(work, kind))
            closed[kind] = matrix.with_row(count, _scores(solved, test, tasks))
        router.add(train[count - 1], torch.full((len(task.train),), count - 1))
        own.append(_task_head(work, train[count - 1], task, classes))
        routed = routed.with_row(count, _routed_scores(router, own, test, tasks))
        start = time.perf_counter()
        _train_head(work, head, train[count - 1], task)
        trained += time.perf_counter() - start
        now = LinearClassifier(head.weight.detach().cpu(), head.bias.detach().cpu())
        linear = linear.with_row(count, _scores(now, test, tasks))
    rows = [
        Row.measured(
            f"frozen-{kind}", f"frozen + {CLOSED_FORM[kind]}", "baseline", matrix, seconds=spent
        )
        for kind, matrix in closed.items()
    ]
    label = "frozen + LDA per task, routed by LDA"
    rows.append(Row.measured("frozen-routed", label, "baseline", routed, seconds=spent))
    label = "frozen + linear head, sequential"
    rows.append(Row.measured("frozen-linear", label, "baseline", linear, seconds=spent + trained))
    return rows


def sequential(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """One LoRA and one linear head, each task starting from what the one before left."""
    begin = time.perf_counter()
    config = work.config
    classes = len(work.stream.class_names)
    names = [task.name for task in tasks]
    single = config.adapter.model_copy(update={"per_task": 1})
    statistics = FeatureStatistics(work.backbone.dim, classes)
    router = FeatureStatistics(work.backbone.dim, len(tasks))
    own: list[LinearClassifier] = []
    linear, ridge, routed = (AccuracyMatrix.empty(names) for _ in range(3))
    value: Tensor | None = None
    head: LinearClassifier | None = None
    for count, task in enumerate(tasks, start=1):
        trained = adapt(
            work.engine,
            work.backbone,
            work.layout,
            task.train,
            classes=task.classes,
            class_count=classes,
            adapter=single,
            train=config.train,
            seed=work.seed * 1000 + task.number,
            start=value,
            head=head,
            progress=work.progress,
            stage=f"task {count}/{len(tasks)} {task.name}: baseline, sequential LoRA",
        )
        value, head = trained.values[0], trained.heads[0]
        scaling = single.alpha / single.rank
        values = AdapterValues.from_flat(value[None], work.layout, scaling)
        recall = every(values.to(work.engine.device))
        features = _features(work, recall, task.train.images)
        statistics.add(features, _labels(task.train.labels))
        own.append(_task_head(work, features, task, classes))
        router.add(features, torch.full((len(features),), count - 1))
        test = [_features(work, recall, each.test.images) for each in tasks]
        solved = solve_head("ridge", statistics, _head_settings(work, "ridge"))
        linear = linear.with_row(count, _scores(head, test, tasks))
        ridge = ridge.with_row(count, _scores(solved, test, tasks))
        routed = routed.with_row(count, _routed_scores(router, own, test, tasks))
    seconds = time.perf_counter() - begin
    return [
        Row.measured(
            "sequential", "sequential LoRA, linear head", "baseline", linear, seconds=seconds
        ),
        Row.measured(
            "sequential-ridge", "sequential LoRA, ridge head", "baseline", ridge, seconds=seconds
        ),
        Row.measured(
            "sequential-routed",
            "sequential LoRA, LDA per task, routed by LDA",
            "baseline",
            routed,
            seconds=seconds,
        ),
    ]


BASELINES: dict[str, Callable[[Workspace, Sequence[Task]], list[Row]]] = {
    "frozen": frozen,
    "sequential": sequential,
}
"""Every baseline that is trained apart from the memory, by the name of its result file."""


def _features(
    work: Workspace, recall: Recall | None, images: np.typing.NDArray[np.uint8]
) -> Tensor:
    backbone = work.backbone
    return work.engine.predict(
        lambda batch: backbone.features(backbone.preprocess(batch), recall), images
    )


def _labels(labels: np.typing.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.asarray(labels))


def _head_settings(work: Workspace, kind: str) -> HeadSettings:
    return work.config.head.model_copy(update={"kind": kind})


def _scores(
    head: LinearClassifier, test: Sequence[Tensor], tasks: Sequence[Task]
) -> list[float | None]:
    return [
        float((head(features).argmax(1) == _labels(task.test.labels)).double().mean())
        for features, task in zip(test, tasks, strict=True)
    ]


def _task_head(work: Workspace, features: Tensor, task: Task, classes: int) -> LinearClassifier:
    """Linear discriminant analysis of one task's features (n, dim)."""
    statistics = FeatureStatistics(work.backbone.dim, classes)
    statistics.add(features, _labels(task.train.labels))
    return solve_head("lda", statistics, _head_settings(work, "lda"))


def _routed_scores(
    router: FeatureStatistics,
    own: Sequence[LinearClassifier],
    test: Sequence[Tensor],
    tasks: Sequence[Task],
) -> list[float | None]:
    """Accuracy when the posterior of the task weighs the heads of the tasks seen so far."""
    head = RecalledHead.of_tasks(own, range(len(own)))
    posterior = router.lda(SHRINKAGE, equal_priors=True) if len(own) > 1 else None
    scores: list[float | None] = []
    for features, task in zip(test, tasks, strict=True):
        if posterior is None:
            weights = torch.ones(len(features), 1)
        else:
            weights = posterior(features)[:, : len(own)].softmax(dim=1)
        predicted = head(features, weights).argmax(1)
        scores.append(float((predicted == _labels(task.test.labels)).double().mean()))
    return scores


def _train_head(work: Workspace, head: nn.Linear, features: Tensor, task: Task) -> None:
    """The budget of an adapter (epochs, batch, rate), spent on a head alone."""
    settings = work.config.train
    mask = torch.full((head.out_features,), -torch.inf, device=work.engine.device)
    mask[list(task.classes)] = 0.0

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(module(batch.inputs).float() + mask, batch.labels)

    batches = Batches(
        features.numpy(),
        np.asarray(task.train.labels),
        settings.batch_size,
        settings.epochs,
        work.seed * 1000 + task.number,
    )
    work.engine.fit(head, batches, loss, settings, stage="baseline: linear head")
