"""The embedded backbone: its file, and what a linear probe reads from its frozen features."""

import json
from importlib import resources

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer

from memtool.backbones import create_backbone
from memtool.backbones.interface import Backbone
from memtool.backbones.nano import build_nano
from memtool.backbones.vit import VitBackbone
from memtool.settings import BackboneSettings, StreamSettings
from memtool.streams import Stream, Task, create_stream

WEIGHTS = resources.files("memtool.backbones") / "weights"


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return create_backbone(BackboneSettings())


@pytest.fixture(scope="module")
def digits() -> Stream:
    return create_stream(StreamSettings(source="digits", setting="dil"), 32)


def test_the_file_is_small_half_precision_and_says_what_made_it() -> None:
    with resources.as_file(WEIGHTS / "nano.safetensors") as path:
        assert path.stat().st_size <= 3_000_000
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
            assert sum(file.get_tensor(name).numel() for name in names) == 1_271_200
            made = json.loads(file.metadata()["pretraining"])
    card = (WEIGHTS / "nano.md").read_text()
    assert made["data_sha256"] in card
    assert f"{made['steps']} steps" in card


def test_shape(nano: Backbone) -> None:
    assert (nano.name, nano.dim, nano.depth, nano.image_size) == ("nano", 160, 4, 32)
    assert nano.sha256 in (WEIGHTS / "nano.md").read_text()
    assert sum(parameter.numel() for parameter in nano.parameters()) == 1_271_200
    pixels = nano.preprocess(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert pixels.unique().tolist() == [-1.0]
    assert nano.features(pixels).shape == (2, 160)


@pytest.mark.parametrize("size", [32, 64])
def test_our_own_module_is_timms(size: int) -> None:
    ours = build_nano(size).eval()
    theirs = VisionTransformer(
        img_size=size,
        patch_size=8,
        embed_dim=160,
        depth=4,
        num_heads=4,
        class_token=True,
        global_pool="token",
        num_classes=0,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(pixels), theirs(pixels), atol=1e-6, rtol=1e-6)
    one, other = (VitBackbone(m, "m", mean=[0.5] * 3, std=[0.5] * 3) for m in (ours, theirs))
    assert one.sha256 == other.sha256
    assert torch.equal(one.features(pixels), other.features(pixels))


def test_another_image_size(nano: Backbone) -> None:
    larger = create_backbone(BackboneSettings(image_size=64))
    assert larger.features(torch.zeros(1, 3, 64, 64)).shape == (1, 160)
    assert larger.sha256 != nano.sha256


def features(nano: Backbone, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        parts = torch.from_numpy(np.ascontiguousarray(images)).split(200)
        return torch.cat([nano.features(nano.preprocess(part)) for part in parts]).numpy()


def probe_accuracy(nano: Backbone, task: Task) -> float:
    """Test accuracy of a logistic regression on standardised frozen features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000))
    probe.fit(features(nano, task.train.images), task.train.labels)
    accuracy = float(probe.score(features(nano, task.test.images), task.test.labels))
    print(f"frozen nano, linear probe, {task.name}: {accuracy:.3f}")
    return accuracy


def test_probe_on_upright_digits(nano: Backbone, digits: Stream) -> None:
    assert probe_accuracy(nano, digits.tasks[0]) >= 0.96


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_probe_on_the_other_domains(nano: Backbone, digits: Stream, number: int) -> None:
    assert probe_accuracy(nano, digits.tasks[number - 1]) >= 0.80
