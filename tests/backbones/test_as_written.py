"""Models of timm, written out or as timm wrote them: every family against timm's own forward pass.

In float64: adapters of zeros are the frozen model, others the model with merged weights, and a
batch of mixtures is each sample by itself.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from memtool.adapters.layout import Layout, Site
from memtool.adapters.mixing import Mix, Mixture
from memtool.adapters.recalls import chosen, every
from memtool.adapters.side_by_side import side_by_side
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones.as_written import AsWritten
from memtool.backbones.interface import Backbone
from memtool.backbones.timm_models import reading_of
from memtool.backbones.vit import VitBackbone, is_plain
from memtool.errors import MismatchError

VIT: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 1),
    "num_heads": (2, 2),
}

FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {**VIT, "patch_size": 8}, 32),
    "siglip": ("vit_base_patch16_siglip_224", {**VIT, "patch_size": 8}, 32),
    "registers": ("vit_small_patch14_reg4_dinov2", {**VIT, "patch_size": 8}, 32),
    "clip": ("vit_base_patch16_clip_224", {**VIT, "patch_size": 8}, 32),
    "distilled deit": ("deit_tiny_distilled_patch16_224", {**VIT, "patch_size": 8}, 32),
    "beit": ("beit_base_patch16_224", {**VIT, "patch_size": 8}, 32),
    "eva-02": ("eva02_tiny_patch14_224", {**VIT, "patch_size": 8}, 32),
    "cait": ("cait_xxs24_224", {**VIT, "patch_size": 8}, 32),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 32),
    "swin v2": ("swinv2_tiny_window8_256", SWIN, 32),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16)}, 32),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 16)}, 32),
    "convnext, linear": (
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 16), "conv_mlp": False},
        32,
    ),
    "efficientnet": ("test_efficientnet", {}, 32),
    "padding as tensorflow": ("tf_mobilenetv3_small_minimal_100", {}, 33),
    "mobilevit": ("mobilevit_xxs", {}, 32),
    "mobilevit v2": ("mobilevitv2_050", {}, 32),
    "byobnet": ("test_byobnet", {}, 32),
    "maxvit": (
        "maxvit_pico_rw_256",
        {"img_size": 32, "embed_dim": (32, 32), "depths": (1, 1), "stem_width": 8},
        32,
    ),
    "resnext": (
        "resnext50_32x4d",
        {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4), "cardinality": 2, "base_width": 64},
        32,
    ),
}

WRITTEN_OUT = ("vit", "siglip", "registers", "clip")
QUICK = (
    *WRITTEN_OUT,
    "eva-02",
    "swin",
    "convnext",
    "padding as tensorflow",
    "mobilevit",
    "resnext",
)
"""Plain ViTs, and one of every way to be adapted: fused layers, windows, channels last, padding,
groups.
"""

of_families = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES],
)


@functools.cache
def built(family: str) -> nn.Module:
    """A float64 model whose norms, scales and biases are no longer at their neutral start."""
    name, changes, _ = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = timm.create_model(name, pretrained=False, num_classes=0, **changes)
        model = model.double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


@functools.cache
def wrapped(family: str) -> Backbone:
    model = copy.deepcopy(built(family))
    half, size = [0.5] * 3, FAMILIES[family][2]
    assert is_plain(model) == (family in WRITTEN_OUT)
    if family in WRITTEN_OUT:
        return VitBackbone(model, family, mean=half, std=half)
    return AsWritten(model, family, reading_of(model), image_size=size, mean=half, std=half)


def pixels(family: str, count: int = 3) -> Tensor:
    size = FAMILIES[family][2]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)


def adapters(backbone: Backbone, count: int = 1, rank: int = 2) -> AdapterValues:
    """Random adapters at all layers that a rank of 2 fits."""
    targets = [
        target
        for target in backbone.targets
        if all(rank % site.groups == 0 for site in backbone.sites([target]))
    ]
    layout = Layout(backbone.sites(targets), rank)
    generator = torch.Generator().manual_seed(2)
    flat = torch.zeros(count, layout.numel, dtype=torch.float64)
    tensors = layout.unflatten(flat)
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
        tensor.copy_(0.5 * noise / math.sqrt(tensor.shape[-1]))
    scaling = torch.full((count,), 2.0, dtype=torch.float64)
    return AdapterValues.from_flat(flat, layout, scaling, trainable=True)


def mixed(values: AdapterValues, coefficients: Tensor, mix: Mix) -> Recall:
    def recall(block: int, hidden: Tensor) -> Mixture | None:
        del hidden
        found = values.block(block)
        return None if found is None else Mixture.weighted(found, coefficients, mix)

    return recall


def ungrouped(model: nn.Module, site: Site) -> nn.Module:
    """The layer of a site; one in groups is replaced by a convolution without, of like effect."""
    layer = model.get_submodule(site.module)
    if site.groups == 1:
        return layer
    assert isinstance(layer, nn.Conv2d)
    assert site.kernel is not None
    shape = (site.out_features, site.channels, *site.kernel)
    weight = torch.zeros(shape, dtype=layer.weight.dtype)
    rows, channels = site.out_features // site.groups, site.channels // site.groups
    for g in range(site.groups):
        own = slice(g * rows, (g + 1) * rows)
        weight[own, g * channels : (g + 1) * channels] = layer.weight[own]
    layer.weight, layer.groups = nn.Parameter(weight, requires_grad=False), 1
    return layer


def merged(family: str, values: AdapterValues, number: int = 0) -> nn.Module:
    """timm's own model with s B A added to its weights."""
    model = copy.deepcopy(built(family))
    tensors = values.layout.unflatten(values.flat()[number])
    for site in values.layout.sites:
        weight = ungrouped(model, site).weight
        b = tensors[f"{site.name}.lora_B"]
        if site.groups > 1:  # a row is made of the ranks of its own group
            b = torch.block_diag(*b.chunk(site.groups))
        added = b @ tensors[f"{site.name}.lora_A"]
        rows = slice(site.first_row, site.first_row + site.out_features)
        assert isinstance(weight, nn.Parameter)
        weight.data[rows] += 2.0 * added.view_as(weight[rows])
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    return model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@of_families
def test_it_runs_as_timm_wrote_it_and_adds_what_is_recalled(family: str) -> None:
    backbone, given = wrapped(family), pixels(family)
    frozen = built(family)(given)
    close(backbone.features(given), frozen)
    values = adapters(backbone)
    with torch.no_grad():
        for b in values.b:
            kept, b.data = b.data, torch.zeros_like(b)
            b.kept = kept
        close(backbone.features(given, every(values)), frozen)
        for b in values.b:
            b.data = b.kept
        found = backbone.features(given, every(values))
    close(found, merged(family, values)(given))
    assert (found - frozen).abs().max() > 1e-4 * frozen.abs().max()
    backbone.features(given, every(values)).square().sum().backward()
    for parameter in values.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


@of_families
@torch.no_grad()
def test_every_sample_has_its_own_mixture(family: str) -> None:
    backbone, given = wrapped(family), pixels(family)
    values = adapters(backbone, count=3)
    index = torch.tensor([2, 0, 1])
    weights = torch.tensor([[0.9, -0.2, 0.3], [0.1, 0.5, 0.4], [1.0, 0.0, 0.0]]).double()
    together = {
        "chosen": backbone.features(given, chosen(values, index)),
        "delta": backbone.features(given, mixed(values, weights, "delta")),
        "params": backbone.features(given, mixed(values, weights, "params")),
        "grouped": backbone.features(given, every(values)),
    }
    for i in range(3):
        one, row = given[i : i + 1], slice(i, i + 1)
        close(together["chosen"][row], merged(family, values, int(index[i]))(one))
        close(together["grouped"][row], merged(family, values, i)(one))
        alone = backbone.features(one, mixed(values, weights[row], "delta"))
        close(together["delta"][row], alone)
        alone = backbone.features(one, mixed(values, weights[row], "params"))
        close(together["params"][row], alone)
    # Of one-hot weights both mixtures are the adapter itself.
    close(together["delta"][2:], merged(family, values, 0)(given[2:]))
    close(together["params"][2:], merged(family, values, 0)(given[2:]))
    beside = side_by_side([None, chosen(values, index[:1])], [1, 1])
    expected = [built(family)(given[:1]), merged(family, values, 2)(given[1:2])]
    close(backbone.features(given[:2], beside), torch.cat(expected))


@of_families
@torch.no_grad()
def test_a_recall_sees_the_input_of_every_block_in_order(family: str) -> None:
    backbone, given = wrapped(family), pixels(family, 2)
    seen: list[tuple[int, Tensor]] = []
    backbone.features(given, lambda block, hidden: seen.append((block, hidden)))
    assert [block for block, _ in seen] == list(range(backbone.depth))
    for block, hidden in seen:
        assert hidden.shape[::2] == (2, backbone.block_dim(block))
        close(backbone.hidden(given, block), hidden)
    with pytest.raises(MismatchError, match=f"block {backbone.depth}"):
        backbone.hidden(given, backbone.depth)
