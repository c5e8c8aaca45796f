"""Adapters that begin behind some blocks: what the blocks before them give is computed once.

These blocks are frozen, so behind them an image is the same for all adapters that are trained in
one pass, and in all epochs where it is not augmented. `Kept` holds it.
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
from memtool.learning.augment import augmented
from memtool.learning.looks import FeatureModel, Labelled
from memtool.settings import TrainSettings
from memtool.streams.task import Images

MOST_KEPT = 0.25
"""The part of the memory that is left which may be kept; while it is made it takes twice that."""

AT_ONCE = 64
"""Images that are computed together. It decides how they are augmented, so no setting does."""


class Kept:
    """What images are as they reach a block: of one epoch at a time, where they are augmented.

    An image is augmented once an epoch, alike for all adapters.
    """

    def __init__(
        self,
        engine: Engine,
        model: Onward,
        images: npt.NDArray[np.uint8],
        train: TrainSettings,
        seed: int,
        device: torch.device,
    ) -> None:
        """`device` holds them."""
        self.model = model
        self._engine, self._images, self._train, self._seed = engine, images, train, seed
        self._device = device
        self._epoch: int | None = None
        self._states = torch.empty(0)

    @classmethod
    def where_it_pays(
        cls,
        engine: Engine,
        backbone: FeatureModel,
        block: int,
        samples: Images | Labelled,
        train: TrainSettings,
        seed: int,
        adapters: int,
    ) -> Kept | None:
        """What reaches the first block with adapters, of which so many are trained in one pass.

        It is held by the device of the engine, or else by the CPU. None where nothing is computed
        twice, where images are mixed before they are seen, for prompts, for models that do not go
        on from a block, and where there is no room.
        """
        twice = adapters > 1 or train.augment == "none"
        if not (
            block and twice and isinstance(samples, Images) and isinstance(backbone, Resumable)
        ):
            return None
        if train.mixup:
            return None
        model = Onward(backbone, block)
        one = engine.predict(partial(_reaching, model), samples.images[:1])
        for device in dict.fromkeys((engine.device, torch.device("cpu"))):
            if len(samples) * one.nbytes <= MOST_KEPT * available_bytes(device):
                return cls(engine, model, samples.images, train, seed, device)
        return None

    def of(self, epoch: int) -> Tensor:
        """The inputs (n, tokens, dim) of the block in an epoch, float32."""
        epoch = 0 if self._train.augment == "none" else epoch
        if epoch != self._epoch:
            self._states = torch.empty(0)  # two epochs are never there together
            self._states = self._computed(epoch).to(self._device)
            self._epoch = epoch
        return self._states

    def _computed(self, epoch: int) -> Tensor:
        draws = np.random.default_rng([self._seed, 4, epoch])

        def reaching(batch: Tensor) -> Tensor:
            batch = augmented(batch, int(draws.integers(2**62)), self._train)
            return _reaching(self.model, batch)

        return self._engine.predict(reaching, self._images, batch_size=AT_ONCE)


@dataclass(frozen=True, eq=False)
class OnwardBatches(Batches):
    """Batches of inputs (groups * size, tokens, dim) of a block in the place of images."""

    kept: Kept | None = None

    def taken(self, epoch: int, rows: npt.NDArray[np.int64]) -> Tensor:
        """What is kept of the samples at the given places."""
        assert self.kept is not None
        states = self.kept.of(epoch)
        return states[torch.from_numpy(rows).to(states.device)]


def _reaching(model: Onward, images: Tensor) -> Tensor:
    return model.backbone.hidden(model.backbone.preprocess(images), model.begin)
