"""Adapters that begin behind some blocks: what the blocks before them give is computed once.

These blocks are frozen, so behind them an image is the same in all epochs, and for all adapters
that are trained in one pass. An image that is augmented is another one in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memtool.backbones.interface import Onward, Resumable
from memtool.engine import Batches, Engine, available_bytes
from memtool.learning.looks import FeatureModel, Labelled
from memtool.settings import TrainSettings
from memtool.streams.task import Images

MOST_KEPT = 0.25
"""The part of the memory that a training leaves which may be kept; making it takes twice that."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The inputs (n, tokens, dim), float32, of the block that a model goes on from, of n images."""

    model: Onward
    states: Tensor

    @classmethod
    def where_it_pays(
        cls,
        engine: Engine,
        backbone: FeatureModel,
        block: int,
        samples: Images | Labelled,
        train: TrainSettings,
        left: int,
    ) -> Kept | None:
        """What reaches the first block with adapters, on the device of the engine.

        None for images that are augmented or mixed before they are seen, for prompts, for models
        that do not go on from a block, and where the `left` bytes of the device, or those of the
        CPU on the way, are few.
        """
        if not (block and isinstance(samples, Images) and isinstance(backbone, Resumable)):
            return None
        if train.augment != "none" or train.mixup:
            return None
        model = Onward(backbone, block)
        reaching = partial(_reaching, model)
        one = engine.predict(reaching, samples.images[:1])
        needed = len(samples) * one.nbytes * engine.processes
        room = min(left, available_bytes(torch.device("cpu")))
        # Processes that differed would wait for each other with other parameters.
        if not engine.on_main(lambda: needed <= MOST_KEPT * room):
            return None
        return cls(model, engine.predict(reaching, samples.images).to(engine.device))


@dataclass(frozen=True, eq=False)
class OnwardBatches(Batches):
    """Batches of inputs (groups * size, tokens, dim) of a block in the place of images."""

    kept: Kept | None = None

    def taken(self, epoch: int, rows: npt.NDArray[np.int64]) -> Tensor:
        """What is kept of the samples at the given places."""
        del epoch
        assert self.kept is not None
        states = self.kept.states
        return states[torch.from_numpy(rows).to(states.device)]


def _reaching(model: Onward, images: Tensor) -> Tensor:
    return model.backbone.hidden(model.backbone.preprocess(images), model.begin)
