"""Prompts in front of an image's tokens against timm's own blocks and a slow loop, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from memtool.adapters.prefix import Prefix
from memtool.backbones import create_backbone
from memtool.backbones.vit import VitBackbone
from memtool.errors import MismatchError
from memtool.settings import BackboneSettings
from tests.backbones.test_vit import VARIANTS, adapters, build, pixels, whole, wrap

VARIANT_IDS = ["plain", "layer scale", "qk norm", "scale norms", "register tokens"]


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_attention(attn: Any, x: Tensor, before: Tensor) -> Tensor:
    """timm's attention, image by image, head by head and query by query; before (2, p, dim)."""
    width = attn.head_dim
    rows = []
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        queries, own = attn.q_norm(q[:, part]), attn.k_norm(k[:, part])
        keys = [*before[0, :, part], *own]
        values = [*before[1, :, part], *v[:, part]]
        out = []
        for query in queries:
            scores = [math.exp(float(query @ key) / math.sqrt(width)) for key in keys]
            parts = [s / sum(scores) * value for s, value in zip(scores, values, strict=True)]
            out.append(torch.stack(parts).sum(dim=0))
        rows.append(torch.stack(out))
    mixed: Tensor = attn.proj(attn.norm(torch.cat(rows, dim=-1)))
    return mixed


@pytest.mark.parametrize("variant", VARIANT_IDS)
def test_keys_and_values_in_front_equal_a_slow_loop(variant: str) -> None:
    vit = build(**VARIANTS[variant])
    given = {0: drawn(2, 2, 3, 24), 2: drawn(2, 2, 1, 24, seed=4)}
    hidden = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels(2))))
    for number, block in enumerate(vit.blocks):
        before = given.get(number, torch.zeros(2, 2, 0, 24, dtype=torch.float64))
        normed = block.norm1(hidden)
        mixed = [slow_attention(block.attn, x, p) for x, p in zip(normed, before, strict=True)]
        hidden = hidden + block.ls1(torch.stack(mixed))
        hidden = hidden + block.ls2(block.mlp(block.norm2(hidden)))
    expected = vit.forward_head(vit.norm(hidden), pre_logits=True)
    backbone = wrap(vit)
    found = backbone.features(pixels(2), prefix=Prefix(attended=given))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found - backbone.features(pixels(2))).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["plain", "average pool", "map pool", "register tokens"])
def test_prompt_tokens_equal_tokens_put_among_the_others_by_hand(variant: str) -> None:
    vit = build(**VARIANTS[variant])
    tokens = drawn(3, 4, 24)
    hidden = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels())))
    count = hidden.shape[1]
    hidden = torch.cat([hidden, tokens], dim=1)  # behind: attention knows no order
    for block in vit.blocks:
        hidden = block(hidden)
    hidden = vit.norm(hidden)
    expected = vit.forward_head(hidden[:, :count], pre_logits=True)
    backbone = wrap(vit)
    found = backbone.features(pixels(), prefix=Prefix(tokens))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found - backbone.features(pixels())).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANT_IDS)
def test_a_prefix_of_no_length_is_the_frozen_model(variant: str) -> None:
    backbone = wrap(build(**VARIANTS[variant]))
    frozen = backbone.features(pixels())
    empty = Prefix(drawn(3, 0, 24), {1: drawn(3, 2, 0, 24)})
    for prefix in (None, Prefix(), empty):
        found = backbone.features(pixels(), prefix=prefix)
        torch.testing.assert_close(found, frozen, rtol=1e-12, atol=1e-12)


def test_every_image_has_its_own_prefix_and_adapters_see_their_own_tokens() -> None:
    backbone = wrap(build())
    values = adapters(backbone, ("q", "v"))
    recall = whole(values)
    widths = []

    def seen(block: int, hidden: Tensor) -> Any:
        widths.append(hidden.shape[1])
        return recall(block, hidden)

    prefix = Prefix(drawn(3, 2, 24), {1: drawn(3, 2, 5, 24)})
    together = backbone.features(pixels(), seen, prefix)
    assert widths == [17] * 3
    for i in range(3):
        one = Prefix(prefix.tokens[i : i + 1], {1: prefix.attended[1][i : i + 1]})
        alone = backbone.features(pixels()[i : i + 1], recall, one)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    assert (together - backbone.features(pixels(), prefix=prefix)).abs().max() > 1e-3


def test_gradients_reach_the_prefix_only() -> None:
    backbone = wrap(build())
    tokens, given = drawn(3, 2, 24).requires_grad_(), drawn(3, 2, 1, 24).requires_grad_()
    backbone.features(pixels(), prefix=Prefix(tokens, {2: given})).square().sum().backward()
    for learned in (tokens, given):
        assert learned.grad is not None
        assert learned.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_the_embedded_model_takes_one_in_bf16_too() -> None:
    backbone = create_backbone(BackboneSettings())
    assert isinstance(backbone, VitBackbone)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    given = backbone.preprocess(images)
    prefix = Prefix(drawn(2, 3, 160).float(), {3: drawn(2, 2, 4, 160).float()})
    exact = backbone.features(given, prefix=prefix)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = backbone.features(given, prefix=prefix)
    assert torch.nn.functional.cosine_similarity(coarse.float(), exact).min() > 0.99


@pytest.mark.parametrize(
    ("prefix", "named"),
    [
        (Prefix(drawn(2, 4, 24)), r"prompt tokens of shape \(2, 4, 24\).*\n.*\(3, p, 24\)"),
        (Prefix(drawn(3, 4, 12)), r"\(3, p, 24\)"),
        (Prefix(drawn(4, 24)), r"\(3, p, 24\)"),
        (Prefix(attended={3: drawn(3, 2, 4, 24)}), "block 3.*\n.*0 to 2"),
        (Prefix(attended={1: drawn(3, 4, 24)}), r"block 1.*\n.*\(3, 2, p, 24\)"),
        (Prefix(attended={1: drawn(1, 2, 4, 24)}), r"block 1.*\n.*\(3, 2, p, 24\)"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(prefix: Prefix, named: str) -> None:
    with pytest.raises(MismatchError, match=named):
        wrap(build()).features(pixels(), prefix=prefix)


def test_timm_attention_without_a_prefix_is_timms() -> None:
    """The oracle of these tests is timm's where there is nothing in front."""
    vit: VisionTransformer = build()
    x = drawn(5, 24)
    found = slow_attention(vit.blocks[0].attn, x, torch.zeros(2, 0, 24, dtype=torch.float64))
    torch.testing.assert_close(found, vit.blocks[0].attn(x[None])[0], rtol=1e-12, atol=1e-12)
