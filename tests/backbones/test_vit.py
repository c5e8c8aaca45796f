"""The written-out Vision Transformer against timm's own forward pass, in float64."""

from typing import Any

import pytest
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import DiffParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor

from memtool.adapters.layout import Layout
from memtool.adapters.mixing import Mixture
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.interface import Backbone
from memtool.backbones.tensor_hash import tensor_sha256
from memtool.backbones.vit import VIT_TARGETS, VitBackbone, attend
from memtool.errors import ConfigError, DataError, MismatchError

SHAPE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 0,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "qk norm": {"qk_norm": True},
    "scale norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "average pool": {"class_token": False, "global_pool": "avg"},
    "average pool, norm before": {"global_pool": "avg", "fc_norm": False},
    "max pool with prefix": {"global_pool": "max", "pool_include_prefix": True},
    "map pool": {"class_token": False, "global_pool": "map"},
    "register tokens": {"reg_tokens": 4, "no_embed_class": True},
    "pre norm, no biases": {"pre_norm": True, "qkv_bias": False, "proj_bias": False},
    "no positions, no final norm": {"pos_embed": "none", "final_norm": False},
    "quick gelu": {"act_layer": "quick_gelu"},
    "dropout": {"drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5},
    "stochastic depth": {"drop_path_rate": 0.5, "patch_drop_rate": 0.5, "pos_drop_rate": 0.5},
}


def build(**variant: Any) -> VisionTransformer:
    """A float64 model whose norms, scales and biases are no longer at their neutral start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vit = VisionTransformer(**{**SHAPE, **variant}).double().eval()
        for parameter in vit.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return vit.requires_grad_(False)


def wrap(vit: VisionTransformer) -> VitBackbone:
    return VitBackbone(vit, "test", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def pixels(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=generator)


def adapters(backbone: Backbone, targets: tuple[str, ...], count: int = 1) -> AdapterValues:
    layout = Layout(backbone.sites(targets), rank=2)
    generator = torch.Generator().manual_seed(2)
    flat = 0.3 * torch.randn(count, layout.numel, dtype=torch.float64, generator=generator)
    scaling = torch.full((count,), 2.0, dtype=torch.float64)
    return AdapterValues.from_flat(flat, layout, scaling, trainable=True)


def whole(values: AdapterValues) -> Recall:
    def recall(block: int, hidden: Tensor) -> Mixture | None:
        found = values.block(block)
        return None if found is None else Mixture.whole(found)

    return recall


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_timm(variant: dict[str, Any]) -> None:
    vit = build(**variant)
    expected = vit(pixels())
    features = wrap(vit).features(pixels())
    assert features.shape == (3, 24)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["plain", "layer scale", "qk norm", "register tokens"])
@pytest.mark.parametrize("targets", [VIT_TARGETS, ("q", "v"), ("k",), ("proj",), ("fc1", "fc2")])
def test_adapters_equal_the_merged_weights(variant: str, targets: tuple[str, ...]) -> None:
    backbone = wrap(build(**VARIANTS[variant]))
    values = adapters(backbone, targets)
    # The oracle: timm's own model with s B A added to the rows of every site.
    merged = build(**VARIANTS[variant])
    flat = 0.3 * torch.randn(
        1, values.layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    tensors = values.layout.unflatten(flat[0])
    for site in values.layout.sites:
        weight = merged.get_submodule(site.module).weight
        assert weight.shape == (site.module_rows, site.in_features)
        rows = slice(site.first_row, site.first_row + site.out_features)
        weight[rows] += 2.0 * tensors[f"{site.name}.lora_B"] @ tensors[f"{site.name}.lora_A"]
    expected = merged(pixels())
    features = backbone.features(pixels(), whole(values))
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    assert (features - backbone.features(pixels())).abs().max() > 1e-3


def test_every_sample_takes_its_own_adapter() -> None:
    backbone = wrap(build())
    values = adapters(backbone, ("q", "v", "fc2"), count=3)
    index = torch.tensor([2, 0, 1])

    def choose(chosen: Tensor) -> Recall:
        def recall(block: int, hidden: Tensor) -> Mixture | None:
            found = values.block(block)
            return None if found is None else Mixture.chosen(found, chosen)

        return recall

    together = backbone.features(pixels(), choose(index))
    for i in range(3):
        alone = backbone.features(pixels()[i : i + 1], choose(index[i : i + 1]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


def test_recall_sees_the_input_of_every_block_in_order() -> None:
    vit = build(reg_tokens=2)
    inputs: list[Tensor] = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    vit(pixels())
    seen: list[tuple[int, Tensor]] = []

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        seen.append((block, hidden))
        return None

    backbone = wrap(build(reg_tokens=2))
    features = backbone.features(pixels(), recall)
    assert [block for block, _ in seen] == list(range(backbone.depth))
    for (_, hidden), expected in zip(seen, inputs, strict=True):
        torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)
    for block, hidden in tuple(seen):
        assert torch.equal(backbone.hidden(pixels(), block), hidden)
        assert torch.equal(backbone.features_from(block, hidden, recall), features)
    assert torch.equal(features, backbone.features(pixels()))
    assert [block for block, _ in seen] == [0, 1, 2, 0, 1, 2, 1, 2, 2]
    for absent in (-1, 3):
        with pytest.raises(MismatchError, match=f"block {absent}"):
            backbone.hidden(pixels(), absent)


def test_gradients_reach_the_adapters_only() -> None:
    backbone = wrap(build())
    values = adapters(backbone, VIT_TARGETS)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone.features(pixels(), whole(values)).square().sum().backward()
    for parameter in values.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_pixels_can_have_gradients() -> None:
    backbone = wrap(build())
    given = pixels().requires_grad_()
    backbone.features(given).sum().backward()
    assert given.grad is not None


@pytest.mark.parametrize(
    ("variant", "count"),
    [({}, 1), ({"reg_tokens": 4}, 5), ({"class_token": False, "global_pool": "avg"}, 0)],
)
def test_prefix_tokens_come_before_the_patches(variant: dict[str, Any], count: int) -> None:
    backbone = wrap(build(**variant))
    tokens: list[int] = []

    def recall(block: int, hidden: Tensor) -> Mixture | None:
        tokens.append(hidden.shape[1])
        return None

    backbone.features(pixels(), recall)
    assert backbone.prefix_tokens == count
    assert tokens == [count + 16] * 3


def test_stays_in_eval_mode() -> None:
    backbone = wrap(build(proj_drop_rate=0.5, attn_drop_rate=0.5, patch_drop_rate=0.5))
    before = backbone.features(pixels())
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert torch.equal(backbone.features(pixels()), before)


def test_sites_are_slices_of_the_fused_projection() -> None:
    backbone = wrap(build())
    sites = backbone.sites(VIT_TARGETS)
    assert [site.name for site in sites[:6]] == [
        "blocks.0.attn.qkv[q]",
        "blocks.0.attn.qkv[k]",
        "blocks.0.attn.qkv[v]",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
    ]
    shapes = [(s.in_features, s.out_features, s.first_row, s.module_rows) for s in sites[:6]]
    assert shapes == [
        (24, 24, 0, 72),
        (24, 24, 24, 72),
        (24, 24, 48, 72),
        (24, 24, 0, 24),
        (24, 96, 0, 96),
        (96, 24, 0, 24),
    ]
    assert [site.block for site in sites] == [0] * 6 + [1] * 6 + [2] * 6
    assert backbone.sites(("v", "q")) == backbone.sites(("q", "v", "v"))


def test_unknown_targets_are_named() -> None:
    backbone = wrap(build())
    with pytest.raises(ConfigError, match=r"fc3.*\n.*did you mean 'fc"):
        backbone.sites(("q", "fc3"))
    with pytest.raises(ConfigError, match="no targets"):
        backbone.sites(())


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ({"block_fn": ResPostBlock}, "blocks.0 is a ResPostBlock"),
        ({"block_fn": DiffParallelScalingBlock}, "blocks.0 is a DiffParallelScalingBlock"),
        ({"attn_layer": "diff"}, "blocks.0.attn is a DiffAttention"),
        ({"mlp_layer": SwiGLU}, "blocks.0.mlp is a SwiGLU"),
        ({"global_pool": ""}, "does not pool"),
    ],
)
def test_what_is_not_expressed_is_refused_by_name(variant: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        wrap(VisionTransformer(**{**SHAPE, **variant}))


def test_the_hash_is_that_of_the_tensors_before_they_are_wrapped() -> None:
    vit = build()
    expected = tensor_sha256(vit.state_dict())
    assert wrap(vit).sha256 == expected
    changed = build()
    changed.blocks[2].mlp.fc2.bias[3] += 1e-9
    assert wrap(changed).sha256 != expected


def test_preprocess_normalises_and_keeps_pixels_of_the_right_size() -> None:
    backbone = wrap(build())
    images = torch.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).to(torch.uint8)
    expected = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    prepared = backbone.preprocess(images)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, expected)


def test_preprocess_resizes_antialiased_and_within_range() -> None:
    backbone = wrap(build())
    # Stripes finer than the target grid average out; without antialiasing they would alias.
    stripes = torch.zeros(1, 128, 96, 3, dtype=torch.uint8)
    stripes[:, ::2] = 255
    prepared = backbone.preprocess(stripes)
    assert prepared.shape == (1, 3, 32, 32)
    assert prepared[..., 2:-2, :].abs().max() < 0.05
    edge = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    edge[:, :, 4:] = 255
    assert backbone.preprocess(edge).min() == -1.0
    assert backbone.preprocess(edge).max() == 1.0


def test_wrong_images_and_pixels_are_refused() -> None:
    backbone = wrap(build())
    with pytest.raises(DataError, match="float32"):
        backbone.preprocess(torch.zeros(1, 32, 32, 3))
    with pytest.raises(DataError, match="uint8"):
        backbone.preprocess(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(MismatchError, match="uint8"):
        backbone.features(torch.zeros(1, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [1, 17, 60])
def test_both_attention_kernels_are_softmax_attention(tokens: int) -> None:
    q, k, v = torch.randn(3, 2, 4, tokens, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = (q @ k.transpose(-2, -1) / 8**0.5).softmax(dim=-1) @ v
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-12, atol=1e-12)
    coarse = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.double(), expected, rtol=0.05, atol=0.05)


def test_runs_under_bf16_autocast() -> None:
    backbone = wrap(build()).float()
    values = adapters(backbone, VIT_TARGETS).float()
    given = pixels().float()
    expected = backbone.features(given, whole(values))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = backbone.features(given, whole(values))
    coarse.float().square().sum().backward()
    similarity = torch.nn.functional.cosine_similarity(coarse.float(), expected)
    assert similarity.min() > 0.99
