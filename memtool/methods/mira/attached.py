"""A memory of MIRA attached to its frozen model."""

from __future__ import annotations

from torch import Tensor

from memtool.backbones.interface import Backbone
from memtool.errors import NotFoundError
from memtool.methods.attached import (
    AttachedAdapters,
    AttachedImages,
    HeadModule,
    Output,
    finite,
    unknown,
)
from memtool.methods.mira.recall import MemoryModel
from memtool.methods.mira.settle import settled
from memtool.methods.mira.state import Snapshot
from memtool.methods.records import task_of
from memtool.settings import HeadSettings
from memtool_stores import AdapterRecord


class AttachedMixture(AttachedImages):
    """Whole adapters mixed by learned keys (MIRA)."""

    def __init__(self, snapshot: Snapshot, precision: str) -> None:
        _, model, head = snapshot.consolidated()
        super().__init__(model.backbone, precision)
        self.model: MemoryModel = model
        self.head = HeadModule(head)
        self.reaches = snapshot.reaches()

    def hold_all(self) -> None:
        """As `AttachedImages.hold_all`."""
        self.reaches.hold_all()

    def seen(self, pixels: Tensor) -> Output:
        """As `AttachedImages.seen`, in one pass."""
        offset = settled(self.model, lambda *seen: self.head(*seen)[1], pixels)
        features, coefficients, queries = self.model.seen(pixels, offset)
        weights = coefficients.mean(dim=1)
        logits, probabilities = self.head(features, weights)
        looks = (features.float().unsqueeze(0), queries.transpose(0, 1))
        far = self.reaches(looks, weights)
        novelty = unknown(features) if far is None else finite(far, features)
        return Output(logits, probabilities, weights, novelty)


def attached_alone(
    backbone: Backbone,
    snapshot: Snapshot,
    record: AdapterRecord,
    settings: HeadSettings,
    precision: str,
) -> AttachedAdapters:
    """The exact adapter of a record with the head that was trained with it.

    `settings` are those of the head where the memory was never consolidated. Raises NotFoundError
    for an adapter without a head, ConfigError for a task of several adapters.
    """
    head = snapshot.own_head(record.name)
    if head is None:
        raise NotFoundError(
            f"adapter {record.name!r} came without a trained head",
            remedy="attach without a task",
        )
    return AttachedAdapters(
        backbone,
        snapshot.own_values(task_of(record), backbone.device),
        [head],
        precision,
        places=[snapshot.view.adapters.index(record)],
        adapters=len(snapshot.view.adapters),
        told=0,
        of_directions=(settings if snapshot.state is None else snapshot.state.head).is_fixed,
    )
