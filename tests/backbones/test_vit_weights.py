"""Local weights: what is loaded, what is resampled, what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from memtool.backbones import create_backbone
from memtool.backbones.vit import VitBackbone
from memtool.backbones.vit_weights import load_vit_weights
from memtool.errors import CorruptError, MismatchError, NotFoundError
from memtool.settings import BackboneSettings


def small(image_size: int = 32, **changes: object) -> VisionTransformer:
    return VisionTransformer(
        **{
            "img_size": image_size,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "num_classes": 0,
            **changes,
        }
    ).eval()


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in small().state_dict().items()}


def test_fp16_is_loaded_to_fp32_and_a_head_is_left_out(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file({**half, "head.weight": torch.ones(5, 16)}, tmp_path / "w.safetensors")
    vit = small()
    load_vit_weights(vit, tmp_path / "w.safetensors")
    for name, tensor in vit.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[name].float())


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}, {"no_embed_class": True}])
def test_positions_are_resampled_as_timm_does(tmp_path: Path, prefix: dict[str, object]) -> None:
    source = small(**prefix)
    save_file(dict(source.state_dict()), tmp_path / "w.safetensors")
    vit = small(48, **prefix)
    load_vit_weights(vit, tmp_path / "w.safetensors")
    source.set_input_size(img_size=(48, 48))
    pixels = torch.randn(2, 3, 48, 48)
    assert torch.equal(vit(pixels), source(pixels))


def test_missing_extra_and_wrong_tensors_are_named(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "w.safetensors"

    def refused(change: dict[str, Tensor], match: str, drop: str = "") -> None:
        save_file({n: t for n, t in {**tensors, **change}.items() if n != drop}, path)
        vit = small()
        before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
        with pytest.raises(MismatchError, match=match):
            load_vit_weights(vit, path)
        # Nothing of a file that is refused gets into the model.
        assert all(torch.equal(tensor, before[n]) for n, tensor in vit.state_dict().items())

    refused({}, r"1 missing \(blocks.0.norm1.bias\), none extra", drop="blocks.0.norm1.bias")
    refused({"blocks.1.norm1.bias": torch.zeros(16)}, r"1 extra \(blocks.1.norm1.bias\)")
    refused({"norm.weight": torch.zeros(8)}, r"norm.weight .* shape \(8,\)\nexpected: \(16,\)")
    refused({"patch_embed.proj.weight": torch.zeros(16, 3, 4, 4)}, "patch_embed.proj.weight")
    refused({"norm.weight": torch.full((16,), torch.nan)}, "norm.weight .* finite")
    refused({"norm.weight": torch.zeros(16, dtype=torch.int32)}, "norm.weight .*int32")
    refused({"pos_embed": torch.zeros(1, 16, 16)}, "pos_embed .* 16 positions")
    refused({"pos_embed": torch.zeros(1, 1, 16)}, "pos_embed .* 1 positions")
    refused({"pos_embed": torch.zeros(17, 16)}, "pos_embed")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no weights at .*absent"):
        load_vit_weights(small(), tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(CorruptError, match=r"text.safetensors"):
        load_vit_weights(small(), tmp_path / "text.safetensors")


@pytest.fixture(scope="module")
def real_weights() -> Path:
    folder = os.environ.get("MEMTOOL_DATA")
    if not folder:
        pytest.skip("MEMTOOL_DATA is not set: the real ViT-Tiny weights are needed")
    return Path(folder) / "weights" / "vit_tiny_patch16_224.fp16.safetensors"


def real(weights: Path, image_size: int) -> VitBackbone:
    settings = BackboneSettings(
        name="timm:vit_tiny_patch16_224", weights=weights, image_size=image_size
    )
    backbone = create_backbone(settings)
    assert isinstance(backbone, VitBackbone)
    return backbone


def test_the_real_vit_tiny_at_its_own_size(real_weights: Path) -> None:
    backbone = real(real_weights, 224)
    assert (backbone.dim, backbone.depth, backbone.image_size) == (192, 12, 224)
    # AugReg weights want 0.5, not ImageNet's statistics.
    assert backbone.mean.flatten().tolist() == [0.5] * 3
    assert backbone.std.flatten().tolist() == [0.5] * 3
    reference = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    reference.load_state_dict({n: t.float() for n, t in load_file(real_weights).items()})
    reference = reference.double().eval()
    images = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    pixels = backbone.preprocess(images).double()
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(pixels), pre_logits=True)
        features = backbone.double().features(pixels)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)


def test_the_real_vit_tiny_at_another_size(real_weights: Path) -> None:
    backbone, again = real(real_weights, 96), real(real_weights, 96)
    assert backbone.sha256 == again.sha256
    assert backbone.sha256 != real(real_weights, 224).sha256
    # timm's own way: build at 224, then change the input size.
    reference = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    reference.load_state_dict({n: t.float() for n, t in load_file(real_weights).items()})
    reference.set_input_size(img_size=(96, 96))
    reference = reference.double().eval()
    pixels = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(pixels), pre_logits=True)
        features = backbone.double().features(pixels)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)


def test_the_real_features_tell_photographs_apart(real_weights: Path, tmp_path: Path) -> None:
    pacs = real_weights.parents[1] / "pacs" / "test.parquet"
    table = Dataset.from_parquet(str(pacs), cache_dir=str(tmp_path))
    photos = np.flatnonzero(
        np.asarray(table["domain"]) == table.features["domain"].str2int("photo")
    )
    table = table.select(np.random.default_rng(0).permutation(photos)[:240])
    images = torch.from_numpy(np.stack([np.asarray(i.convert("RGB")) for i in table["image"]]))
    backbone = real(real_weights, 160)
    with torch.inference_mode():
        parts = [backbone.features(backbone.preprocess(part)) for part in images.split(40)]
    features, labels = torch.cat(parts).numpy(), np.asarray(table["label"])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    probe.fit(features[:120], labels[:120])
    assert probe.score(features[120:], labels[120:]) > 0.85
