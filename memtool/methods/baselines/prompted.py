"""Learners of prompts: the backbone stays as it is, what stands in front of its tokens learns.

An image is read twice. The frozen model reads it first, and its feature is the query by which a
method finds or mixes prompts; then the model reads it under these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtool.adapters.prefix import Prefix
from memtool.adapters.values import Recall
from memtool.backbones.interface import WithPrefix
from memtool.errors import ConfigError
from memtool.learning.learner import Learner
from memtool.learning.objective import Objective
from memtool.methods.baselines.refused import require_own_head
from memtool.workspace import Workspace


class Prompted(Learner, ABC):
    """A linear head on the features of images under prompts, task after task.

    A subclass makes its prompts in `begin` and says in `prefix` which of them an image has.
    `query` (b, dim) is what the images of the last batch asked.
    """

    query: Tensor

    def __init__(self, work: Workspace, tasks: int, objective: Objective | None = None) -> None:
        """Raises ConfigError on texts, under a head that nothing trains, and without attention."""
        require_prompts(work, self.id)
        super().__init__(work, tasks, objective)

    @abstractmethod
    def begin(self) -> None:
        """Make the prompts."""

    @abstractmethod
    def prefix(self, query: Tensor) -> Prefix:
        """The prompts of images that ask (b, dim)."""

    def recall(self) -> Recall | None:
        """No adapters."""
        return None

    def features(self, images: Tensor) -> Tensor:
        """Features (b, dim) of uint8 images (b, h, w, 3) under their prompts."""
        backbone = self.objective.backbone
        pixels = backbone.preprocess(images)
        with torch.no_grad():
            self.query = backbone.features(pixels)
        features: Tensor = backbone.features(pixels, prefix=self.prefix(self.query))
        return features

    def forward(self, inputs: Tensor, targets: Tensor | None = None, seed: int = 0) -> Tensor:
        """Logits (b, classes) of images."""
        del targets, seed
        logits: Tensor = self.objective.head(self.features(inputs))
        return logits.float()

    @torch.no_grad()
    def features_of(self, samples: Any) -> Tensor:
        """Features (n, dim) of images under their prompts, on the CPU."""
        return self.work.engine.predict(self.features, samples.images)

    @property
    def dim(self) -> int:
        """Width of a prompt."""
        dim: int = self.work.backbone.dim
        return dim

    def drawn(self, *shape: int, low: float, high: float) -> Tensor:
        """Numbers between `low` and `high` for the next task, by the seed of its training."""
        generator = self.work.engine.generator(self.work.training_seed(len(self.seen) + 1))
        numbers = low + (high - low) * torch.rand(*shape, generator=generator)
        return numbers.to(self.work.engine.device)

    def there(self, *blocks: int) -> tuple[int, ...]:
        """Those of some blocks that the model has."""
        return tuple(block for block in blocks if block < self.work.backbone.depth)


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """The cosine (b, n) of each query (b, dim) with each key (n, dim), float32 at least."""
    with torch.autocast(query.device.type, enabled=False):
        query = query.float() if query.dtype == torch.bfloat16 else query
        return F.normalize(query, dim=-1) @ F.normalize(keys.to(query.dtype), dim=-1).t()


def require_prompts(work: Workspace, id: str) -> None:
    """Raise ConfigError where nothing can learn by prompts in front of an image's tokens."""
    require_own_head(work, id)
    if not isinstance(work.backbone, WithPrefix):
        raise ConfigError(
            f"baseline {id} with backbone {work.backbone.name}, which takes no prompts",
            expected="a plain Vision Transformer: nano or timm:<model name>",
            remedy="--set backbone.name=nano",
        )
