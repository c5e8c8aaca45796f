"""What is said to be as published is so: every value of the presets, and what they are made of."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from memtool.config import find_preset, resolve
from memtool.engine import rate_factor
from memtool.errors import ConfigError
from memtool.heads.losses import over_seen_texts
from memtool.learning.augment import augmented, crop_boxes
from memtool.methods.moram.learn import AtomLearner
from memtool.sections import MoramSettings
from memtool.settings import Config, TrainSettings, get
from memtool.streams.description import read_description
from memtool.streams.sources import built_in_descriptions
from tests.methods.facts import moram_of, write_facts

PAGE = Path(__file__).parents[2] / "docs" / "moram.md"
COMPATIBILITY = Path(__file__).parents[1] / "compatibility"

XTAIL: dict[str, object] = {
    "backbone.name": "open_clip:ViT-B-16-quickgelu",
    "backbone.targets": ("q", "k", "v", "out", "fc", "proj"),
    "stream.source": "xtail-official",
    "stream.shots": 16,
    "adapter.rank": 16,
    "adapter.alpha": 16.0,
    "train.iterations": 500,
    "train.batch_size": 64,
    "train.lr": 5e-4,
    "train.final_lr": 0.0,
    "train.schedule": "cosine",
    "train.warmup": 0.0,
    "train.weight_decay": 0.0,
    "train.betas": (0.9, 0.9999),
    "train.clip": None,
    "train.augment": "crop",
    "head.kind": "text",
    "head.texts": "seen",
    "moram.topk": 16,
    "moram.temperature": 0.01,
    "moram.threshold": 0.2,
    "moram.score_norm": "bank",
    "moram.scaled_threshold": False,
    "moram.selected_only": False,
    "moram.keys": "random",
    "engine.precision": "fp32",
}
TRACE: dict[str, object] = {
    "backbone.name": "hf:google/gemma-2b-it",
    "backbone.targets": ("q", "k", "v", "o"),
    "stream.source": "trace-official",
    "adapter.rank": 8,
    "adapter.alpha": 16.0,
    "train.batch_size": 32,
    "train.lr": 5e-4,
    "train.schedule": "constant",
    "train.warmup": 0.0,
    "train.weight_decay": 0.0,
    "train.betas": (0.9, 0.95),
    "train.clip": 1.0,
    "text.prompt_tokens": 1024,
    "text.answer_tokens": 512,
    "text.epochs": (2, 1, 3, 2, 1, 2, 2, 3),
    "text.dropout": 0.1,
    "text.generate": True,
    "moram.topk": 8,
    "moram.temperature": 0.03,
    "moram.threshold": 0.2,
    "moram.score_norm": "bank",
    "moram.scaled_threshold": False,
    "moram.selected_only": False,
    "moram.keys": "random",
    "moram.frozen_scaling": "one",
    "engine.accumulate": 32,
}
PUBLISHED = {"moram-xtail-official": XTAIL, "moram-trace-official": TRACE}
ORDERS = {
    "xtail-official": "aircraft caltech101 dtd eurosat flowers food101 mnist pets cars sun397",
    "trace-official": "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten",
}


def configured(preset: str) -> Config:
    return resolve(preset=preset, ambient=False).config


@pytest.mark.parametrize(
    ("preset", "key", "value"),
    [(preset, key, value) for preset, told in PUBLISHED.items() for key, value in told.items()],
)
def test_a_value_of_the_published_code(preset: str, key: str, value: object) -> None:
    assert get(configured(preset), key) == value


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_sets_nothing_that_is_not_pinned(preset: str) -> None:
    text = find_preset(preset).path.read_text(encoding="utf-8")
    resolved = resolve(preset=preset, ambient=False)
    told = {key for key, place in resolved.origin.items() if place == f"preset {preset}"}
    ours = {"method", "store", "backbone.image_size", "stream.setting"}
    assert told - ours <= PUBLISHED[preset].keys(), text


@pytest.mark.parametrize("source", ORDERS)
def test_the_order_of_the_tasks(source: str) -> None:
    file = built_in_descriptions().get(source)
    if file is None:  # of texts
        folder = next(iter(built_in_descriptions().values())).parent / "text"
        lines = (folder / f"{source}.yaml").read_text(encoding="utf-8")
        assert re.findall(r"name: ([\w-]+)", lines) == ORDERS[source].split()
        return
    description = read_description(file)
    assert [name.removesuffix("_hub") for name in description.sources] == ORDERS[source].split()


def test_the_page_has_a_table_of_the_published_form() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "| official | ours | why |" in page
    for preset, told in PUBLISHED.items():
        assert f"`{preset}`" in page
        for key in told:
            section = key.partition(".")[0]
            if section in ("train", "head", "moram") and get(configured(preset), key) != (
                get(Config(method="moram"), key)
            ):
                assert f"`{key}" in page, f"{key} of {preset}"


def test_a_constant_rate_is_constant_after_its_rise() -> None:
    settings = TrainSettings(schedule="constant", warmup=0.2)
    rates = [rate_factor(step / 10, settings) for step in range(10)]
    assert rates[0] < rates[1] < 1
    assert rates[2:] == [1.0] * 8
    assert [rate_factor(step / 10, TrainSettings(schedule="constant", warmup=0)) for step in (0, 9)]
    cosine = TrainSettings(warmup=0)
    for step in (0, 3, 9):
        expected = 0.5 * (1 + math.cos(math.pi * step / 10))
        assert rate_factor(step / 10, cosine) == pytest.approx(expected)


def slow_loss(logits: Tensor, labels: Tensor, known: list[int], texts: int) -> Tensor:
    """The published loss, sample by sample and text by text."""
    of_images = [
        -(logits[i, known].log_softmax(0)[known.index(int(y))]) for i, y in enumerate(labels)
    ]
    of_texts = []
    for label in known:
        spread = logits[:, label].log_softmax(0)
        own = [-spread[i] for i, y in enumerate(labels) if int(y) == label]
        of_texts.append(sum(own, logits.new_zeros(())))
    return torch.stack(of_images).mean() + torch.stack(of_texts).sum() / texts


@pytest.mark.parametrize("before", [0, 7])
def test_the_published_loss_equals_the_slow_one(before: int) -> None:
    generator = torch.Generator().manual_seed(0)
    known = [2, 3, 5, 6]
    logits = torch.full((9, 8), -torch.inf, dtype=torch.float64)
    logits[:, known] = 5 * torch.randn(9, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([2, 3, 3, 6, 2, 6, 6, 3, 2])  # class 5 has no image in the batch
    found = over_seen_texts(logits.requires_grad_(), labels, before + len(known))
    expected = slow_loss(logits, labels, known, before + len(known))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    (slope,) = torch.autograd.grad(found, logits)
    assert slope[:, known].isfinite().all()
    # As the published code has it: cross-entropy with a target that is the sum over images.
    target = torch.stack([(labels == label).double() for label in known])
    dense = (
        F.cross_entropy(logits[:, known].detach().mT, target) * len(known) / (before + len(known))
    )
    images = F.cross_entropy(logits.detach(), labels)
    torch.testing.assert_close(found.detach().double(), images + dense, atol=1e-6, rtol=1e-6)


def test_crops_are_of_the_published_range() -> None:
    boxes = crop_boxes(4000, 224, 224, torch.Generator().manual_seed(0)).double()
    top, left, tall, wide = boxes.mT
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= 224).all()
    assert (left + wide <= 224).all()
    area, ratio = tall * wide / 224**2, wide / tall
    assert 0.895 < area.min() < 0.905
    assert area.max() == 1
    assert ratio.min() > 0.79  # of what fits: 0.9 at most of the other side
    assert ratio.max() < 1.26
    assert abs(float(area[tall * wide < 224**2].mean()) - 0.935) < 0.02
    for start, size in ((top, tall), (left, wide)):  # every place that fits is as likely
        room = size < 224
        assert abs(float((start[room] / (224 - size[room])).mean()) - 0.5) < 0.02


def test_a_crop_keeps_shape_and_type_and_depends_on_the_seed_alone() -> None:
    grey = np.linspace(0, 255, 32, dtype=np.uint8)
    images = torch.from_numpy(np.broadcast_to(grey[None, None, :, None], (6, 32, 32, 3)).copy())
    train = TrainSettings(augment="crop")

    def of(seed: int) -> Tensor:
        return augmented(images, seed, train)

    once = of(1)
    assert (once.shape, once.dtype) == (images.shape, torch.uint8)
    assert torch.equal(once, of(1))
    assert not torch.equal(once, of(2))
    assert (once.float() - images.float()).abs().max() < 40  # a tenth of the picture at most
    assert not torch.equal(once, images)


@pytest.mark.parametrize(("kind", "scaling"), [("kept", 2.0), ("one", 1.0)])
def test_the_scaling_of_frozen_atoms(kind: str, scaling: float, tmp_path: Path) -> None:
    moram = moram_of(write_facts(tmp_path), tmp_path, **{"moram.frozen_scaling": kind})
    for task in ("1", "2"):
        moram.adapt(task)
        moram.write()
    snapshot = moram.snapshot()
    assert {record.scaling for record in snapshot.view.atom_records} == {scaling}
    bank = snapshot.bank.bank(moram.workspace.layout.sites[0].name)
    assert bank.scaling.tolist() == [scaling] * 4
    # Atoms that learn have alpha / r in either case.
    learner = AtomLearner(moram.workspace, snapshot.bank, moram.gate)
    learner.before_task(moram.workspace.stream.tasks[2])
    grown = learner.bank.bank(moram.workspace.layout.sites[0].name)
    assert grown.scaling.tolist() == [scaling] * 4 + [2.0] * 2
    # Another scaling is another memory.
    other = {"moram.frozen_scaling": "one" if kind == "kept" else "kept"}
    with pytest.raises(ConfigError, match="frozen_scaling"):
        moram_of(tmp_path, tmp_path, **other).adapt("3")


def test_what_came_later_leaves_older_trainings_found() -> None:
    """A new setting at its default does not make another training of one that is finished."""
    older = yaml.safe_load((COMPATIBILITY / "settings-0.1.yaml").read_text())
    now = resolve(environ={}, ambient=False).config
    for section in ("adapter", "train", "head"):  # what adapters and baselines go by
        assert getattr(now, section).decides() == older[section], section
    assert "frozen_scaling" not in MoramSettings().decides()
    assert TrainSettings(schedule="constant").decides()["schedule"] == "constant"
