"""A memory that recalls few of its adapters: the same recall, whatever of the rest is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import memtool
from memtool.adapters import mixing
from memtool.adapters.recalls import given_for_each
from memtool.adapters.resident import ResidentValues
from memtool.errors import ConfigError
from memtool.methods.mira.measure import Measure
from memtool.methods.mira.method import Mira
from tests.methods.conftest import learn, small_config

TOP_2 = {"memory__separation": "topk", "memory__topk": 2}
SOFT = {**TOP_2, "consolidate__keys": "mean-query", "memory__beta": 0.2}
"""Keys that leave no input to one adapter alone."""


def opened(folder: Path, **settings: object) -> Mira:
    return Mira.open(small_config(folder, **settings), seed=0)


def remembered(folder: Path, **settings: object) -> Mira:
    """A memory of the three tasks whose adapters are in a folder."""
    return learn(opened(folder, **settings), each=False)


def nbytes(mira: Mira) -> int:
    return mira.workspace.layout.numel * 4


@pytest.mark.parametrize(
    "settings",
    [
        TOP_2,
        {**TOP_2, "memory__scope": "block"},
        {**TOP_2, "memory__keys_of": "class"},
        {**TOP_2, "memory__mix": "params"},
        {"memory__separation": "max"},
        {"memory__routing": "lda"},
        {"memory__routing": "prototype"},
    ],
)
def test_only_what_is_picked_is_computed_and_it_is_the_dense_mixture(
    adapted: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    mira = remembered(adapted, **settings)
    _, model, _ = mira.snapshot().consolidated()
    images = torch.from_numpy(mira.workspace.stream.tasks[1].test.images[:20].copy())
    seen: list[int] = []
    picked = mixing.add_picked

    def counted(*given):  # type: ignore[no-untyped-def]
        seen.append(given[5].index.shape[1])
        return picked(*given)

    monkeypatch.setattr(mixing, "add_picked", counted)
    with torch.inference_mode():
        features, coefficients = model.with_coefficients(images)
    assert seen
    assert max(seen) <= (2 if settings.get("memory__separation") == "topk" else 1)
    with torch.inference_mode():
        dense = model.under(images, given_for_each(model.values, coefficients, model.mix))
    torch.testing.assert_close(features, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "kernels"), [(TOP_2, True), ({}, False)])
def test_a_record_says_by_which_kernels_what_was_picked_is_computed(
    adapted: Path, settings: dict[str, object], kernels: bool
) -> None:
    found = remembered(adapted, **settings).evaluate().environment.kernels
    assert bool(found) == kernels
    assert set(found) <= {"dense", "gathered"}  # as a CPU does


def test_weights_that_are_moved_from_zero_are_not_left_out(adapted: Path) -> None:
    mira = remembered(adapted, memory__routing="lda", memory__separation="affine")
    _, model, _ = mira.snapshot().consolidated()
    images = torch.from_numpy(mira.workspace.stream.tasks[1].test.images[:4].copy())
    offset = torch.full((4, 1, 3), 0.5, requires_grad=True)
    features, coefficients = model.with_coefficients(images, offset)
    assert (coefficients != 0).all()
    (slope,) = torch.autograd.grad(features.square().sum(), offset)
    assert (slope != 0).all()
    dense = model.under(images, given_for_each(model.values, coefficients.detach(), model.mix))
    torch.testing.assert_close(features.detach(), dense, rtol=1e-4, atol=1e-5)


def test_keys_learn_through_what_is_picked_as_through_the_dense_mixture(
    adapted: Path,
) -> None:
    mira = remembered(adapted, **SOFT)
    _, model, _ = mira.snapshot().consolidated()
    model.memory.requires_grad_(True)
    images = torch.from_numpy(mira.workspace.stream.tasks[1].test.images[:6].copy())
    slopes = []
    for sparse in (True, False):
        for block in model.memory.blocks:
            model.memory[block].most = 2 if sparse else None
        model.zero_grad()
        model.with_coefficients(images)[0].square().mean().backward()
        slopes.append([model.memory[block].keys.grad.clone() for block in model.memory.blocks])
    for one, other in zip(*slopes, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_adapters_that_are_read_when_they_are_used_recall_the_same(
    adapted: Path, scope: str
) -> None:
    whole = remembered(adapted, **SOFT, memory__scope=scope)
    wanted = whole.evaluate().row("memory")
    room = 2 * nbytes(whole) + 3
    few = opened(
        adapted,
        **SOFT,
        memory__scope=scope,
        engine__resident=room,
        engine__eval_batch_size=1,
    )
    values = few.snapshot().model.values
    assert isinstance(values, ResidentValues)
    assert (values.room, len(values)) == (2, 3)
    found = few.evaluate().row("memory")
    assert found.accuracy == wanted.accuracy
    assert found.metrics["left_out"] == pytest.approx(wanted.metrics["left_out"], abs=1e-6)
    image = whole.workspace.stream.tasks[0].test.images[:1]
    with torch.inference_mode():
        mine, all_of_them = (
            one.attach().eval()(torch.from_numpy(image.copy())) for one in (few, whole)
        )
    torch.testing.assert_close(mine.probabilities, all_of_them.probabilities)
    torch.testing.assert_close(mine.weights, all_of_them.weights)


def test_keys_learn_the_same_over_adapters_that_are_read_when_they_are_used(adapted: Path) -> None:
    learning = {**SOFT, "consolidate__epochs": 1, "consolidate__batch_size": 1}
    whole = remembered(adapted, **learning)
    wanted = whole.workspace.store.view().keys()
    few = {"engine__resident": 2 * nbytes(whole), "engine__eval_batch_size": 1}
    found = remembered(adapted, **learning, **few)
    assert np.array_equal(found.workspace.store.view().keys(), wanted)


def test_too_little_room_for_a_batch_is_said(adapted: Path) -> None:
    whole = remembered(adapted, **SOFT)
    few = opened(adapted, **SOFT, engine__resident=nbytes(whole))
    with pytest.raises(
        ConfigError, match=r"room for 1 of 3 adapters, and a batch needs [23]"
    ) as told:
        few.evaluate()
    asked = str(told.value.remedy).split("engine.resident=")[1].split(",")[0]
    opened(adapted, **SOFT, engine__resident=int(asked)).evaluate()
    with pytest.raises(ConfigError, match="room for 0 of 3 adapters, and a batch needs 1"):
        opened(adapted, **SOFT, engine__resident=1).evaluate()


def test_a_mixture_of_all_needs_room_for_all(adapted: Path) -> None:
    whole = remembered(adapted)
    few = opened(adapted, engine__resident=2 * nbytes(whole))
    with pytest.raises(ConfigError, match="room for 2 of 3 adapters, and a batch needs 3"):
        few.evaluate()


def test_what_a_cut_leaves_out_is_reported(adapted: Path) -> None:
    mira = remembered(adapted, **{**SOFT, "memory__topk": 1})
    _, model, _ = mira.snapshot().consolidated()
    images = mira.workspace.stream.tasks[0].test.images
    shown = mira.retrieve(task="1")
    left = Measure(mira.workspace).left_out(model, images)
    assert left is not None
    assert 0.05 < float(left.mean()) < 2 / 3
    assert shown.left_out == pytest.approx(float(left.mean()))
    record = mira.evaluate().row("memory")
    assert 0.05 < record.metrics["left_out"] < 2 / 3
    mira = opened(adapted)
    mira.consolidate()
    assert mira.retrieve(task="1").left_out is None
    assert "left_out" not in mira.evaluate().row("memory").metrics


def test_more_than_there_are_keeps_all(adapted: Path) -> None:
    mira = remembered(adapted, **{**SOFT, "memory__topk": 9})
    record = mira.evaluate().row("memory")
    assert record.metrics["left_out"] == pytest.approx(0, abs=1e-6)


def test_a_program_of_a_sparse_memory_says_what_the_memory_says(adapted: Path) -> None:
    mira = remembered(adapted, **SOFT)
    attached = memtool.load(mira.config.store).attach()
    images = mira.workspace.stream.tasks[2].test.images[:3].copy()
    pixels = attached.backbone.preprocess(torch.from_numpy(images))
    program = torch.export.export(attached, (pixels,))
    with torch.inference_mode():
        wanted = attached(pixels)
    torch.testing.assert_close(program.module()(pixels).probabilities, wanted.probabilities)
