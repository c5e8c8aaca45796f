"""Stage 1: the adapters of several tasks that share a pass are those of a pass for each."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from memtool.adapters.layout import Layout
from memtool.adapters.lora import init_lora
from memtool.backbones import create_backbone
from memtool.backbones.interface import Onward
from memtool.backbones.vit import VitBackbone
from memtool.engine import Engine
from memtool.errors import CapacityError, DivergedError
from memtool.heads import prototype_head
from memtool.learning import adapt as stage_one
from memtool.learning.adapt import Adapted, Lesson, adapt
from memtool.settings import AdapterSettings, BackboneSettings, EngineSettings, TrainSettings
from memtool.streams.task import Images

CLASSES = ((0, 1, 3), (2, 4), (0, 4))
SIZES, SEEDS = (32, 30, 29), (5, 6, 7)
"""Of four steps an epoch, with batches of other sizes in each: of 8, or of 5, 4 and 6 distinct."""


def lesson(place: int) -> Lesson:
    """A task of noise whose brightness tells the class."""
    rng = np.random.default_rng(place)
    labels = rng.choice(CLASSES[place], size=SIZES[place])
    noise = rng.integers(0, 120, size=(SIZES[place], 32, 32, 3))
    images = (noise + 30 * labels[:, None, None, None]).astype(np.uint8)
    return Lesson(Images(images, labels), CLASSES[place], SEEDS[place], stage=f"task {place}")


LESSONS = [lesson(place) for place in range(3)]


@pytest.fixture(scope="module")
def nano() -> VitBackbone:
    backbone = create_backbone(BackboneSettings())
    assert isinstance(backbone, VitBackbone)
    return backbone


@pytest.fixture
def exact(nano: VitBackbone, monkeypatch: pytest.MonkeyPatch) -> Iterator[VitBackbone]:
    """All that is computed is float64."""
    monkeypatch.setattr(stage_one, "init_lora", partial(init_lora, dtype=torch.float64))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    # What reaches a block is kept in float32.
    monkeypatch.setattr(Onward, "preprocess", lambda _, kept: kept.double())
    backbone = create_backbone(BackboneSettings())
    assert isinstance(backbone, VitBackbone)
    yield backbone.double()
    torch.set_default_dtype(before)


def settings(
    adapters: int = 2, differ_by: str = "bootstrap", **train: object
) -> tuple[AdapterSettings, TrainSettings]:
    short = {"epochs": 3, "batch_size": 8, "lr": 0.01, "clip": 0.5, **train}
    adapter = {"rank": 2, "per_task": adapters, "differ_by": differ_by}
    return AdapterSettings.model_validate(adapter), TrainSettings.model_validate(short)


def trained(
    backbone: VitBackbone,
    lessons: Sequence[Lesson],
    *,
    begin: int = 0,
    accumulate: int = 1,
    knows: bool = False,
    **how: Any,
) -> list[Adapted]:
    engine = Engine(EngineSettings(device="cpu", precision="fp32", accumulate=accumulate))
    adapter, train = settings(**how)
    directions = torch.randn(5, backbone.dim, generator=torch.Generator().manual_seed(0))
    return adapt(
        engine,
        backbone,
        Layout([site for site in backbone.sites(("q", "v")) if site.block >= begin], 2),
        lessons,
        class_count=5,
        adapter=adapter,
        train=train,
        known=prototype_head(directions, torch.arange(5), 5, 10.0) if knows else None,
    )


def difference(ours: Adapted, other: Adapted) -> float:
    """The largest of any number that was learned, and of the losses of the epochs."""
    pairs = [(ours.values, other.values)]
    for mine, theirs in zip(ours.heads, other.heads, strict=True):
        pairs += [(mine.weight, theirs.weight), (mine.bias, theirs.bias)]
    curves = [torch.tensor(one.fit.by_group, dtype=torch.float64) for one in (ours, other)]
    return max(float((a - b).abs().max()) for a, b in [*pairs, (curves[0], curves[1])])


CASES: dict[str, dict[str, Any]] = {
    "an adapter each": {"adapters": 1},
    "two, by bootstrap": {},
    "three, by their starts": {"differ_by": "start", "adapters": 3},
    "from a block on": {"begin": 2},
    "augmented": {"augment": "flip-crop"},
    "mixed": {"mixup": 0.4},
    "mixed in classes": {"mixup": 0.4, "mixup_of": "class", "augment": "flip", "adapters": 1},
    "in parts, averaged": {"accumulate": 3, "average": "half"},
    "under a head that is known": {"knows": True},
    "not clipped": {"clip": None, "schedule": "constant", "begin": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_trained_alone(exact: VitBackbone, case: str) -> None:
    """Of other sizes, classes and seeds; the last one begins at an adapter."""
    how = CASES[case]
    begin = how.get("begin", 0)
    numel = Layout([site for site in exact.sites(("q", "v")) if site.block >= begin], 2).numel
    start = 0.05 * torch.randn(numel, generator=torch.Generator().manual_seed(1))
    lessons = [*LESSONS[:2], replace(LESSONS[2], start=start)]
    together = trained(exact, lessons, **how)
    for ours, one in zip(together, lessons, strict=True):
        (alone,) = trained(exact, [one], **how)
        assert alone.values.dtype == torch.float64
        assert alone.fit.losses[-1] < 0.95 * alone.fit.losses[0]
        assert difference(ours, alone) < 1e-10
        assert ours.fit.losses == pytest.approx(alone.fit.losses, abs=1e-10)
        assert ours.fit.begin == pytest.approx(alone.fit.begin, abs=1e-10)
        assert ours.train_accuracy == alone.train_accuracy
        assert ours.fit.steps == alone.fit.steps == 12
    apart = [difference(one, other) for one, other in pairwise(together)]
    assert min(apart) > 0.01


@pytest.mark.parametrize("adapters", [1, 2])
def test_in_float32_they_are_so_to_rounding(nano: VitBackbone, adapters: int) -> None:
    how = {"adapters": adapters, "epochs": 1}
    for ours, one in zip(trained(nano, LESSONS, **how), LESSONS, strict=True):
        (alone,) = trained(nano, [one], **how)
        assert (ours.values - alone.values).norm() < 1e-5 * alone.values.norm()
        assert difference(ours, alone) < 1e-4


def test_they_share_the_seconds_of_the_pass(nano: VitBackbone) -> None:
    begin = time.perf_counter()
    found = trained(nano, LESSONS, epochs=1)
    assert len({one.fit.seconds for one in found}) == 1
    assert 0 < 3 * found[0].fit.seconds < time.perf_counter() - begin


def test_a_training_that_diverges_is_named(nano: VitBackbone) -> None:
    """Where its loss rose; of a loss that is no number, which ends the pass, all are."""
    with pytest.raises(DivergedError, match="task 1: the loss was"):
        trained(nano, LESSONS[1:], adapters=1, lr=1.0, clip=None)
    numel = Layout(nano.sites(("q", "v")), 2).numel
    bad = replace(LESSONS[2], start=torch.full((numel,), torch.nan))
    with pytest.raises(DivergedError, match="task 1 and 1 more: the loss became nan"):
        trained(nano, [LESSONS[1], bad], adapters=1)


def test_the_number_of_tasks_that_is_suggested_fits(
    nano: VitBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_one, "available_bytes", lambda device: 10**8)
    few = {"batch_size": 4, "epochs": 1}
    with pytest.raises(CapacityError, match="task 0 and 29 more: training 60 adapters") as error:
        trained(nano, LESSONS[:1] * 30, **few)
    most = int(re.search(r"--parallel-tasks (\d+), ", error.value.remedy or "")[1])
    assert 1 < most < 30
    assert len(trained(nano, LESSONS[:1] * most, **few)) == most
    with pytest.raises(CapacityError):
        trained(nano, LESSONS[:1] * (most + 1), **few)
    with pytest.raises(CapacityError) as error:
        trained(nano, LESSONS[:1] * 2, adapters=100)
    assert "--adapters-per-task" in (error.value.remedy or "")
