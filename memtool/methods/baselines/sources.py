"""Baselines of domain generalisation: learn from all source domains at once, test on an unseen one.

    frozen     the backbone as it is, under every kind of head on the pooled features
    erm        one LoRA on the pooled images (empirical risk minimisation)
    moe-lora   as many LoRA as source domains, mixed by a learned router, on the pooled images

The pooled images run through as many epochs as every domain does in the memory's stage 1, and so
through as many steps as all domains together there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memtool.evaluation.record import Kind
from memtool.heads import LinearHead
from memtool.learning.learner import Learner
from memtool.methods.baselines.frozen import frozen_features, train_head
from memtool.methods.baselines.moe_lora import MoeLora
from memtool.methods.baselines.reading import (
    TITLES,
    ClosedForms,
    Predict,
    Reading,
    accuracies,
    accuracy,
    random_reading,
)
from memtool.streams.task import Images, Task
from memtool.workspace import Workspace


@dataclass(frozen=True)
class HeldOut:
    """What a model that learned from the source domains reaches; fractions 0..1.

    `accuracy` is on the domain that it never saw; `validation` is the mean over the sources of the
    accuracy on their validation samples, None without any; `seconds` are those of learning.
    """

    id: str
    label: str
    kind: Kind
    accuracy: float
    validation: float | None
    seconds: float


def frozen_sources(work: Workspace, sources: Sequence[Task], held_out: Images) -> list[HeldOut]:
    """The frozen features under heads of the pooled features, and under one head per domain."""
    begin = time.perf_counter()
    closed = ClosedForms(work, len(sources))
    parts = [frozen_features(work, task.train) for task in sources]
    for features, task in zip(parts, sources, strict=True):
        closed.count(features, task)
    head = LinearHead(work.backbone.dim, len(work.stream.class_names))
    train_head(work, head, torch.cat(parts), Task.pooled(sources))
    seconds = time.perf_counter() - begin
    closed_forms: tuple[Reading, ...] = ("ncm", "ridge", "lda", "routed", "prototype")
    closed_forms = (*closed_forms, *random_reading(work))
    heads: dict[Reading, Predict] = {"linear": head.classifier().to("cpu")}
    heads.update({reading: closed.solve(reading) for reading in closed_forms})
    return _measured(
        "frozen", "frozen", heads, partial(frozen_features, work), sources, held_out, seconds
    )


def trained_sources(
    kind: type[Learner],
    id: str,
    title: str,
    work: Workspace,
    sources: Sequence[Task],
    held_out: Images,
) -> list[HeldOut]:
    """A learner on the pooled images, under its linear head and under an LDA head."""
    begin = time.perf_counter()
    learner = kind(work, len(sources))
    learner.learn(Task.pooled(sources), f"all sources: baseline, {title}")
    closed = ClosedForms(work, len(sources))
    for task in sources:
        closed.count(learner.features_of(task.train), task)
    seconds = time.perf_counter() - begin
    heads: dict[Reading, Predict] = {
        "linear": learner.objective.classifier().to("cpu"),
        "lda": closed.solve("lda"),
        **{reading: closed.solve(reading) for reading in random_reading(work)},
    }
    return _measured(id, title, heads, learner.features_of, sources, held_out, seconds)


OF_SOURCES: dict[str, Callable[[Workspace, Sequence[Task], Images], list[HeldOut]]] = {
    "frozen": frozen_sources,
    "erm": partial(trained_sources, Learner, "erm", "one LoRA on all sources (ERM)"),
    "moe-lora": partial(trained_sources, MoeLora, MoeLora.id, MoeLora.title),
}
"""Baselines by name: workspace, source tasks and held-out samples to what was reached."""


def _measured(
    id: str,
    title: str,
    heads: Mapping[Reading, Predict],
    features_of: Callable[[Images], Tensor],
    sources: Sequence[Task],
    held_out: Images,
    seconds: float,
) -> list[HeldOut]:
    """Every head on the held-out samples and on the validation samples of the sources."""
    test = features_of(held_out)
    kept = [task.validation for task in sources if len(task.validation)]
    validation = [features_of(samples) for samples in kept]
    found = []
    for reading, predict in heads.items():
        scores = accuracies(predict, validation, kept)
        found.append(
            HeldOut(
                f"{id}-{reading}",
                f"{title}, {TITLES[reading]}",
                "baseline",
                accuracy(predict, test, held_out),
                sum(scores) / len(scores) if scores else None,
                seconds,
            )
        )
    return found
