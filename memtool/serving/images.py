"""Pictures of many requests in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from memtool.inference.predictor import Predicted, Predictor
from memtool.serving.batcher import Work
from memtool.serving.metrics import Metrics
from memtool.serving.models import Model


class Pictures(Work):
    """The pictures of one request, decoded: uint8 (n, size, size, 3), for one model.

    `topk` classes are wanted of each, and up to `adapters` of those that were recalled.
    """

    def __init__(
        self, model: Model, pixels: Sequence[npt.NDArray[np.uint8]], *, topk: int, adapters: int
    ) -> None:
        super().__init__(len(pixels))
        self.model, self.topk, self.adapters = model, topk, adapters
        self.pixels = pixels


class PictureRunner:
    """Runs pictures: those of one model together, at most `most` in a pass."""

    def __init__(self, metrics: Metrics, most: int) -> None:
        self._metrics, self._most = metrics, most

    def __call__(self, works: Sequence[Pictures]) -> list[list[Predicted]]:
        """The predictions of every request."""
        every: dict[Pictures, list[Predicted]] = {}
        for model in dict.fromkeys(work.model for work in works):
            own = [work for work in works if work.model is model]
            predicted = self._predicted(model, own)
            for work in own:
                every[work] = predicted[: work.size]
                predicted = predicted[work.size :]
        # Not before all went well: else what is run again would count twice.
        for one in (one for work in works for one in every[work]):
            weights = {share.adapter: share.weight for share in one.weights}
            self._metrics.answered(weights, unlike=one.unlike)
        return [[_as_asked(work, one) for one in every[work]] for work in works]

    def _predicted(self, model: Model, works: Sequence[Pictures]) -> list[Predicted]:
        predictor = model.ready
        assert isinstance(predictor, Predictor)
        topk = max(work.topk for work in works)
        adapters = len(predictor.memory.adapters)  # all are counted; a request is given its own few
        pixels = np.stack([one for work in works for one in work.pixels])
        found: list[Predicted] = []
        for first in range(0, len(pixels), self._most):
            batch = pixels[first : first + self._most]
            found += predictor.predict(batch, topk=topk, adapters=adapters)
        return found


def _as_asked(work: Pictures, one: Predicted) -> Predicted:
    """Without what others of the batch asked for beyond this request."""
    return replace(one, classes=one.classes[: work.topk], weights=one.weights[: work.adapters])
