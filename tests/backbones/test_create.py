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


def test_a_model_whose_blocks_take_several_tensors_is_refused_by_name() -> None:
    settings = BackboneSettings(
        name="timm:tnt_s_legacy_patch16_224", weights="random", image_size=224
    )
    with pytest.raises(ConfigError, match=r"no layer that can be adapted: no part of it runs once"):
        create_backbone(settings)


@pytest.mark.parametrize("name", ["nano", "timm:test_vit", "timm:test_resnet"])
def test_random_weights_are_the_same_every_time(name: str) -> None:
    settings = BackboneSettings(name=name, weights="random")
    before = torch.get_rng_state()
    one, other = create_backbone(settings), create_backbone(settings)
    assert one.sha256 == other.sha256
    assert torch.equal(torch.get_rng_state(), before)


def test_a_target_that_a_convnet_has_not_is_refused_with_those_that_it_has() -> None:
    backbone = create_backbone(BackboneSettings(name="timm:test_resnet", weights="random"))
    with pytest.raises(ConfigError, match=r"no target 'q'(.|\n)*backbone.targets=conv1,conv2"):
        backbone.sites(("q", "v"))


def test_weights_of_a_convnet_come_from_a_file_with_timms_names(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    whole = timm.create_model("test_resnet", pretrained=False, num_classes=10).eval()
    path = tmp_path / "mine.safetensors"
    save_file({k: v for k, v in whole.state_dict().items() if v.is_floating_point()}, path)
    backbone = create_backbone(BackboneSettings(name="timm:test_resnet", weights=path))
    pixels = torch.randn(2, 3, 32, 32)
    expected = whole.forward_head(whole.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(backbone.features(pixels), expected)


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
