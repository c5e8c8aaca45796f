"""Any plain Vision Transformer as a backbone whose linear layers take a mixture as an argument.

The forward pass of timm's `Block`, `Attention` and `Mlp` is written out here once more (without
dropout and stochastic depth, for a frozen model), because the mixture of a block has to reach its
linear layers as an argument. Blocks of another kind are refused by name; `as_written.py` takes
them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtool.adapters.layout import Site
from memtool.adapters.linear import AdaptedLinear
from memtool.adapters.mixing import Mixture
from memtool.adapters.prefix import Prefix
from memtool.adapters.values import Recall
from memtool.backbones.interface import WithPrefix
from memtool.backbones.plain_vit import PlainAttention, PlainBlock, PlainMlp
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.errors import ConfigError, DataError, MismatchError

VIT_TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")


def is_plain(model: Any) -> bool:
    """Whether it is a Vision Transformer whose blocks are written out here.

    A subclass (DeiT's distilled model, say) has a forward pass of its own.
    """
    kind = type(model)
    if (kind.__module__, kind.__name__) != ("timm.models.vision_transformer", "VisionTransformer"):
        return False
    if model.global_pool == "":
        return False
    return all(
        _is_kind(block, PlainBlock, "Block")
        and _is_kind(block.attn, PlainAttention, "Attention")
        and getattr(block.attn, "gate", None) is None
        and _is_kind(block.mlp, PlainMlp, "Mlp")
        for block in model.blocks
    )


def check_image_size(image_size: int, patch_size: int, name: str) -> None:
    """Raise ConfigError unless whole patches tile the image."""
    if image_size % patch_size:
        raise ConfigError(
            f"backbone {name}: image_size {image_size} with patches of {patch_size} pixels",
            expected=f"a multiple of {patch_size}",
        )


class VitBackbone(WithPrefix):
    """A frozen `VisionTransformer` of timm or `PlainViT`; takes it over and replaces its blocks.

    `mean` and `std` are the normalisation of the three channels in [0, 1]. Always in eval mode.
    Raises ConfigError for blocks or a pooling that this class does not express.
    """

    targets = VIT_TARGETS

    def __init__(self, vit: Any, name: str, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if vit.global_pool == "":
            raise ConfigError(
                f"backbone {name} does not pool its tokens", expected="pooled features"
            )
        if len(mean) != 3 or len(std) != 3:
            raise ConfigError(f"backbone {name} takes {len(mean)} channels", expected="3 channels")
        vit.eval().requires_grad_(False)
        self.name = name
        self.dim = vit.embed_dim
        self.depth = len(vit.blocks)
        self.image_size = vit.patch_embed.img_size[0]
        self.prefix_tokens = vit.num_prefix_tokens
        self.sha256 = tensor_sha256(vit.state_dict())
        blocks = [AdaptedBlock(block, f"blocks.{i}") for i, block in enumerate(vit.blocks)]
        vit.blocks = nn.ModuleList(blocks)
        self.vit = vit
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def blocks(self) -> Sequence[AdaptedBlock]:
        """The blocks, from the image on."""
        blocks: Sequence[AdaptedBlock] = self.vit.blocks
        return blocks

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (batch, height, width, 3) to normalised float32 (batch, 3, size, size).

        Another size is resized, antialiased bicubic, both sides to `image_size`.
        """
        return (to_pixels(images, self.image_size) - self.mean) / self.std

    def features(
        self, pixels: Tensor, recall: Recall | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """Pooled features (batch, dim) of preprocessed pixels (batch, 3, size, size)."""
        hidden = self._embed(pixels)
        if prefix is None:
            prefix = Prefix()
        else:
            prefix.check(len(hidden), self.dim, self.depth)
        prompts = 0
        if prefix.tokens is not None:
            prompts = prefix.tokens.shape[1]
            hidden = torch.cat([prefix.tokens.to(hidden.dtype), hidden], dim=1)
        return self._onward(0, hidden, recall, prefix, prompts)

    def features_from(self, begin: int, hidden: Tensor, recall: Recall | None = None) -> Tensor:
        """Pooled features (batch, dim) of the input (batch, tokens, dim) of a block."""
        return self._onward(begin, hidden, recall, Prefix(), 0)

    def _onward(
        self, begin: int, hidden: Tensor, recall: Recall | None, prefix: Prefix, prompts: int
    ) -> Tensor:
        for number, block in enumerate(self.vit.blocks[begin:], start=begin):
            mixture = None if recall is None else recall(number, hidden[:, prompts:])
            hidden = block(hidden, mixture, prefix.attended.get(number))
        return self.vit.forward_head(self.vit.norm(hidden)[:, prompts:], pre_logits=True)

    def hidden(self, pixels: Tensor, block: int, recall: Recall | None = None) -> Tensor:
        """The input (batch, tokens, dim) of a block, the earlier ones under `recall`."""
        return self.hidden_from(0, self._embed(pixels), block, recall)

    def hidden_from(
        self, begin: int, hidden: Tensor, block: int, recall: Recall | None = None
    ) -> Tensor:
        """The input (batch, tokens, dim) of a block, of that of an earlier one."""
        if not begin <= block < self.depth:
            raise MismatchError(
                f"block {block} of {self.name}",
                expected=f"a block from {begin} to {self.depth - 1}",
            )
        for number, earlier in enumerate(self.vit.blocks[begin:block], start=begin):
            hidden = earlier(hidden, None if recall is None else recall(number, hidden))
        return hidden

    def _embed(self, pixels: Tensor) -> Tensor:
        """The input of the first block."""
        check_pixels(pixels, self.image_size)
        vit = self.vit
        return vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))


class AdaptedBlock(nn.Module):
    """timm's pre-norm `Block`: x + attention(norm(x)), then x + mlp(norm(x)), each layer-scaled."""

    def __init__(self, block: Any, name: str) -> None:
        super().__init__()
        _check_kind(block, PlainBlock, "Block", name)
        self.norm1, self.ls1 = block.norm1, block.ls1
        self.attn = AdaptedAttention(block.attn, f"{name}.attn")
        self.norm2, self.ls2 = block.norm2, block.ls2
        self.mlp = AdaptedMlp(block.mlp, f"{name}.mlp")

    def forward(self, x: Tensor, mixture: Mixture | None, attended: Tensor | None = None) -> Tensor:
        """(batch, tokens, dim) to the same shape; `attended` as in `Prefix`."""
        x = x + self.ls1(self.attn(self.norm1(x), mixture, attended))
        return x + self.ls2(self.mlp(self.norm2(x), mixture))

    @property
    def first_norm(self) -> nn.Module:
        """What its input goes through first."""
        norm: nn.Module = self.norm1
        return norm

    def site(self, number: int, target: str) -> Site:
        """Where one of `VIT_TARGETS` lies in this block, which is block `number`."""
        match target:
            case "q" | "k" | "v":
                return self.attn.qkv.site(number, target)
            case "proj":
                return self.attn.proj.site(number)
            case "fc1":
                return self.mlp.fc1.site(number)
            case _:
                return self.mlp.fc2.site(number)


class AdaptedAttention(nn.Module):
    """timm's `Attention`: multi-head self-attention with one fused projection for q, k and v."""

    def __init__(self, attention: Any, name: str) -> None:
        super().__init__()
        _check_kind(attention, PlainAttention, "Attention", name)
        if getattr(attention, "gate", None) is not None:
            raise ConfigError(f"{name} is gated attention", expected="attention without a gate")
        self.qkv = AdaptedLinear(attention.qkv, f"{name}.qkv")
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.norm = attention.norm
        self.proj = AdaptedLinear(attention.proj, f"{name}.proj")
        self.heads: int = attention.num_heads
        self.head_dim: int = attention.head_dim

    @property
    def width(self) -> int:
        """Output rows of each of q, k and v."""
        return self.heads * self.head_dim

    def forward(self, x: Tensor, mixture: Mixture | None, attended: Tensor | None = None) -> Tensor:
        """(batch, tokens, dim) to the same shape; `attended` as in `Prefix`."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x, mixture).reshape(batch, tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if attended is not None:
            before = attended.to(k.dtype).unflatten(-1, (self.heads, self.head_dim))
            keys, values = before.permute(1, 0, 3, 2, 4).unbind(0)
            k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        mixed = attend(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, self.width)
        return self.proj(self.norm(mixed), mixture)


class AdaptedMlp(nn.Module):
    """timm's `Mlp`: fc1, activation, perhaps a norm, fc2."""

    def __init__(self, mlp: Any, name: str) -> None:
        super().__init__()
        _check_kind(mlp, PlainMlp, "Mlp", name)
        self.fc1 = AdaptedLinear(mlp.fc1, f"{name}.fc1")
        self.act, self.norm = mlp.act, mlp.norm
        self.fc2 = AdaptedLinear(mlp.fc2, f"{name}.fc2")

    def forward(self, x: Tensor, mixture: Mixture | None) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        return self.fc2(self.norm(self.act(self.fc1(x, mixture))), mixture)


def to_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 (batch, height, width, 3) to float32 (batch, 3, size, size) in [0, 1].

    Another size is resized, antialiased bicubic. Raises DataError for anything but such images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(
            f"images {images.dtype} of shape {tuple(images.shape)}",
            expected="uint8 (batch, height, width, 3)",
        )
    pixels = images.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
        # Bicubic overshoots at edges; pixels do not.
        pixels = pixels.clamp(0, 1)
    return pixels


def check_pixels(pixels: Tensor, size: int) -> None:
    """Raise MismatchError for anything but (batch, 3, size, size)."""
    if pixels.shape[1:] != (3, size, size):
        raise MismatchError(
            f"pixels of shape {tuple(pixels.shape)}",
            expected=f"(batch, 3, {size}, {size})",
            remedy="images of any size as uint8 (batch, height, width, 3)",
        )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v for (batch, heads, tokens, d), the same shape out.

    `mask` (tokens, tokens) is added to the scores: −infinity hides a token.
    The one place that chooses the kernel. In bf16 on a CPU the products are written out: the
    backward pass of torch's fused kernel takes about twice as long there, from 17 to 785 tokens.
    Everywhere else the fused kernel is as fast or faster.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        return scores.softmax(dim=-1) @ v
    if mask is not None:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _check_kind(module: nn.Module, ours: type[nn.Module], timms: str, name: str) -> None:
    """A subclass may compute something else: only the very classes are known to be equal."""
    if not _is_kind(module, ours, timms):
        raise ConfigError(
            f"{name} is a {type(module).__name__}, which is not written out here",
            expected=f"timm's {timms}",
            remedy="backbone.name timm:<model name>, which takes any model",
        )


def _is_kind(module: nn.Module, ours: type[nn.Module], timms: str) -> bool:
    kind = type(module)
    known = ("timm.models.vision_transformer", "timm.layers.attention", "timm.layers.mlp")
    return kind is ours or (kind.__name__ == timms and kind.__module__ in known)
