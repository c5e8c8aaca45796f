"""The forward pass of MIRA's authors, rebuilt slowly from its description, against ours.

One sample at a time, one block after another, nothing shared with the library but the parameters:

    q  = g(LN1(h))[class token] / |.|       K (d, N): every row divided by its norm over the
    s  = q · K's columns                    memories, then every column by its own
    a  = s / Σ s, or s where N = 1          y = W x + b + (Σ a_i B_i)(Σ a_i A_i) x   on q and v
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memtool.adapters.layout import Layout
from memtool.adapters.values import AdapterValues
from memtool.backbones import create_backbone
from memtool.backbones.clip_image import ClipImageBackbone
from memtool.config import resolve
from memtool.memories.keyed import KeyedMemory
from memtool.memories.similarity import over_memories
from memtool.methods.mira.recall import MemoryModel, first_norms, memory_blocks
from memtool.settings import BackboneSettings
from tests.backbones.test_open_clip import model as tiny_clip
from tests.backbones.test_open_clip import wrapped

RANK = 2


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """(tokens, d), token by token."""
    rows = []
    for token in x:
        centred = token - token.sum() / len(token)
        rows.append(centred / (centred.square().sum() / len(token) + norm.eps).sqrt())
    return torch.stack(rows) * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def coefficients(keys: Tensor, query: Tensor) -> Tensor:
    """(N,) of keys (N, d) and a query (d,), entry by entry."""
    matrix = keys.T
    rows = [row / row.square().sum().sqrt() for row in matrix]
    columns = [column / column.square().sum().sqrt() for column in torch.stack(rows).T]
    unit = query / query.square().sum().sqrt()
    scores = [(unit * column).sum() for column in columns]
    if len(scores) == 1:
        return torch.stack(scores)
    whole = sum(scores[1:], scores[0])
    return torch.stack([score / whole for score in scores])


def query_of(h: Tensor, norm: torch.nn.LayerNorm, g: torch.nn.Module) -> Tensor:
    q = layer_norm(h, norm)[0]
    if isinstance(g, torch.nn.Identity):
        return q
    first, _, second = g
    return second.weight @ gelu(first.weight @ q + first.bias) + second.bias


def parts(block):
    """Norms and projections of a block of timm's or open_clip's build, by one set of words."""
    if hasattr(block, "ln_1"):
        return block.ln_1, block.in_proj, block.out_proj, block.ln_2, block.c_fc, block.c_proj
    attention, mlp = block.attn, block.mlp
    return block.norm1, attention.qkv, attention.proj, block.norm2, mlp.fc1, mlp.fc2


def heads_of(block) -> int:
    return block.heads if hasattr(block, "ln_1") else block.attn.heads


def pooled(model: MemoryModel, h: Tensor) -> Tensor:
    backbone = model.backbone
    if isinstance(backbone, ClipImageBackbone):
        visual = backbone.whole.clip.visual
        return layer_norm(h[:1], visual.ln_post)[0] @ visual.proj
    return layer_norm(h, backbone.vit.norm)[0]


def slow(model: MemoryModel, tensors: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (b, f) and coefficients (b, blocks, N)."""
    features, found = [], []
    for picture in pixels:
        whole = model.backbone
        embed = whole.whole._embed if isinstance(whole, ClipImageBackbone) else whole._embed
        h = embed(picture[None])[0]
        each = []
        for number, block in enumerate(whole.blocks):
            norm1, qkv, proj, norm2, fc1, fc2 = parts(block)
            memory = model.memory[number]
            a = coefficients(memory.keys, query_of(h, norm1, memory.query.g))
            each.append(a)
            x = layer_norm(h, norm1)
            y = x @ qkv.weight.T + qkv.bias
            width = h.shape[1]
            added = []
            for site in model.values.layout.sites:
                if site.block != number:
                    continue
                down = sum(a[i] * tensors[f"{site.name}.lora_A"][i] for i in range(len(a)))
                up = sum(a[i] * tensors[f"{site.name}.lora_B"][i] for i in range(len(a)))
                added.append((site.first_row, x @ down.T @ up.T))
            q, k, v = y.split(width, dim=1)
            assert [row for row, _ in added] == [0, 2 * width]  # q and v
            q, v = q + added[0][1], v + added[1][1]
            size, mixed = width // heads_of(block), []
            for head in range(heads_of(block)):
                part = slice(head * size, (head + 1) * size)
                scores = q[:, part] @ k[:, part].T / math.sqrt(size)
                weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
                mixed.append(weights @ v[:, part])
            h = h + torch.cat(mixed, dim=1) @ proj.weight.T + proj.bias
            inner = gelu(layer_norm(h, norm2) @ fc1.weight.T + fc1.bias)
            h = h + inner @ fc2.weight.T + fc2.bias
        features.append(pooled(model, h))
        found.append(torch.stack(each))
    return torch.stack(features), torch.stack(found)


def memory_of(preset: str, backbone, adapters: int) -> tuple[MemoryModel, dict[str, Tensor]]:
    """A memory as a preset has it, with drawn values and keys, in float64."""
    config = resolve(preset=preset, environ={}).config
    settings = config.memory
    generator = torch.Generator().manual_seed(7)
    layout = Layout(backbone.sites(config.backbone.targets), RANK)
    flat = 0.3 * torch.randn(adapters, layout.numel, generator=generator, dtype=torch.float64)
    scaling = config.adapter.alpha / config.adapter.rank
    values = AdapterValues.from_flat(flat, layout, scaling, trainable=True)
    blocks = memory_blocks(settings, backbone, layout.blocks)
    width = backbone.block_dim(0)
    keys = 2 * torch.rand(len(blocks), adapters, width, generator=generator) - 1
    memory = KeyedMemory.from_settings(
        settings, blocks, width, keys, norms=first_norms(settings, backbone, blocks),
        generator=generator,
    )  # fmt: skip
    model = MemoryModel(backbone, values, memory, settings).double()
    return model, layout.unflatten(flat)


@pytest.fixture(scope="module")
def backbones():
    nano = create_backbone(BackboneSettings())
    return {"nano": nano.double(), "clip": ClipImageBackbone(wrapped(tiny_clip())).double()}


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("preset", ["mira-dil-authors", "mira-dg-authors"])
@pytest.mark.parametrize("family", ["nano", "clip"])
def test_the_forward_pass_of_the_authors_is_ours(backbones, family, preset, adapters):
    backbone = backbones[family]
    model, tensors = memory_of(preset, backbone, adapters)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    leaves = {name: one.clone().requires_grad_() for name, one in tensors.items()}
    features, found = slow(model, leaves, pixels)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).double()
    learned = list(model.memory.parameters())
    expected = torch.autograd.grad(
        (weight * features).sum(), [*learned, *leaves.values()], retain_graph=False
    )
    recall = model.recall(pixels)
    ours = backbone.features(pixels, recall)
    assert torch.allclose(ours, features, atol=1e-6, rtol=1e-6)
    mine = torch.stack([recall.coefficients[block] for block in model.memory.blocks], dim=1)
    assert mine.dtype == torch.float64
    assert torch.allclose(mine, found, atol=1e-6, rtol=1e-6)
    given = torch.autograd.grad((weight * ours).sum(), [*learned, *model.values.parameters()])
    for found_here, slowly in zip(given, expected[: len(learned)], strict=False):
        assert slowly.abs().max() > 1e-6 or adapters == 1
        assert torch.allclose(found_here, slowly, atol=1e-6, rtol=1e-6)
    of_values = AdapterValues(
        model.values.layout,
        [*given[len(learned) : len(learned) + len(model.values.a)]],
        [*given[len(learned) + len(model.values.a) :]],
        model.values.scaling,
    )
    by_name = model.values.layout.unflatten(of_values.flat())
    for name, slowly in zip(leaves, expected[len(learned) :], strict=True):
        assert torch.allclose(by_name[name], slowly, atol=1e-6, rtol=1e-6), name


def test_block_zero_is_asked_the_same_by_every_image(backbones):
    model, _ = memory_of("mira-cil-authors", backbones["nano"], 3)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        _, found = slow(model, memory_of("mira-cil-authors", backbones["nano"], 3)[1], pixels)
    assert torch.equal(found[:, 0], found[:1, 0].expand(4, -1))
    assert not torch.equal(found[0, 1], found[1, 1])


def test_a_new_memory_moves_the_scores_of_the_old_ones(backbones):
    model, _ = memory_of("mira-cil-authors", backbones["nano"], 3)
    memory = model.memory[1]
    hidden = torch.randn(5, 17, 160, generator=torch.Generator().manual_seed(4)).double()
    before = memory.scores(hidden).detach()
    grown = torch.cat([memory.keys.detach(), torch.rand(1, 160, dtype=torch.float64) - 0.5])
    memory.keys = torch.nn.Parameter(grown)
    after = memory.scores(hidden)[:, :3]
    assert not torch.allclose(after, before, atol=1e-3)
    memory.normed = False
    alone = memory.scores(hidden)[:, :3]
    memory.keys = torch.nn.Parameter(grown[:3])
    assert torch.allclose(memory.scores(hidden), alone, atol=1e-12)
    columns = over_memories(grown).square().sum(dim=0)
    assert torch.allclose(columns, torch.ones_like(columns), atol=1e-12)
