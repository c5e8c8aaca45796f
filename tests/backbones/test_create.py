"""`create_backbone`: names and what is said about wrong ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memtool.backbones import create_backbone
from memtool.backbones.nano import build_nano
from memtool.errors import ConfigError, NotFoundError
from memtool.settings import BackboneSettings


@pytest.mark.parametrize("name", ["nono", "nano:big", "timm", "timm:", "open_clip:", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="nano, timm:<model name>"):
        create_backbone(BackboneSettings(name=name))


def test_a_close_name_is_offered() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nano'"):
        create_backbone(BackboneSettings(name="nanno"))
    with pytest.raises(ConfigError, match="did you mean 'vit_tiny_patch16_224'"):
        create_backbone(BackboneSettings(name="timm:vit_tiny_patch_224"))


def test_timm_models_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    weights = tmp_path / "any.safetensors"
    with pytest.raises(ConfigError, match="resnet18"):
        create_backbone(BackboneSettings(name="timm:resnet18", weights=weights))
    with pytest.raises(ConfigError, match="VisionTransformerDistilled"):
        create_backbone(
            BackboneSettings(name="timm:deit_tiny_distilled_patch16_224", weights=weights)
        )


@pytest.mark.parametrize(("name", "size"), [("nano", 36), ("timm:vit_tiny_patch16_224", 40)])
def test_the_image_has_to_be_whole_patches(name: str, size: int, tmp_path: Path) -> None:
    settings = BackboneSettings(name=name, image_size=size, weights=tmp_path / "any.safetensors")
    with pytest.raises(ConfigError, match=f"image_size {size}"):
        create_backbone(settings)


def test_absent_weights_are_named(tmp_path: Path) -> None:
    for name in ("nano", "timm:vit_tiny_patch16_224"):
        with pytest.raises(NotFoundError, match=r"absent\.safetensors"):
            create_backbone(BackboneSettings(name=name, weights=tmp_path / "absent.safetensors"))


def test_weights_that_timm_has_to_fetch_and_cannot() -> None:
    # A tag that is not there: timm says so without a network.
    with pytest.raises(NotFoundError, match=r"backbone\.weights"):
        create_backbone(BackboneSettings(name="timm:vit_small_patch8_224.no_such_tag"))


def test_nano_takes_weights_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    mine = build_nano().state_dict()
    save_file({name: tensor.half() for name, tensor in mine.items()}, path)
    backbone = create_backbone(BackboneSettings(name="nano", weights=path))
    assert backbone.name == "nano"
    assert backbone.sha256 != create_backbone(BackboneSettings()).sha256
    assert torch.equal(
        dict(backbone.named_parameters())["vit.norm.weight"], mine["norm.weight"].half().float()
    )


def test_importing_the_package_does_not_import_torch_vision_models() -> None:
    code = "import sys, memtool.backbones; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
