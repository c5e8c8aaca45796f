"""What every backbone offers: a frozen model whose linear layers can be adapted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from memtool.adapters.layout import Site
from memtool.adapters.values import Recall


class Backbone(nn.Module, ABC):
    """A frozen image model with adaptable linear layers.

    Attributes: `name` as in the configuration; `dim`, the width of the features and of every
    block's input; `depth`, the number of blocks; `image_size`, pixels a side of its input;
    `prefix_tokens`, class and register tokens before the patches;
    `sha256`, the hash of its tensors by name (before any layer is replaced).
    All parameters have requires_grad False.
    """

    name: str
    dim: int
    depth: int
    image_size: int
    prefix_tokens: int
    sha256: str

    @abstractmethod
    def sites(self, targets: Sequence[str]) -> tuple[Site, ...]:
        """The sites of the named targets ("q", "k", "v", "proj", "fc1", "fc2") in block order."""

    @abstractmethod
    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (batch, height, width, 3) to normalised float32 (batch, 3, size, size)."""

    @abstractmethod
    def features(self, pixels: Tensor, recall: Recall | None = None) -> Tensor:
        """Pooled features (batch, dim) of preprocessed pixels.

        `recall(block, hidden)` is called with the input of every block, before its first norm:
        hidden (batch, tokens, dim). What it returns adapts the linear layers of that block.
        """

    @abstractmethod
    def hidden(self, pixels: Tensor, block: int) -> Tensor:
        """The input (batch, tokens, dim) of a block of the frozen model; later blocks do not run.

        Raises MismatchError for a block that is not there.
        """
