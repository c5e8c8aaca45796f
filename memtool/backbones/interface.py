"""What every backbone offers: a frozen model whose linear layers can be adapted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from memtool.adapters.layout import Site
from memtool.adapters.prefix import Prefix
from memtool.adapters.values import Recall
from memtool.errors import ConfigError, did_you_mean


class AdaptableBlock(Protocol):
    """A block of a frozen model."""

    def site(self, number: int, target: str) -> Site:
        """Where a target lies in this block, which is block `number`."""


class FrozenModel(nn.Module, ABC):
    """A frozen model with adaptable linear layers, whatever it reads.

    Attributes: `name` as in the configuration; `dim`, the width of every block's input (unless
    `block_dim` says otherwise); `depth`, the number of blocks; `sha256`, the hash of its tensors by
    name (before any layer is replaced); `targets`, the names of the linear layers of a block that
    can be adapted; `transposed`, whether these have weights (in, out), as in GPT-2. All parameters
    have requires_grad False. Always in eval mode.
    """

    name: str
    dim: int
    depth: int
    sha256: str
    targets: tuple[str, ...]
    transposed: bool = False

    @property
    @abstractmethod
    def blocks(self) -> Sequence[AdaptableBlock]:
        """The blocks, in the order in which they are counted."""

    def sites(self, targets: Sequence[str]) -> tuple[Site, ...]:
        """The sites of the named targets, by block, then in the order of the model's `targets`.

        The order of the names does not matter, so equal sets give equal layouts. Raises ConfigError
        for a target that is not known, or none.
        """
        for target in targets:
            if target not in self.targets:
                raise ConfigError(
                    f"backbone {self.name} has no target {target!r}",
                    expected=did_you_mean(target, self.targets),
                    remedy=f"--set backbone.targets={','.join(self._of_any_rank()[:2])}",
                )
        if not targets:
            raise ConfigError("no targets to adapt", expected=f"some of {', '.join(self.targets)}")
        return tuple(
            site
            for number in range(self.depth)
            for target in self.targets
            if target in targets
            for site in self.sites_in(number, target)
        )

    def _of_any_rank(self) -> Sequence[str]:
        """Targets that take an adapter of any rank, as a convolution in groups does not; or all."""
        blocks = range(self.depth)
        plain = [
            target
            for target in self.targets
            if all(site.groups == 1 for block in blocks for site in self.sites_in(block, target))
        ]
        return plain or self.targets

    def sites_in(self, block: int, target: str) -> tuple[Site, ...]:
        """The sites of a target in a block; several where it has several such layers, or none."""
        return (self.blocks[block].site(block, target),)

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """All that the model offers to an adapter, whatever those that are trained here adapt."""
        return self.sites(self.targets)

    def block_dim(self, block: int) -> int:
        """Width of the input of a block, where it is not that of the features."""
        del block
        return self.dim

    def first_norm(self, block: int) -> nn.LayerNorm:
        """The norm that the input of a block goes through before attention, with gain and bias.

        Raises ConfigError for a block whose first norm is no layer norm over its whole width.
        """
        norm = getattr(self.blocks[block], "first_norm", None)
        if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (self.block_dim(block),):
            raise ConfigError(
                f"memory.query_norm block on backbone {self.name}: block {block} does not begin "
                "with a layer norm",
                expected="blocks that normalise their input by a layer norm, as those of a ViT",
                remedy="--set memory.query_norm=layer",
            )
        return norm

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a frozen model has no dropout."""
        del mode
        return super().train(False)


class Backbone(FrozenModel):
    """A frozen image model; a Vision Transformer's targets are "q", "k", "v", "proj", "fc1", "fc2".

    Attributes beside those of `FrozenModel`: `image_size`, pixels a side of its input;
    `prefix_tokens`, class and register tokens before the patches; `mean` and `std` (3, 1, 1), the
    normalisation of channels in [0, 1]. `dim` is the width of the
    features, too.
    """

    image_size: int
    prefix_tokens: int
    mean: Tensor
    std: Tensor

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
    def hidden(self, pixels: Tensor, block: int, recall: Recall | None = None) -> Tensor:
        """The input (batch, tokens, dim) of a block; neither it nor later blocks run.

        Without `recall` that of the frozen model; else the earlier blocks run under it. Raises
        MismatchError for a block that is not there.
        """


class Resumable(Backbone):
    """An image model that goes on from the input of a block, as `hidden` gives it."""

    @abstractmethod
    def features_from(self, begin: int, hidden: Tensor, recall: Recall | None = None) -> Tensor:
        """As `features`, of the input of a block; `recall` is asked from there on."""

    @abstractmethod
    def hidden_from(
        self, begin: int, hidden: Tensor, block: int, recall: Recall | None = None
    ) -> Tensor:
        """As `hidden`, of the input of an earlier block, or of the same."""


@dataclass(frozen=True, eq=False)
class Onward:
    """A model from a block on: its inputs (batch, tokens, dim) are those of the block."""

    backbone: Resumable
    begin: int

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.backbone.dim

    def preprocess(self, inputs: Tensor) -> Tensor:
        """As they are."""
        return inputs

    def features(self, inputs: Tensor, recall: Recall | None = None) -> Tensor:
        """As `Backbone.features`."""
        return self.backbone.features_from(self.begin, inputs, recall)

    def hidden(self, inputs: Tensor, block: int, recall: Recall | None = None) -> Tensor:
        """As `Backbone.hidden`."""
        return self.backbone.hidden_from(self.begin, inputs, block, recall)


class WithPrefix(Resumable):
    """An image model whose attention takes a prefix: prompts in front of the tokens of an image."""

    @abstractmethod
    def features(
        self, pixels: Tensor, recall: Recall | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """As `Backbone.features`, with prompts in front; a recall sees the tokens without them.

        Raises MismatchError for a prefix that does not fit the batch or the model.
        """


class TwoTowers(Resumable):
    """An image model with a text tower beside it, as CLIP.

    Blocks are counted through: those of the text tower follow those of the image tower, so that one
    `recall` serves both; `image_depth` is how many the image tower has. `logit_scale` is the factor
    on cosines of image and text features.
    """

    logit_scale: float
    image_depth: int

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 (texts, context), on the CPU. Raises DataError for one too long."""

    @abstractmethod
    def text_features(self, tokens: Tensor, recall: Recall | None = None) -> Tensor:
        """Features (texts, dim) of token ids; `recall` as in `features`."""
