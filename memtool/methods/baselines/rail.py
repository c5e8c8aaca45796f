"""RAIL: ridge on a random projection of frozen features, fused with the zero-shot scores.

    φ(x) = relu(R f(x) / |f(x)|)                       R (width, dim) is random and stays
    W    = (Σ φ φᵀ + λ I)⁻¹ Σ φ yᵀ                     over all samples so far, y one-hot
    p(x) = softmax of the zero-shot logits
    where argmax p(x) is a class that was learned:     p(x) ← (1 − β) p(x) + β W φ(x)

Nothing is trained, no sample is kept. With P = (Σ φ φᵀ + λ I)⁻¹, the n samples Φ (n, width) of a
task and their Y change it and W exactly, whatever the order of tasks:

    P ← P − P Φᵀ (I + Φ P Φᵀ)⁻¹ Φ P,   W ← W + P Φᵀ (Y − Φ W)

Source: Xu et al. 2024, Advancing Cross-domain Discriminability in Continual Learning of
Vision-Language Models (primal form): λ = 0.1, β = 0.9 and R uniform in ±1/√dim are of its code.

Otherwise than there: 5,000 projections for 15,000, as P has the square of their number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.evaluation.course import Course
from memtool.evaluation.record import Row
from memtool.heads import CosineHead
from memtool.learning.known import fixed_head
from memtool.methods.baselines.frozen import frozen_features
from memtool.methods.outcome import share_right
from memtool.streams.task import Task
from memtool.workspace import Workspace

WIDTH = 5_000
"""Projections."""

RIDGE = 0.1
"""λ."""

FUSION = 0.9
"""β."""

ROWS = 1_000
"""Samples that are counted at once; how many changes nothing but the memory that it takes."""


class Rail:
    """What was counted so far: `inverse` (width, width), `weight` (width, classes), float64.

    `learned` (classes,) says which classes were.
    """

    def __init__(self, dim: int, classes: int, generator: torch.Generator) -> None:
        bound = dim**-0.5
        self.projection = bound * (2 * torch.rand(WIDTH, dim, generator=generator).double() - 1)
        self.inverse = torch.eye(WIDTH, dtype=torch.float64) / RIDGE
        self.weight = torch.zeros(WIDTH, classes, dtype=torch.float64)
        self.learned = torch.zeros(classes, dtype=torch.bool)

    def projected(self, features: Tensor) -> Tensor:
        """φ (n, width), float64, of features (n, dim)."""
        return F.linear(F.normalize(features.double(), dim=1), self.projection).relu()

    def count(self, features: Tensor, labels: Tensor) -> None:
        """Count samples: features (n, dim) and classes (n,) int64."""
        for part, wanted in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            phi = self.projected(part)
            seen = self.inverse @ phi.T
            gain = torch.eye(len(phi), dtype=torch.float64) + phi @ seen
            self.inverse -= seen @ torch.linalg.solve(gain, seen.T)
            target = F.one_hot(wanted, len(self.learned)).double()
            self.weight += self.inverse @ (phi.T @ (target - phi @ self.weight))
        self.learned[labels] = True

    def scores(self, features: Tensor, zero_shot: CosineHead) -> Tensor:
        """Scores (n, classes) of features (n, dim)."""
        known = zero_shot(features).softmax(dim=1).double()
        here = self.learned[known.argmax(dim=1)]
        fused = (1 - FUSION) * known[here] + FUSION * self.projected(features[here]) @ self.weight
        known[here] = fused
        return known


def rail(work: Workspace, tasks: Sequence[Task]) -> list[Row]:
    """Count task after task; one row, which begins with the zero-shot model."""
    zero_shot = fixed_head(work).to("cpu")
    generator = work.engine.generator(work.seed)
    model = Rail(work.backbone.dim, len(work.stream.class_names), generator)
    course = Course(tasks, work.unseen)
    samples = [task.test for task in course.tested]
    test = [frozen_features(work, each) for each in samples]
    seconds = 0.0
    for number in range(len(tasks) + 1):
        if number:
            begin = time.perf_counter()
            train = tasks[number - 1].train
            labels = torch.from_numpy(np.asarray(train.labels))
            model.count(frozen_features(work, train), labels)
            seconds += time.perf_counter() - begin
        found = [
            share_right(model.scores(features, zero_shot), each)
            for features, each in zip(test, samples, strict=True)
        ]
        course.add(number, found)
    label = "RAIL, ridge on projections, fused with zero-shot"
    return [course.row("rail", label, "baseline", seconds=seconds)]
