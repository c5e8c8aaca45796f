"""CLIP with both towers adapted, against open_clip's own forward pass; tiny random models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor

from memtool.adapters.layout import Layout, sites_of
from memtool.adapters.mixing import Mixture
from memtool.adapters.peft_files import read_peft
from memtool.adapters.recalls import every
from memtool.adapters.values import AdapterValues
from memtool.backbones import create_backbone
from memtool.backbones.open_clip import CLIP_TARGETS, ClipBackbone, build_clip
from memtool.errors import ConfigError, CorruptError, DataError, MismatchError, NotFoundError
from memtool.settings import BackboneSettings

CONFIGURATION = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8,
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2,
    },
}  # fmt: skip
TEXTS = ["a photo of a yin yang.", "a dog", "a centered satellite photo of a forest"]


def model(**changes: object) -> CLIP:
    torch.manual_seed(0)
    clip = build_clip({**CONFIGURATION, **changes}, 32, "tiny")
    for parameter in clip.parameters():  # biases and gains that begin at 0 and 1 hide errors
        if parameter.ndim:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return clip.eval()


def wrapped(clip: CLIP) -> ClipBackbone:
    return ClipBackbone(copy.deepcopy(clip), "open_clip:tiny", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return model()


@pytest.fixture(scope="module")
def backbone(clip: CLIP) -> ClipBackbone:
    return wrapped(clip)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def full_tokens(texts: list[str]) -> Tensor:
    return SimpleTokenizer(context_length=16)(texts)


def one_lora(backbone: ClipBackbone) -> tuple[Layout, Tensor]:
    layout = Layout(backbone.sites(CLIP_TARGETS), 3)
    generator = torch.Generator().manual_seed(2)
    return layout, 0.1 * torch.randn(1, layout.numel, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"quick_gelu": True}], ids=["gelu", "quick_gelu"]
)  # fmt: skip
def test_without_recall_it_is_open_clip(pixels: Tensor, changes: dict[str, object]) -> None:
    clip = model(**changes)
    backbone = wrapped(clip)
    torch.testing.assert_close(
        backbone.features(pixels), clip.encode_image(pixels), atol=1e-5, rtol=1e-5
    )
    wanted = clip.encode_text(full_tokens(TEXTS))
    torch.testing.assert_close(
        backbone.text_features(full_tokens(TEXTS)), wanted, atol=1e-5, rtol=1e-5
    )
    # Without the padding behind the longest text.
    tokens = backbone.tokenize(TEXTS)
    assert tokens.shape[1] < 16
    torch.testing.assert_close(backbone.text_features(tokens), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_one_lora_it_is_open_clip_with_merged_weights(
    clip: CLIP, backbone: ClipBackbone, pixels: Tensor
) -> None:
    layout, flat = one_lora(backbone)
    scaling = 0.7
    recall = every(AdapterValues.from_flat(flat, layout, scaling))
    merged = copy.deepcopy(clip)
    state = merged.state_dict()
    tensors = layout.unflatten(flat[0])
    for site in layout.sites:
        name = site.module
        key = f"{name}_weight" if name.endswith("in_proj") else f"{name}.weight"
        delta = tensors[f"{site.name}.lora_B"] @ tensors[f"{site.name}.lora_A"]
        state[key][site.first_row : site.first_row + site.out_features] += scaling * delta
    merged.load_state_dict(state)
    images = merged.encode_image(pixels)
    assert not torch.allclose(images, clip.encode_image(pixels), atol=1e-2)
    seen: dict[int, Tensor] = {}

    def keep(block: int, hidden: Tensor) -> Mixture | None:
        seen[block] = hidden
        return recall(block, hidden)

    backbone.features(pixels, keep)
    torch.testing.assert_close(backbone.hidden(pixels, 2, recall), seen[2])
    assert not torch.allclose(backbone.hidden(pixels, 2), seen[2], atol=1e-2)
    torch.testing.assert_close(backbone.features(pixels, recall), images, atol=1e-5, rtol=1e-4)
    later = backbone.features_from(2, seen[2], recall)
    torch.testing.assert_close(later, images, atol=1e-5, rtol=1e-4)
    tokens = full_tokens(TEXTS)
    texts = merged.encode_text(tokens)
    assert not torch.allclose(texts, clip.encode_text(tokens), atol=1e-2)
    torch.testing.assert_close(
        backbone.text_features(tokens, recall), texts, atol=1e-5, rtol=1e-4
    )  # fmt: skip


def test_sites_name_the_towers_apart(backbone: ClipBackbone) -> None:
    sites = backbone.sites(CLIP_TARGETS)
    assert (backbone.image_depth, backbone.depth) == (3, 5)
    assert len(sites) == 6 * 5
    assert len({site.name for site in sites}) == len(sites)
    for site in sites:
        in_image = site.block < backbone.image_depth
        assert site.module.startswith("visual.") == in_image
        assert backbone.block_dim(site.block) == (32 if in_image else 16)
    q = sites[0]
    assert q.name == "visual.transformer.resblocks.0.attn.in_proj[q]"
    assert (q.in_features, q.out_features, q.module_rows) == (32, 32, 96)
    assert [site.first_row for site in sites[:3]] == [0, 32, 64]
    assert backbone.sites(("v", "q")) == tuple(s for s in sites if s.slice in ("q", "v"))
    segments = Layout(sites, 3).segments
    assert sites_of((segment.name, segment.shape) for segment in segments) == sites
    with pytest.raises(ConfigError, match="target 'fc1'"):
        backbone.sites(("fc1",))


def test_recall_sees_every_block_of_its_tower(backbone: ClipBackbone, pixels: Tensor) -> None:
    seen: list[tuple[int, torch.Size]] = []

    def recall(block: int, hidden: Tensor) -> None:
        seen.append((block, hidden.shape))

    backbone.features(pixels, recall)
    backbone.text_features(backbone.tokenize(TEXTS), recall)
    assert [block for block, _ in seen] == [0, 1, 2, 3, 4]
    assert seen[0][1] == (3, 17, 32)
    assert seen[3][1][2] == 16
    with torch.no_grad():
        first = backbone.hidden(pixels, 1)
    assert first.shape == (3, 17, 32)
    with pytest.raises(MismatchError, match="image tower"):
        backbone.hidden(pixels, 3)


def test_everything_is_frozen_and_hashed(clip: CLIP, backbone: ClipBackbone) -> None:
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.train().training
    assert backbone.sha256 == wrapped(clip).sha256
    other = copy.deepcopy(clip)
    other.ln_final.bias.data[0] += 1
    assert wrapped(other).sha256 != backbone.sha256
    assert backbone.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_preprocessing_normalises_uint8_images(backbone: ClipBackbone) -> None:
    pixels = backbone.preprocess(torch.full((2, 40, 40, 3), 255, dtype=torch.uint8))
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pixels, torch.ones_like(pixels))


def test_a_prompt_longer_than_the_context_is_an_error(backbone: ClipBackbone) -> None:
    with pytest.raises(DataError, match=r"has 22 tokens(.|\n)*at most 16"):
        backbone.tokenize(["short", "dog " * 20])
    with pytest.raises(DataError, match="no texts"):
        backbone.tokenize([])


def files(folder: Path, clip: CLIP) -> BackboneSettings:
    configuration = folder / "tiny.json"
    content = {"model_cfg": CONFIGURATION, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    configuration.write_text(json.dumps(content))
    save_file(
        {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
        folder / "tiny.safetensors",
    )
    return BackboneSettings(
        name=f"open_clip:{configuration}", weights=folder / "tiny.safetensors", image_size=32
    )


def test_from_a_configuration_and_a_weight_file(
    clip: CLIP, backbone: ClipBackbone, pixels: Tensor, tmp_path: Path
) -> None:
    settings = files(tmp_path, clip)
    made = create_backbone(settings)
    assert made.sha256 == backbone.sha256
    assert torch.equal(made.features(pixels), backbone.features(pixels))
    larger = create_backbone(settings.model_copy(update={"image_size": 64}))
    assert larger.features(torch.zeros(1, 3, 64, 64)).shape == (1, 24)


def test_what_cannot_be_made_says_why(clip: CLIP, tmp_path: Path) -> None:
    settings = files(tmp_path, clip)

    def fails(error: type[Exception], match: str, **changes: object) -> None:
        with pytest.raises(error, match=match):
            create_backbone(settings.model_copy(update=changes))

    fails(NotFoundError, "no weights for", weights=None)
    fails(NotFoundError, "no weights for", weights=tmp_path / "absent.safetensors")
    fails(NotFoundError, "no CLIP configuration", name="open_clip:absent.json")
    fails(ConfigError, "open_clip has no model 'ViT-B-61'", name="open_clip:ViT-B-61")
    fails(ConfigError, "image_size 33", image_size=33)
    fails(ConfigError, "cannot adapt", name="open_clip:roberta-ViT-B-32")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    fails(CorruptError, "safetensors", weights=tmp_path / "broken.safetensors")
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    del state["ln_final.bias"]
    save_file(state, tmp_path / "short.safetensors")
    fails(MismatchError, "ln_final.bias", weights=tmp_path / "short.safetensors")
    (tmp_path / "other.json").write_text(json.dumps({**CONFIGURATION, "embed_dim": 12}))
    fails(MismatchError, "has shape", name=f"open_clip:{tmp_path / 'other.json'}")
    (tmp_path / "list.json").write_text("[]")
    fails(
        ConfigError,
        "list.json holds a list\n.*embed_dim",
        name=f"open_clip:{tmp_path / 'list.json'}",
    )


@pytest.mark.parametrize("targets", [["attn"], ["attn", "c_fc", "c_proj"]])
def test_attention_as_peft_adapts_it(
    clip: CLIP, backbone: ClipBackbone, pixels: Tensor, tmp_path: Path, targets: list[str]
) -> None:
    """Its fused in_proj and its out_proj go by one name there, and out_proj counts twice."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=targets,
        alpha_pattern={r"0\.attn": 2},
        init_lora_weights=False,
    )
    lora = peft.get_peft_model(copy.deepcopy(clip), config)
    lora.save_pretrained(str(tmp_path))
    found = read_peft(tmp_path, backbone.all_sites)
    values = AdapterValues.from_flat(found.value[None], found.layout, found.scaling)
    with torch.no_grad():
        theirs = lora.base_model.model.encode_image(pixels)
        plain, ours = backbone.features(pixels), backbone.features(pixels, every(values))
    assert (plain - ours).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
