"""A model of images that runs as its library wrote it, and whose layers add what is recalled.

Its blocks and layers, as `survey.py` found them, are replaced by those of `called.py`, which find
the mixture of a pass in the model's one `Call`. So a model of any build is adapted without a copy
of its code here: Swin and MobileViT, which fold windows into the batch, ConvNets, and all others
that have linear layers or convolutions.

A block's input is seen by a recall as tokens (b, n, d): a map's places are its tokens. Blocks may
differ in width (`block_dim`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from memtool.adapters.layout import Site
from memtool.adapters.values import Recall
from memtool.backbones.called import Call, CalledBlock, CalledConv, CalledLinear, Reached
from memtool.backbones.interface import Backbone
from memtool.backbones.survey import Block, Reading, Survey, surveyed
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.backbones.vit import check_pixels, to_pixels
from memtool.errors import ConfigError, MismatchError

CAN_BE_ADAPTED = "torch's Linear and Conv2d in blocks that run once a pass, called image by image"


class AsWritten(Backbone):
    """A frozen model of images; takes it over and replaces its blocks, and layers in them.

    `dim` is the width of the features. Raises ConfigError for a model without a layer that can be
    adapted, and for images of a size that it does not read.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        reading: Reading,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3:
            raise ConfigError(f"backbone {name} takes {len(mean)} channels", expected="3 channels")
        model.eval().requires_grad_(False)
        self.name = name
        self.image_size = image_size
        self.sha256 = tensor_sha256(model.state_dict())
        self.survey = survey_of(model, name, reading, image_size)
        self.targets = self.survey.targets
        self.dim = self.survey.dim
        self.depth = len(self.survey.blocks)
        self.prefix_tokens = _prefix(reading.prefix_tokens, self.survey.blocks)
        self.call = Call()
        self._features = reading.features
        for layer in self.survey.layers:
            inner = model.get_submodule(layer.name)
            if layer.window is None:
                called: nn.Module = CalledLinear(inner, layer.name, self.call)
            else:
                called = CalledConv(inner, layer.name, self.call, layer.window, pads=layer.pads)
            # Other blocks may have the same layer, and then an adapter of their own at it.
            root = self.survey.blocks[layer.block].name
            _replace(model if layer.name == root else model.get_submodule(root), inner, called)
        for number, block in enumerate(self.survey.blocks):
            seen = _places if block.channels == "first" else _tokens
            inner = model.get_submodule(block.name)
            _replace(model, inner, CalledBlock(inner, number, self.call, {}, seen))
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def blocks(self) -> Sequence[CalledBlock]:
        """The blocks, in the order in which they run."""
        found = [self.model.get_submodule(block.name) for block in self.survey.blocks]
        return [block for block in found if isinstance(block, CalledBlock)]

    def sites_in(self, block: int, target: str) -> tuple[Site, ...]:
        """The sites of a target in a block; several where it has several such layers, or none."""
        return self.survey.sites_in(block, target)

    def block_dim(self, block: int) -> int:
        """Width of the input of a block."""
        return self.survey.blocks[block].dim

    def first_norm(self, block: int) -> nn.LayerNorm:
        """None is known of a block as written: raises ConfigError."""
        raise ConfigError(
            f"memory.query_norm block on backbone {self.name}, whose block {block} is called as it "
            "is: what it does first is not known",
            expected="timm's plain Vision Transformers, or open_clip_image:<name>",
            remedy="--set memory.query_norm=layer",
        )

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (batch, height, width, 3) to normalised float32 (batch, 3, size, size).

        Another size is resized, antialiased bicubic, both sides to `image_size`.
        """
        return (to_pixels(images, self.image_size) - self.mean) / self.std

    def features(self, pixels: Tensor, recall: Recall | None = None) -> Tensor:
        """Pooled features (batch, dim) of preprocessed pixels (batch, 3, size, size)."""
        check_pixels(pixels, self.image_size)
        found: Tensor = self.call.under(recall, lambda: self._features(self.model, pixels))
        return found

    def hidden(self, pixels: Tensor, block: int, recall: Recall | None = None) -> Tensor:
        """The input (batch, tokens, width) of a block, the earlier ones under `recall`."""
        if not 0 <= block < self.depth:
            raise MismatchError(
                f"block {block} of {self.name}", expected=f"a block from 0 to {self.depth - 1}"
            )
        check_pixels(pixels, self.image_size)
        try:
            self.call.under(recall, lambda: self._features(self.model, pixels), until=block)
        except Reached as reached:
            return reached.hidden
        raise MismatchError(f"block {block} of {self.name} did not run")


def survey_of(model: nn.Module, name: str, reading: Reading, size: int) -> Survey:
    """As `surveyed`. Raises ConfigError where the model cannot read such images, or be adapted.

    Attention that has a switch for it is left calling its fused layer.
    """
    _own_bias_apart(model)
    made_for = reading.made_for or 224
    try:
        survey = surveyed(model, reading, size)
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ConfigError(
            f"backbone {name} cannot read images of {size} pixels: {error}",
            expected=f"images of {made_for} pixels, for which it was made",
            remedy=f"--set backbone.image_size={made_for}",
        ) from error
    if not survey.layers:
        reasons = [f"{layer} is {why}" for layer, why in islice(survey.left_out.items(), 3)]
        if not survey.blocks:
            reasons = ["no part of it runs once a pass and is given one tensor of the images"]
        raise ConfigError(
            f"backbone {name} has no layer that can be adapted"
            + (f": {'; '.join(reasons)}" if reasons else ""),
            expected=CAN_BE_ADAPTED,
            remedy="another model: memtool backbones FILTER lists them with their targets",
        )
    return survey


def _own_bias_apart(model: nn.Module) -> None:
    """Let attention whose bias is put together from parts call its fused layer, and then add it.

    So it is in BEiT, EVA-02 and Swin V2 of timm, which have a switch for it.
    """
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            setattr(module, "qkv_bias_separate", True)  # noqa: B010


def _replace(root: nn.Module, module: nn.Module, by: nn.Module) -> None:
    """Put another module in the place of one, under every name that it has in `root`."""
    places = [
        (parent, own)
        for parent in root.modules()
        for own, child in parent._modules.items()
        if child is module
    ]
    for parent, own in places:
        setattr(parent, own, by)


def _tokens(hidden: Tensor) -> Tensor:
    """Tokens (b, n, d) of tokens, or of a map with channels last."""
    return hidden if hidden.ndim == 3 else hidden.flatten(1, -2)


def _places(hidden: Tensor) -> Tensor:
    """Tokens (b, n, d) of a map with channels first."""
    return hidden.flatten(2).transpose(1, 2)


def _prefix(said: int, blocks: Sequence[Block]) -> int:
    """Tokens before the patches: as many as are said, where squares of patches are behind them."""
    if any(block.axes != 3 for block in blocks):
        return 0
    patches = [block.tokens - said for block in blocks]
    return said if all(n > 0 and round(n**0.5) ** 2 == n for n in patches) else 0
