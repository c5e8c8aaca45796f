"""What all frozen models promise, whatever they read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memtool.adapters.layout import Layout, sites_of
from memtool.adapters.lora import init_lora
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues, Recall
from memtool.backbones import create_backbone
from memtool.backbones.causal_lm import create_causal_lm
from memtool.backbones.interface import Backbone, FrozenModel
from memtool.settings import BackboneSettings, TextSettings
from tests.backbones.tiny_lm import write_tiny

Asked = Callable[[Recall | None], Tensor]


def _images(backbone: Backbone) -> tuple[FrozenModel, Asked]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=generator)
    pixels = backbone.preprocess(images)
    return backbone, lambda recall: backbone.features(pixels, recall)


def _nano(_: Path) -> tuple[FrozenModel, Asked]:
    return _images(create_backbone(BackboneSettings()))


def _timm(_: Path) -> tuple[FrozenModel, Asked]:
    from timm.models.vision_transformer import VisionTransformer

    from memtool.backbones.vit import VitBackbone

    torch.manual_seed(0)
    vit = VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    return _images(VitBackbone(vit, "timm:small", mean=[0.5] * 3, std=[0.5] * 3))


def _causal_lm(folder: Path, family: str = "llama") -> tuple[FrozenModel, Asked]:
    limits = TextSettings(prompt_tokens=20, answer_tokens=6)
    settings = BackboneSettings(name=f"hf:{write_tiny(folder / 'model', family=family)}")
    lm = create_causal_lm(settings, limits, dtype=torch.float32)
    tokens = torch.arange(5, 17).reshape(2, 6)
    return lm, lambda recall: lm.logits(tokens, recall)


BACKBONES = {
    "nano": _nano,
    "timm": _timm,
    "causal lm": _causal_lm,
    "gpt2": partial(_causal_lm, family="gpt2"),
}


@pytest.fixture(scope="module", params=BACKBONES)
def asked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FrozenModel, Asked]:
    return BACKBONES[request.param](tmp_path_factory.mktemp("backbone"))


def test_it_is_frozen_hashed_and_in_eval_mode(asked: tuple[FrozenModel, Asked]) -> None:
    model, _ = asked
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.train().training
    assert len(model.sha256) == 64
    assert model.device == torch.device("cpu")


def test_sites_are_in_the_order_of_blocks_and_fit_the_layers(
    asked: tuple[FrozenModel, Asked],
) -> None:
    model, _ = asked
    sites = model.sites(model.targets)
    assert [site.block for site in sites] == sorted(site.block for site in sites)
    assert {site.block for site in sites} == set(range(model.depth))
    assert len({site.name for site in sites}) == len(sites)
    assert model.sites(tuple(reversed(model.targets))) == sites


def test_its_sites_are_told_by_the_segments_that_a_store_keeps(
    asked: tuple[FrozenModel, Asked],
) -> None:
    model, _ = asked
    for targets in (model.targets, model.targets[1:2], (model.targets[0], model.targets[2])):
        layout = Layout(model.sites(targets), 2)
        assert sites_of((one.name, one.shape) for one in layout.segments) == layout.sites


def test_every_block_asks_once_and_before_it_runs(asked: tuple[FrozenModel, Asked]) -> None:
    model, run = asked
    seen: list[tuple[int, int, int]] = []

    def recall(block: int, hidden: Tensor) -> None:
        seen.append((block, hidden.shape[0], hidden.shape[-1]))

    assert torch.equal(run(recall), run(None))
    assert seen == [(block, 2, model.dim) for block in range(model.depth)]


def test_an_adapter_of_zeros_changes_nothing_and_another_does(
    asked: tuple[FrozenModel, Asked],
) -> None:
    model, run = asked
    layout = Layout(model.sites(model.targets), 2)
    flat = init_lora(layout, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(every(AdapterValues.from_flat(flat, layout, 1.0))), run(None))
    other = torch.randn(flat.shape, generator=torch.Generator().manual_seed(1))
    changed = run(every(AdapterValues.from_flat(other, layout, 1.0)))
    assert not torch.allclose(changed, run(None), atol=1e-3)
