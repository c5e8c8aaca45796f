"""Predictions of a memory for pictures: what `memtool predict` writes and `memtool serve` answers.

predictor = Predictor.of(memtool.load("memory@good"))
pixels = predictor.pixels(Path("a.png").read_bytes(), "a.png")
predictor.predict(np.stack([pixels]))[0].label
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from memtool.backbones.interface import Backbone
from memtool.errors import ConfigError
from memtool.memories.novelty import LIMIT
from memtool.memory import Memory
from memtool.methods.attached import AttachedImages
from memtool.streams.images import decode_square

MOST_MARGIN = 500.0
"""A larger margin is not told apart: the next class is impossible, or there is none."""


@dataclass(frozen=True)
class Share:
    """The weight of an adapter in the mixture of one input, mean over blocks."""

    adapter: str
    task: int
    weight: float


@dataclass(frozen=True)
class Predicted:
    """What a memory says of one picture.

    `classes` are the most probable ones with their probabilities, best first, and `label` the first
    of them; `weights` the adapters that were recalled, greatest share first, `task` the number of
    the task that has most of it. `novelty` is None where the memory cannot tell. `margin` is how
    far the best class is before the next, in nats of log-probability: it tells apart what
    probabilities round to one.
    """

    classes: tuple[tuple[str, float], ...]
    weights: tuple[Share, ...]
    task: int
    novelty: float | None
    unlike: bool | None
    margin: float = 0.0

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[0][0]

    @property
    def probability(self) -> float:
        """Its probability."""
        return self.classes[0][1]

    @property
    def sure(self) -> float:
        """How sure the memory is: the margin, 0 for what is unlike all that was learned."""
        return 0.0 if self.unlike else self.margin


class Predictor:
    """One version of a memory on its model: a batch of pictures in, a prediction for each out.

    It may be asked by several threads, one after another.
    """

    def __init__(self, memory: Memory, model: AttachedImages) -> None:
        """The model is asked once, so that the first request is as fast as others.

        Raises ConfigError for a version with adapters that it does not know how to recall.
        """
        self.memory, self.model = memory, model
        self.classes = memory.classes
        assert isinstance(model.backbone, Backbone)
        self.image_size = model.backbone.image_size
        self._adapters = [(record.name, record.task) for record in memory.adapters]
        self._require_whole()

    @classmethod
    def of(cls, memory: Memory, *, precision: str = "fp32", device: str = "cpu") -> Predictor:
        """The predictor of a memory of images. Raises ConfigError for one of texts."""
        if memory.reads == "texts":
            raise ConfigError(
                f"the memory {memory.store.url} is of a language model",
                expected="a memory of images",
                remedy="memtool generate answers prompts",
            )
        model = memory.attach(precision=precision)
        assert isinstance(model, AttachedImages)
        model.to(device)
        return cls(memory, model)

    @torch.inference_mode()
    def _require_whole(self) -> None:
        blank = torch.zeros(1, self.image_size, self.image_size, 3, dtype=torch.uint8)
        out = self.model(blank.to(next(self.model.parameters()).device))
        if (known := out.weights.shape[1]) != len(self._adapters):
            raise ConfigError(
                f"version {self.memory.version} holds {len(self._adapters)} adapters, and recalls "
                f"{known}",
                expected="a version that was consolidated after its last adapter was written",
                remedy="memtool consolidate",
            )

    def pixels(self, encoded: bytes, where: str) -> npt.NDArray[np.uint8]:
        """The bytes of one image file, decoded: uint8 (size, size, 3). Raises DataError."""
        return decode_square(encoded, self.image_size, where, self.memory.config.stream.crop)

    @torch.inference_mode()
    def predict(
        self, pixels: npt.NDArray[np.uint8], *, topk: int = 1, adapters: int = 5
    ) -> list[Predicted]:
        """The predictions for pictures, uint8 (n, size, size, 3), in their order.

        With the `topk` most probable classes, and up to `adapters` of those that were recalled.

        >>> import memtool
        >>> predictor = Predictor.of(memtool.load("memory"))
        >>> blank = np.zeros((1, 32, 32, 3), dtype=np.uint8)
        >>> (found,) = predictor.predict(blank, topk=2)
        >>> len(found.classes), found.label in predictor.classes
        (2, True)
        >>> {share.adapter for share in found.weights} <= {"task-1-seed-0", "task-2-seed-0"}
        True
        """
        batch = torch.from_numpy(pixels).to(next(self.model.parameters()).device)
        out = self.model(batch)
        most = out.probabilities.float().topk(min(topk, len(self.classes)), dim=1)
        likely, which = most.values.tolist(), most.indices.tolist()
        margins = _margins(out.logits).tolist()
        weights, far = out.weights.float().cpu(), out.novelty.tolist()
        order = weights.argsort(dim=1, descending=True, stable=True)[:, :adapters].tolist()
        rows = weights.tolist()
        return [
            Predicted(
                tuple((self.classes[c], p) for c, p in zip(which[i], likely[i], strict=True)),
                tuple(self._share(j, rows[i][j]) for j in order[i] if rows[i][j] > 0),
                self._task(rows[i]),
                None if np.isnan(far[i]) else far[i],
                None if np.isnan(far[i]) else far[i] > LIMIT,
                margins[i],
            )
            for i in range(len(pixels))
        ]

    def _share(self, row: int, weight: float) -> Share:
        name, task = self._adapters[row]
        return Share(name, task, weight)

    def _task(self, weights: Sequence[float]) -> int:
        """The number of the task whose adapters have the greatest weight together."""
        totals: dict[int, float] = {}
        for (_, task), weight in zip(self._adapters, weights, strict=True):
            totals[task] = totals.get(task, 0.0) + weight
        return max(totals, key=lambda task: totals[task])


def _margins(logits: torch.Tensor) -> torch.Tensor:
    """How far the best of every row of logits (n, classes) is before the next: (n,), 0 for NaN."""
    if logits.shape[1] < 2:
        return logits.new_full((len(logits),), MOST_MARGIN)
    best, after = logits.float().topk(2, dim=1).values.unbind(dim=1)
    return (best - after).nan_to_num(nan=0.0).clamp(0.0, MOST_MARGIN)
