"""Stage 2, consolidation: the memory learns its keys; backbone and values stay frozen.

Task by task, on the task's own images only: its queries and features are counted into running
moments, from which keys and head follow in closed form, exact over tasks without replay. With
epochs the keys of the new tasks (and the query modules) then learn by cross-entropy through the
recalled mixture, as in MIRA; keys of older tasks stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtool.adapters.values import AdapterValues
from memtool.backbones.interface import Backbone
from memtool.config import ConsolidateSettings, MemorySettings, TrainSettings
from memtool.engine import Batch, Batches, Engine, FitResult
from memtool.errors import ConfigError
from memtool.heads import RecalledHead
from memtool.memories.closed_form import QueryStatistics, for_similarity
from memtool.memories.keyed import BlockMemory, KeyedMemory
from memtool.methods.recall import MemoryModel, every, features_and_queries, same_for_all
from memtool.progress import Progress
from memtool.streams.task import Samples

LINEAR = ("identity", "affine", "relu", "tanh", "power")
"""Separations that pass a score on: their closed-form scores are one-hot, not log posteriors."""

SHRINKAGE = 1e-3
"""Of the queries' covariance toward a multiple of the identity; ridge of the linear keys."""


def count_task(
    engine: Engine,
    backbone: Backbone,
    memory: KeyedMemory,
    settings: MemorySettings,
    own: AdapterValues,
    samples: Samples,
) -> tuple[Tensor, Tensor]:
    """Features (n, dim) and queries (memories, n, dim) of a task under its own adapters.

    Several adapters of one task are mixed with equal coefficients.
    """
    count = len(own)
    recall = every(own)
    if count > 1:
        equal = torch.full((count,), 1 / count, device=engine.device)
        recall = same_for_all(own, equal, settings.mix)
    look_at = settings.look_at if settings.scope == "model" else None
    joined = engine.predict(
        lambda images: features_and_queries(backbone, memory, recall, look_at, images),
        samples.images,
    )
    features, *queries = joined.split(backbone.dim, dim=1)
    return features, torch.stack(queries)


def start_keys(
    settings: ConsolidateSettings,
    memory: MemorySettings,
    statistics: QueryStatistics,
    adapter_tasks: Sequence[int],
    generator: torch.Generator,
) -> Tensor:
    """Keys (memories, t, dim + 1) of all adapters before any learning by gradient.

    closed-form   separations that normalise (softmax, topk) get discriminant keys: the score is
                  the log posterior of the task. The others get ridge keys: the score is close to
                  1 for the task of the query and to 0 for the rest.
    mean-query    the mean query of the task
    random        N(0, key_std²)

    The adapters of one task share its key; its weight is divided among them.
    """
    tasks = torch.tensor(adapter_tasks)
    shares = torch.bincount(tasks)[tasks].float()
    if settings.keys == "random":
        width = statistics.dim + 1
        drawn = torch.randn(statistics.blocks, len(tasks), width, generator=generator)
        return drawn * settings.key_std
    if settings.keys == "mean-query":
        return statistics.mean_keys()[:, tasks]
    if memory.separation in LINEAR and memory.similarity == "euclidean":
        raise ConfigError(
            f"closed-form keys for similarity euclidean and separation {memory.separation}",
            expected="scores that are right to the last constant, which distances are not",
            remedy="--set memory.similarity=scaled-dot, or --sep softmax",
        )
    if memory.separation not in LINEAR:
        keys = statistics.lda_keys(SHRINKAGE)[:, tasks]
        keys[..., -1] -= shares.log()
    else:
        keys = statistics.ridge_keys(SHRINKAGE)[:, tasks] / shares[:, None]
    return for_similarity(keys, memory.similarity)


def learn_keys(
    engine: Engine,
    model: MemoryModel,
    head: RecalledHead,
    samples: Samples,
    settings: ConsolidateSettings,
    *,
    first_new: int,
    classes: Sequence[int],
    seed: int,
    progress: Progress | None = None,
    stage: str = "consolidate",
) -> FitResult:
    """Learn keys and query modules by cross-entropy of the recalled mixture under a fixed head.

    Keys before `first_new` do not move: what they were is put back after every step, which also
    undoes weight decay and momentum.
    """
    module = _Scored(model, head, classes)
    model.memory.requires_grad_(True)
    old = [memory.keys.detach()[:first_new].clone() for memory in _memories(model)]

    def put_back() -> None:
        with torch.no_grad():
            for memory, keys in zip(_memories(model), old, strict=True):
                memory.keys[:first_new] = keys

    train = TrainSettings(
        epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr, weight_decay=0.0
    )
    try:
        return engine.fit(
            module,
            Batches(samples.images, samples.labels, settings.batch_size, settings.epochs, seed),
            _cross_entropy,
            train,
            stage=stage,
            after_step=put_back,
            progress=progress,
        )
    finally:
        model.memory.requires_grad_(False)


def drift_degrees(before: Tensor, after: Tensor) -> float:
    """Mean angle in degrees between keys (memories, t, d_k) before and after.

    A key without length has no direction and is left out; 0 when there is no other.
    """
    long = (before.norm(dim=-1) > 0) & (after.norm(dim=-1) > 0)
    if not long.any():
        return 0.0
    cosine = F.cosine_similarity(before[long].double(), after[long].double(), dim=-1)
    return math.degrees(float(torch.arccos(cosine.clamp(-1, 1)).mean()))


class _Scored(nn.Module):
    """The recalled mixture under a fixed head, only the given classes in play."""

    def __init__(self, model: MemoryModel, head: RecalledHead, classes: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.classes = tuple(classes)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (batch, classes)."""
        features, coefficients = self.model.with_coefficients(images)
        return self.head.log_probabilities(features, coefficients.mean(dim=1), self.classes)


def _cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    return F.nll_loss(module(batch.inputs), batch.labels)


def _memories(model: MemoryModel) -> list[BlockMemory]:
    return [model.memory[block] for block in model.memory.blocks]
