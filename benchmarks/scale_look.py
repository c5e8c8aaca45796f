"""What a look costs: a memory over the same model with one fixed LoRA of equal total rank.

ViT-Tiny and ViT-B at 96 pixels with random weights, batches of 1 and 32, four adapters of rank 4 on
q and v made at random, and a head. The fixed LoRA has their 16 ranks side by side, in the same
blocks, and a head of the same classes.

    from-look       adapters begin at the block that is looked at: one pass
    all             in every block: the blocks before the look run twice
    final features  in every block, which all run twice
    scope block     a memory in every block, asked by its own input
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks.timing import case, interleaved, progress
from memtool.adapters.layout import Layout
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.backbones.vit import VitBackbone
from memtool.heads import LinearClassifier, RecalledHead
from memtool.memories.keyed import KeyedMemory
from memtool.methods.mira.look import width_of
from memtool.methods.mira.recall import MemoryModel, memory_blocks
from memtool.sections import MemorySettings

ADAPTERS, RANK, CLASSES, PIXELS, LOOK = 4, 4, 7, 96, 4
MODELS = {"ViT-Tiny": "vit_tiny_patch16_224", "ViT-B": "vit_base_patch16_224"}
FEW = 3
"""Repeats of a batch of ViT-B, at most."""

BATCHES = {1: 8, 32: 1}
"""Calls that make one time, by images of a batch: of ViT-B one."""

WAYS: dict[str, tuple[MemorySettings, int]] = {
    "from-look": (MemorySettings(look_at=LOOK), LOOK),
    "all": (MemorySettings(look_at=LOOK), 0),
    "final features": (MemorySettings(look_at=("final",)), 0),
    "scope block": (MemorySettings(scope="block"), 0),
}
"""How the memory is read, and the first block that has adapters."""


def look_cases(repeats: int) -> list[dict[str, Any]]:
    """Every way over the fixed LoRA in the same blocks, of both models and batches."""
    cases: list[dict[str, Any]] = []
    for name, model in MODELS.items():
        backbone = backbone_of(model)
        calls = calls_of(backbone)
        limits = {
            "from-look": 1.05,
            "all": 1 + LOOK / backbone.depth,
            "final features": 2.1,
            "scope block": 1.12,
        }
        large = backbone.dim > 192
        for batch, inner in BATCHES.items():
            progress(f"{name}, {PIXELS} px, batch {batch}: a look at block {LOOK}")
            images = torch.randint(
                256, (batch, PIXELS, PIXELS, 3), generator=torch.Generator().manual_seed(1)
            ).to(torch.uint8)
            ways = {way: partial(call, images) for way, call in calls.items()}
            times = min(repeats, FEW) if large and batch > 1 else repeats
            seconds = interleaved(ways, times, inner=1 if large else inner)
            cases += [
                case(
                    f"{name}, batch {batch}, {way} / one LoRA",
                    seconds,
                    way,
                    f"LoRA from block {begin}",
                    at_most=round(limits[way], 3),
                )
                for way, (_, begin) in WAYS.items()
            ]
    return cases


def backbone_of(model: str) -> VitBackbone:
    """A Vision Transformer with random weights."""
    torch.manual_seed(0)
    vit = timm.create_model(model, pretrained=False, num_classes=0, img_size=PIXELS)
    return VitBackbone(vit, f"timm:{model}", mean=(0.5,) * 3, std=(0.5,) * 3)


def calls_of(backbone: VitBackbone) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is timed, by name: uint8 images (b, h, w, 3) to scores (b, classes)."""
    generator = torch.Generator().manual_seed(2)
    heads = [
        LinearClassifier(
            torch.randn(CLASSES, backbone.dim, generator=generator), torch.zeros(CLASSES)
        )
        for _ in range(ADAPTERS)
    ]
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for begin in (0, LOOK):
        values = drawn(backbone, begin, 1, ADAPTERS * RANK)
        calls[f"LoRA from block {begin}"] = partial(fixed, backbone, values, heads[0])
    shared = RecalledHead.shared(heads[0])
    for way, (settings, begin) in WAYS.items():
        values = drawn(backbone, begin, ADAPTERS, RANK)
        blocks = memory_blocks(settings, backbone, values.layout.blocks)
        width = width_of(settings, backbone, blocks)
        keys = torch.randn(len(blocks), ADAPTERS, width + 1, generator=generator)
        memory = KeyedMemory.from_settings(settings, blocks, width, keys)
        model = MemoryModel(backbone, values, memory, settings).requires_grad_(False)
        calls[way] = partial(recalled, model, shared)
    return calls


def drawn(backbone: VitBackbone, begin: int, count: int, rank: int) -> AdapterValues:
    """Adapters at q and v of the blocks from `begin` on."""
    sites = tuple(site for site in backbone.sites(("q", "v")) if site.block >= begin)
    layout = Layout(sites, rank)
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(count, layout.numel, generator=generator) * 0.02
    return AdapterValues.from_flat(flat, layout, 1.0)


def fixed(
    backbone: VitBackbone, values: AdapterValues, head: LinearClassifier, images: Tensor
) -> Tensor:
    """The scores of the model with one adapter."""
    features = backbone.features(backbone.preprocess(images), every(values))
    return torch.nn.functional.linear(features, head.weight, head.bias)


def recalled(model: MemoryModel, head: RecalledHead, images: Tensor) -> Tensor:
    """The scores of a memory."""
    features, coefficients = model.with_coefficients(images)
    return head(features, coefficients.mean(dim=1))
