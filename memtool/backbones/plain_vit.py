"""The plain Vision Transformer of Dosovitskiy et al. (arXiv:2010.11929), in torch alone.

Tensors have the names that timm gives them, and a test holds the features equal to timm's. The
embedded model is one of these: it starts without timm, which takes longer to import than to use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-6


class PlainAttention(nn.Module):
    """Multi-head self-attention with one fused projection for q, k and v."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = dim // heads
        self.fused = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        found: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return found


class PlainMlp(nn.Module):
    """fc1, GELU, fc2."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.act, self.norm = nn.GELU(), nn.Identity()
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        found: Tensor = self.fc2(self.act(self.fc1(x)))
        return found


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attn = PlainAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = PlainMlp(dim, width)
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches of an image (batch, 3, size, size) as tokens (batch, patches, dim)."""

    def __init__(self, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.img_size = (image_size, image_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (image_size // patch_size, image_size // patch_size)
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Row by row."""
        found: Tensor = self.proj(pixels).flatten(2).transpose(1, 2)
        return found


class PlainViT(nn.Module):
    """Class token, learned positions, pre-norm blocks; the normalised class token is the feature.

    `forward(pixels)` maps (batch, 3, size, size) to (batch, dim). Weights are drawn from torch's
    global generator, as timm draws them.
    """

    global_pool = "token"
    num_prefix_tokens = 1
    no_embed_class = False

    def __init__(
        self, *, image_size: int, patch_size: int, dim: int, depth: int, heads: int, mlp_ratio: int
    ) -> None:
        super().__init__()
        self.embed_dim = dim
        self.patch_embed = PatchEmbed(image_size, patch_size, dim)
        patches = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=1e-6))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.norm_pre = nn.Identity()
        self.blocks: nn.ModuleList = nn.ModuleList(
            PlainBlock(dim, heads, mlp_ratio * dim) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _pos_embed(self, tokens: Tensor) -> Tensor:
        """Class token and positions: (batch, patches, dim) to (batch, 1 + patches, dim)."""
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1) + (
            self.pos_embed
        )

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token (batch, dim) of normalised tokens."""
        del pre_logits
        return tokens[:, 0]

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (batch, dim)."""
        hidden = self.norm_pre(self._pos_embed(self.patch_embed(pixels)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.forward_head(self.norm(hidden))
