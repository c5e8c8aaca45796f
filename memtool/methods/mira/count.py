"""What consolidation counts of a task's images: features under its own adapters, and queries.

One pass over the task's own images; from the moments of both follow keys and head, exact over tasks
without replay.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.adapters.recalls import every, on_top, same_for_all
from memtool.adapters.values import AdapterValues
from memtool.backbones.interface import Backbone
from memtool.engine import Engine
from memtool.memories.closed_form import QueryStatistics
from memtool.memories.keyed import KeyedMemory
from memtool.methods.mira.look import ImageLook
from memtool.methods.mira.recall import MemoryModel, features_and_queries
from memtool.sections import MemorySettings
from memtool.streams.task import Images


def count_task(
    engine: Engine,
    backbone: Backbone,
    memory: KeyedMemory,
    look: ImageLook,
    settings: MemorySettings,
    own: AdapterValues,
    samples: Images,
    beneath: MemoryModel | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (n, f) and queries (memories, n, d) of a task under its own adapters.

    With those features that `look` puts beside. Several adapters of one task are mixed with equal
    coefficients. Residual ones are added to what the memory `beneath` recalls.
    """
    count = len(own)
    equal = torch.full((count,), 1 / count, device=engine.device)
    begin = own.begin if beneath is None else min(own.begin, beneath.values.begin)
    alone = every(own) if count == 1 else same_for_all(own, equal, settings.mix)

    def run(images: Tensor) -> Tensor:
        recall = alone
        if beneath is not None:
            recall = on_top(beneath.recall(backbone.preprocess(images)), own, equal)
        return features_and_queries(backbone, memory, look, recall, images, begin)

    joined = engine.predict(run, samples.images)
    widths = [look.features_width, *(memory[block].query.dim for block in memory.blocks)]
    features, *queries = joined.split(widths, dim=1)
    return features, torch.stack(queries)


def count_queries(
    asked: Tensor, labels: npt.NDArray[np.int64], *, by_class: bool
) -> QueryStatistics:
    """Moments of a task's queries (memories, n, dim), all at once or by class of `labels` (n,).

    With their reach.
    """
    statistics = QueryStatistics(len(asked), asked.shape[-1])
    places = np.unique(labels, return_inverse=True)[1] if by_class else np.zeros_like(labels)
    for place in range(int(places.max(initial=-1)) + 1):
        statistics.add(place, asked[:, torch.from_numpy(places == place)])
    statistics.keep_reach(asked, torch.from_numpy(places))
    return statistics
