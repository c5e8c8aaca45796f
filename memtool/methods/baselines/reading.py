"""How the features of a baseline are read: a trained linear head, or heads in closed form.

    linear      the head that was trained along
    ncm         nearest class mean
    ridge, lda  one head for all tasks, from running moments of the features
    routed      LDA heads of the tasks, weighed by the posterior of the task (LDA as well)
    prototype   LDA heads of the tasks, that of the nearest mean feature of a task
    fixed       the head that knows all classes in advance (setting xtail)

The closed forms count a task's features once, when the task was learned, and are never given old
images again. Features of old tasks that move afterwards make them stale: that is the forgetting of
such a baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.heads import FeatureStatistics, LinearClassifier, RecalledHead, solve_head
from memtool.memories.closed_form import SHRINKAGE
from memtool.methods.outcome import share_right
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace

Reading = Literal["linear", "ncm", "ridge", "lda", "rp", "routed", "prototype", "fixed"]

Predict = Callable[[Tensor], Tensor]
"""Scores (n, classes) of features (n, dim); the highest wins."""

TITLES: dict[Reading, str] = {
    "linear": "linear head",
    "ncm": "nearest class mean",
    "ridge": "ridge head",
    "lda": "LDA head",
    "rp": "random-projection ridge head",
    "routed": "LDA per task, routed by LDA",
    "prototype": "LDA per task, routed by nearest prototype",
    "fixed": "fixed head",
}


def readings_of(work: Workspace, *, is_fixed: bool = False) -> tuple[Reading, ...]:
    """Ways to read a trained baseline, by whether its head is fixed in advance.

    LDA knows only the classes learned so far.
    """
    if is_fixed:
        return ("fixed", "lda")
    return ("linear", "ridge", "lda", "routed", *random_reading(work))


def random_reading(work: Workspace) -> tuple[Reading, ...]:
    """The reading by a random projection, where the memory's head is one."""
    return ("rp",) if work.config.head.kind == "rp-ridge" else ()


class ClosedForms:
    """Running moments of the features of the tasks so far, and the heads that follow from them."""

    def __init__(self, work: Workspace, tasks: int) -> None:
        """No features yet, of at most so many tasks."""
        self._settings = work.config.head
        self._dim = work.backbone.dim
        self._classes = len(work.stream.class_names)
        self._all = work.statistics(self._dim)
        self._router = FeatureStatistics(self._dim, tasks)
        self._own: list[LinearClassifier] = []

    def count(self, features: Tensor, task: Task) -> None:
        """Count the training features (n, dim) of the next task."""
        labels = torch.from_numpy(np.asarray(task.train.labels))
        self._all.add(features, labels)
        if self._all.projected is not None and self._settings.penalty == "folds":
            self._all.projected.measure(features, labels)
        self._router.add(features, torch.full((len(features),), len(self._own)))
        own = FeatureStatistics(self._dim, self._classes)
        own.add(features, labels)
        self._own.append(solve_head("lda", own, self._settings))

    def solve(self, reading: Reading) -> Predict:
        """The head of that kind after the tasks so far, all but "linear"."""
        if reading not in ("routed", "prototype"):
            kind = "rp-ridge" if reading == "rp" else reading
            return solve_head(kind, self._all, self._settings)
        count = len(self._own)
        heads = RecalledHead.of_tasks(self._own, range(count))
        routed = reading == "routed"
        route = self._router.lda(SHRINKAGE, equal_priors=True) if routed else self._router.ncm()

        def predict(features: Tensor) -> Tensor:
            scores = route(features)[:, :count]  # tasks that were not seen have −inf
            nearest = F.one_hot(scores.argmax(dim=1), count).to(scores.dtype)
            return heads(features, scores.softmax(dim=1) if routed else nearest)

        return predict


def accuracy(predict: Predict, features: Tensor, samples: Images) -> float:
    """The share of features (n, dim) whose highest score is that of the sample's class."""
    return share_right(predict(features), samples)


def accuracies(
    predict: Predict, features: Sequence[Tensor], samples: Sequence[Images]
) -> list[float]:
    """`accuracy` of several sets of samples."""
    return [accuracy(predict, f, s) for f, s in zip(features, samples, strict=True)]
