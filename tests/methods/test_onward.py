"""What is in front of the first adapter is computed once, and is what it would be each time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from memtool.adapters.layout import Layout
from memtool.backbones import create_backbone
from memtool.backbones.vit import VitBackbone
from memtool.engine import Engine
from memtool.learning import onward
from memtool.learning.adapt import Adapted, Lesson, adapt
from memtool.learning.onward import from_block
from memtool.settings import AdapterSettings, BackboneSettings, EngineSettings, TrainSettings
from memtool.streams.task import Images

IMAGES, BEGIN, EPOCHS, ADAPTERS = 20, 2, 3, 4


@pytest.fixture(scope="module")
def nano() -> VitBackbone:
    backbone = create_backbone(BackboneSettings())
    assert isinstance(backbone, VitBackbone)
    return backbone


@pytest.fixture(scope="module")
def samples() -> Images:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=IMAGES)
    noise = rng.integers(0, 120, size=(IMAGES, 32, 32, 3))
    return Images((noise + 40 * labels[:, None, None, None]).astype(np.uint8), labels)


@pytest.fixture
def ran(nano: VitBackbone) -> Iterator[list[int]]:
    """How many images went through each block."""
    counts = [0] * nano.depth
    hooks = []
    for number, block in enumerate(nano.blocks):

        def count(_module: object, given: tuple[torch.Tensor, ...], number: int = number) -> None:
            counts[number] += len(given[0])

        hooks.append(block.register_forward_pre_hook(count))
    yield counts
    for hook in hooks:
        hook.remove()


ENGINE = Engine(EngineSettings(device="cpu", precision="fp32"))


def trained(
    nano: VitBackbone, samples: Images, train: TrainSettings, adapters: int = ADAPTERS
) -> Adapted:
    layout = Layout([site for site in nano.sites(("q", "v")) if site.block >= BEGIN], 2)
    (found,) = adapt(
        ENGINE,
        nano,
        layout,
        [Lesson(samples, (0, 1, 2), seed=1)],
        class_count=3,
        adapter=AdapterSettings(rank=2, per_task=adapters),
        train=train,
    )
    return found


def of(**changes: object) -> TrainSettings:
    return TrainSettings(**{"epochs": EPOCHS, "batch_size": 8, "lr": 0.01, **changes})


@pytest.mark.parametrize("adapters", [1, ADAPTERS])
def test_images_run_once_through_the_blocks_before_an_adapter(
    adapters: int,
    nano: VitBackbone,
    samples: Images,
    ran: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = trained(nano, samples, of(), adapters)
    once = ran.copy()
    monkeypatch.setattr(onward, "available_bytes", lambda device: 0)
    slow = trained(nano, samples, of(), adapters)
    often = [all_ - first for all_, first in zip(ran, once, strict=True)]
    assert torch.allclose(found.values, slow.values, atol=1e-5)
    assert found.fit.by_group == pytest.approx(np.array(slow.fit.by_group), rel=1e-4)
    assert found.train_accuracy == slow.train_accuracy
    room, size, accuracy = 3, 1, adapters * IMAGES  # what else runs, by the whole model
    assert once[0] == once[BEGIN - 1] == IMAGES + room + size + accuracy
    assert often[0] > adapters * EPOCHS * IMAGES // 2 + accuracy
    assert once[BEGIN] == often[BEGIN]


def test_what_reaches_a_block_is_what_each_image_is_alone(
    nano: VitBackbone, samples: Images
) -> None:
    model, (given,) = from_block(ENGINE, nano, BEGIN, [samples], of(), 10**9)
    images = torch.from_numpy(samples.images)
    with torch.no_grad():
        each = torch.cat([nano.hidden(nano.preprocess(one[None]), BEGIN) for one in images])
        features = model.features(torch.from_numpy(given.inputs))
        whole = nano.features(nano.preprocess(images))
    assert torch.allclose(torch.from_numpy(given.inputs), each, atol=1e-4)
    assert torch.allclose(features, whole, atol=1e-4)
    assert given.labels is samples.labels


@pytest.mark.parametrize(
    ("block", "left", "changes"),
    [
        (0, 10**9, {}),
        (BEGIN, 10**9, {"augment": "flip"}),
        (BEGIN, 10**9, {"mixup": 0.2}),
        (BEGIN, 10**5, {}),
        (BEGIN, 12 * 10**5, {}),  # which the images of one task would fit
    ],
)
def test_nothing_is_kept_where_nothing_is_computed_twice_or_fits(
    block: int, left: int, changes: dict[str, object], nano: VitBackbone, samples: Images
) -> None:
    given = [samples, samples]
    assert from_block(ENGINE, nano, block, given, of(**changes), left) == (nano, given)
    model, kept = from_block(ENGINE, nano, BEGIN, given, of(), 10**9)
    assert model is not nano
    assert [len(some.inputs) for some in kept] == [IMAGES, IMAGES]
