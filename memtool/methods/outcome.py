"""What came out for inputs: how many are right, the best class, and how like what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memtool.evaluation.right import Share
from memtool.heads import FeatureStatistics
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.novelty import LIMIT, novelty
from memtool.methods.results import Prediction
from memtool.streams.task import Images


def share_right(logits: Tensor, samples: Images) -> Share:
    """Share of samples whose own class has the highest of the logits (n, classes)."""
    return Share.of_classes(logits.argmax(1).numpy(), samples.labels)


def seen_before(
    features: Tensor,
    statistics: Mapping[int, FeatureStatistics],
    queries: Tensor | None = None,
    asked: Mapping[int, QueryStatistics] | None = None,
) -> float | None:
    """The novelty of one input: features (1, dim) and, where a memory asks, queries (1, L, d).

    Each by the moments of the tasks that were learned. None where these do not tell.
    """
    looks = [novelty(features[None], [one.moments for one in statistics.values()])]
    if queries is not None and asked is not None:
        moments = [one.moments for one in asked.values()]
        looks.append(novelty(queries.transpose(0, 1), moments))
    found = [look for look in looks if look is not None]
    if len(found) < len(looks):
        return None
    return float(torch.stack(found).square().mean().sqrt())


def predicted(probabilities: Tensor, class_names: Sequence[str], far: float | None) -> Prediction:
    """The most probable of classes (classes,), for an input of novelty `far`."""
    best = int(probabilities.argmax())
    return Prediction(
        label=class_names[best],
        probability=float(probabilities[best]),
        **told_of(far),
    )


def told_of(far: float | None) -> dict[str, Any]:
    """What a result says of an input of novelty `far`."""
    return {"novelty": far, "unlike": None if far is None else far > LIMIT}
