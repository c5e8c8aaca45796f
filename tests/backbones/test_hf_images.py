"""Image models of transformers, from tiny random configurations: as transformers runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    SegformerConfig,
    SegformerModel,
    ViTConfig,
    ViTModel,
)

from memtool.adapters.layout import Layout
from memtool.adapters.recalls import chosen, every
from memtool.adapters.values import AdapterValues
from memtool.backbones import create_backbone
from memtool.backbones.interface import Backbone
from memtool.backbones.listing import described, names_of
from memtool.errors import ConfigError, NotFoundError
from memtool.settings import BackboneSettings
from tests.backbones.tiny_lm import write_tiny

VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}

MODELS = {
    "vit": lambda: ViTModel(ViTConfig(**VIT), add_pooling_layer=False),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT, layerscale_value=0.5)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
    "convnext": lambda: ConvNextModel(
        ConvNextConfig(
            hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, layer_scale_init_value=0.5
        )
    ),
}


def saved(kind: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    norms = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(norms))
    return model


def opened(folder: Path, **more: Any) -> Backbone:
    return create_backbone(BackboneSettings(name=f"hf:{folder}", **more))


def theirs(kind: str, model: nn.Module, pixels: Tensor) -> Tensor:
    found = model(pixel_values=pixels)
    return found.last_hidden_state[:, 0] if kind == "vit" else found.pooler_output.flatten(1)


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_transformers_own_and_takes_adapters(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    backbone = opened(tmp_path)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(backbone.features(pixels), theirs(kind, model, pixels))
    assert backbone.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    targets = [
        target
        for target in backbone.targets
        if all(site.groups == 1 for site in backbone.sites([target]))
    ]
    layout = Layout(backbone.sites(targets), 2)
    generator = torch.Generator().manual_seed(2)
    flat = 0.2 * torch.randn(2, layout.numel, generator=generator)
    values = AdapterValues.from_flat(flat, layout, 1.5)
    expected = []
    for number in range(2):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tensors = layout.unflatten(flat[number])
        for site in layout.sites:
            weight = model.get_submodule(site.module).weight
            assert isinstance(weight, nn.Parameter)
            added = tensors[f"{site.name}.lora_B"] @ tensors[f"{site.name}.lora_A"]
            weight.data += 1.5 * added.view_as(weight)
        expected.append(theirs(kind, model, pixels).detach())
        model.load_state_dict(state)
    one = AdapterValues.from_flat(flat[:1], layout, 1.5)
    found = backbone.features(pixels, every(one))
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)
    mixed = backbone.features(pixels, chosen(values, torch.tensor([1, 0, 1])))
    due = torch.stack([expected[1][0], expected[0][1], expected[1][2]])
    torch.testing.assert_close(mixed, due, rtol=1e-4, atol=1e-4)


def test_vits_have_the_targets_of_all_and_say_their_class_token(tmp_path: Path) -> None:
    for kind in ("vit", "dinov2", "clip"):
        saved(kind, tmp_path / kind)
        backbone = opened(tmp_path / kind)
        assert {"q", "k", "v"} <= {*backbone.targets}
        assert (backbone.depth, backbone.dim, backbone.prefix_tokens) == (2, 16, 1)
        assert opened(tmp_path / kind).sha256 == backbone.sha256


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_listed_by_its_configuration_alone(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    backbone = opened(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    name = f"hf:{tmp_path}"
    (found,) = described(names_of(name))
    assert found.problem is None
    assert (found.name, found.targets, found.dim) == (name, backbone.targets, backbone.dim)
    assert found.blocks == backbone.depth
    assert {*found.widths} == {backbone.block_dim(block) for block in range(backbone.depth)}
    assert found.parameters == sum(one.numel() for one in model.parameters())
    assert found.image_size == (224 if kind == "convnext" else 32)
    with pytest.raises(NotFoundError, match="there is no folder /nowhere"):
        list(described(["hf:/nowhere"]))


def test_random_weights_need_a_configuration_only_and_other_sizes_are_read(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    backbone = opened(tmp_path, weights="random", image_size=48)
    assert backbone.features(torch.randn(1, 3, 48, 48)).shape == (1, 16)
    with pytest.raises(NotFoundError, match=r"hf:FOLDER"):
        opened(tmp_path)


def test_models_that_say_no_size_are_read_and_a_map_without_pooler_is_its_mean(
    tmp_path: Path,
) -> None:
    sizes: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    ResNetConfig(embedding_size=8, layer_type="basic", **sizes).save_pretrained(tmp_path / "resnet")
    resnet = opened(tmp_path / "resnet", weights="random")
    assert (resnet.dim, resnet.prefix_tokens) == (8, 0)
    heads: dict[str, Any] = {"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8}
    torch.manual_seed(0)
    model = SegformerModel(SegformerConfig(**sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "map")
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixel_values=pixels).last_hidden_state.mean(dim=(2, 3))
    torch.testing.assert_close(opened(tmp_path / "map").features(pixels), expected)


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a llama, and this reads images"):
        opened(write_tiny(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"backbone.weights with hf:"):
        opened(tmp_path, weights=tmp_path / "any.safetensors")
