"""Adapters that begin behind some blocks: what the blocks before them give is computed once.

These blocks are frozen, so behind them an image is the same in all epochs, and for all adapters
that are trained in one pass. An image that is augmented is another one in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from memtool.backbones.interface import Onward, Resumable
from memtool.engine import Engine, available_bytes
from memtool.learning.looks import FeatureModel, Labelled
from memtool.settings import TrainSettings
from memtool.streams.task import Images

MOST_KEPT = 0.25
"""The part of the memory that a training leaves which may be kept; making it takes twice that."""


def from_block(
    engine: Engine,
    backbone: FeatureModel,
    block: int,
    samples: Sequence[Images | Labelled],
    train: TrainSettings,
    left: int,
) -> tuple[FeatureModel, Sequence[Images | Labelled]]:
    """The model from its first block with adapters on, and what reaches that of every image.

    `samples` are those of every task that is trained. What reaches a block is on the CPU,
    (n, tokens, dim) float32, and all of it of at most a part of the `left` bytes. The whole model
    and the samples as they are for images that are augmented or mixed before they are seen, for
    prompts, for models that do not go on from a block, and where there is no room.
    """
    whole = backbone, samples
    images = [some for some in samples if isinstance(some, Images)]
    if not (block and len(images) == len(samples) and isinstance(backbone, Resumable)):
        return whole
    if train.augment != "none" or train.mixup:
        return whole
    model = Onward(backbone, block)
    reaching = partial(_reaching, model)
    each = engine.predict(reaching, images[0].images[:1]).nbytes
    needed = sum(len(some) for some in images) * each * engine.processes
    room = min(left, available_bytes(torch.device("cpu")))
    # Processes that differed would wait for each other with other parameters.
    if not engine.on_main(lambda: needed <= MOST_KEPT * room):
        return whole
    kept = (engine.predict(reaching, some.images).numpy() for some in images)
    return model, [Labelled(one, some.labels) for one, some in zip(kept, images, strict=True)]


def _reaching(model: Onward, images: Tensor) -> Tensor:
    return model.backbone.hidden(model.backbone.preprocess(images), model.begin)
