"""Whether an input is like what a memory learned, beside what the memory makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.engine import Engine
from memtool.heads import FeatureStatistics
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.novelty import LIMIT, novelty
from memtool.methods.results import Prediction
from memtool.methods.state import Snapshot


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


def seen_by(engine: Engine, snapshot: Snapshot, image: npt.NDArray[np.uint8]) -> float | None:
    """The novelty of an image (h, w, 3) to a memory of whole adapters that is consolidated."""
    _, model, _ = snapshot.consolidated()

    def run(batch: Tensor) -> Tensor:
        features, _, queries = model.seen(model.backbone.preprocess(batch))
        return torch.cat([features.float().unsqueeze(1), queries], dim=1)

    found = engine.predict(run, image[None])
    statistics, asked = snapshot.feature_statistics(), snapshot.query_statistics()
    return seen_before(found[:, 0], statistics, found[:, 1:], asked)


def predicted(probabilities: Tensor, class_names: Sequence[str], far: float | None) -> Prediction:
    """The most probable of classes (classes,), for an input of novelty `far`."""
    best = int(probabilities.argmax())
    return Prediction(
        label=class_names[best],
        probability=float(probabilities[best]),
        novelty=far,
        unlike=None if far is None else far > LIMIT,
    )
