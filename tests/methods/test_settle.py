"""Weights that move at test time: steps down the entropy, one image at a time, nothing learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from memtool.adapters.layout import Layout
from memtool.adapters.values import AdapterValues
from memtool.backbones import create_backbone
from memtool.errors import ConfigError
from memtool.memories.keyed import KeyedMemory
from memtool.methods import open_method
from memtool.methods.mira.measure import Measure
from memtool.methods.mira.method import Mira
from memtool.methods.mira.recall import MemoryModel, memory_blocks
from memtool.methods.mira.settle import entropy_of, says, settled
from memtool.program import export_model
from memtool.sections import MemorySettings
from memtool.settings import BackboneSettings
from tests.methods.conftest import small_config

ADAPTERS = 3


def made(**settings: object) -> MemoryModel:
    """A memory of three random adapters in float64, with random keys."""
    memory = MemorySettings(test_time="entropy", **settings)
    backbone, draws = create_backbone(BackboneSettings()), torch.Generator().manual_seed(0)
    layout = Layout(backbone.sites(("q", "v")), 2)
    values = 0.5 * torch.randn(ADAPTERS, layout.numel, generator=draws)
    blocks = memory_blocks(memory, backbone, layout.blocks)
    keys = torch.randn(len(blocks), ADAPTERS, backbone.dim + 1, generator=draws)
    keyed = KeyedMemory.from_settings(memory, blocks, backbone.dim, keys)
    model = MemoryModel(backbone, AdapterValues.from_flat(values, layout, 1.0), keyed, memory)
    return model.double().requires_grad_(False)


def say(features: Tensor, weights: Tensor) -> Tensor:
    """Probabilities in float64, of features and a little of weights."""
    draws = torch.Generator().manual_seed(2)
    of_features = torch.randn(features.shape[1], 5, generator=draws, dtype=torch.float64)
    of_weights = torch.randn(ADAPTERS, 5, generator=draws, dtype=torch.float64)
    return (features @ of_features / 16 + weights @ of_weights).softmax(dim=-1)


def pixels(model: MemoryModel, count: int) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    size = model.backbone.image_size
    images = torch.randint(0, 256, (count, size, size, 3), generator=draws, dtype=torch.uint8)
    return model.backbone.preprocess(images).double()


def entropies(model: MemoryModel, one: Tensor, offset: Tensor | None) -> Tensor:
    with torch.no_grad():
        features, coefficients = model.mixed(one, model.look(model.backbone, one), offset)
        probabilities = say(features, coefficients.mean(dim=1))
    return torch.special.entr(probabilities).sum(dim=1)


def twin(model: MemoryModel, one: Tensor) -> Tensor:
    """Offsets (1, memories, t) of one image, by differences instead of gradients."""
    memories, step = len(model.memory.blocks), 1e-5
    at = torch.zeros(1, memories, ADAPTERS, dtype=torch.float64)
    tried = [at]
    for _ in range(model.settings.test_steps):
        slope = torch.zeros_like(at)
        for place in np.ndindex(*at.shape):
            away = torch.zeros_like(at)
            away[place] = step
            above, below = entropies(model, one, at + away), entropies(model, one, at - away)
            slope[place] = (above - below).item() / (2 * step)
        at = at - model.settings.test_lr * slope / slope.norm()
        tried.append(at)
    return min(tried, key=lambda offset: entropies(model, one, offset).item())


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("separation", ["softmax", "identity"])
def test_steps_go_down_the_entropy_of_each_image(scope, separation):
    model = made(scope=scope, separation=separation, test_steps=2, test_lr=0.3)
    images = pixels(model, 3)
    found = settled(model, say, images)
    assert found is not None
    assert found.shape == (3, len(model.memory.blocks), ADAPTERS)
    for place in range(3):
        one = images[place : place + 1]
        alone = settled(model, say, one)  # what else is in the batch does not matter
        assert torch.allclose(found[place], alone[0], rtol=0, atol=1e-5)
        assert torch.allclose(found[place].double(), twin(model, one)[0], rtol=0, atol=1e-4)
    before, after = entropies(model, images, None), entropies(model, images, found.double())
    assert bool((after <= before).all())
    assert bool((after < before - 1e-3).any())
    still = entropies(model, images, torch.zeros_like(found))
    assert torch.allclose(still, before, rtol=0, atol=1e-12)


def test_a_step_that_is_too_long_is_not_taken():
    model = made(scope="model", separation="identity", test_steps=1, test_lr=300.0)
    images = pixels(model, 6)
    found = settled(model, say, images)
    before, after = entropies(model, images, None), entropies(model, images, found.double())
    assert bool((after <= before).all())


def test_shares_stay_shares_of_one():
    model = made(scope="block", separation="topk", topk=2, test_lr=5.0)
    images = pixels(model, 4)
    _, coefficients = model.mixed(
        images, model.look(model.backbone, images), settled(model, say, images)
    )
    assert torch.allclose(coefficients.sum(dim=-1), torch.ones(()).double())
    assert bool((coefficients >= 0).all())
    assert bool(((coefficients > 0).sum(dim=-1) <= 2).all())  # what is cut stays cut


def test_entropy_bears_classes_that_no_head_saw():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    entropy = entropy_of(logits.softmax(dim=1))
    assert entropy.item() == pytest.approx(0.5822, abs=1e-4)
    (slope,) = torch.autograd.grad(entropy.sum(), logits)
    assert bool(slope.isfinite().all())


def test_a_memory_says_the_same_wherever_it_is_asked_and_needs_no_new_learning(learned_copy):
    """Consolidated again with another reading; keys and adapters stay as they are."""
    # Closed-form keys are sure of these digits, and no step would move what is all or nothing.
    soft = learned_copy.config.memory.model_copy(update={"beta": 0.01})
    plain = Mira.open(learned_copy.config.model_copy(update={"memory": soft}), seed=0)
    plain.consolidate()
    images = plain.workspace.task("2").test.images[:12]
    snapshot = plain.snapshot()
    _, model, head = snapshot.consolidated()
    before, weights = Measure(plain.workspace).recall(model, head, images)
    changed = soft.model_copy(update={"test_time": "entropy", "test_steps": 2})
    mira = Mira.open(plain.config.model_copy(update={"memory": changed}), seed=0)
    mira.consolidate()
    now = mira.snapshot()
    assert torch.equal(now.consolidated()[1].memory.keys(), model.memory.keys())
    measure = Measure(mira.workspace)
    _, moving, head = now.consolidated()
    after, moved = measure.recall(moving, head, images)
    assert not torch.allclose(weights, moved)
    old, new = (entropy_of(head.probabilities(scores)) for scores in (before, after))
    assert bool((new <= old + 1e-5).all())
    assert float(new.mean()) < float(old.mean())
    out = mira.attach()(torch.from_numpy(np.array(images)))
    expected = head.probabilities(after)
    assert torch.allclose(out.probabilities, expected, rtol=0, atol=1e-4)
    with torch.inference_mode():
        again = settled(
            moving, says(head), moving.backbone.preprocess(torch.from_numpy(np.array(images)))
        )
    assert again is not None
    still = settled(
        model, says(head), moving.backbone.preprocess(torch.from_numpy(np.array(images)))
    )
    assert still is None  # without the setting nothing moves: the passes are those of before


def test_a_program_has_no_gradients(learned_copy, tmp_path):
    changed = learned_copy.config.memory.model_copy(update={"test_time": "entropy"})
    mira = Mira.open(learned_copy.config.model_copy(update={"memory": changed}), seed=0)
    mira.consolidate()
    with pytest.raises(ConfigError, match="no gradients") as told:
        export_model(mira.config.store, tmp_path / "p.pt2")
    assert "memory.test_time=none" in str(told.value)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"stream__setting": "trace", "stream__source": "text_cl5"}, "on a stream of texts"),
        ({"memory__routing": "lda"}, "under memory.routing lda"),
        ({"memory__separation": "max"}, "under memory.separation max"),
    ],
)
def test_what_cannot_move_is_refused(values, what, tmp_path):
    config = small_config(
        tmp_path, memory__test_time="entropy", stream__order=None, head__kind="lda", **values
    )
    with pytest.raises(ConfigError, match=what) as told:
        open_method(config, seed=0)
    assert "--set memory." in str(told.value)


def test_a_plan_says_the_passes_of_the_steps(tmp_path):
    config = small_config(tmp_path, memory__test_time="entropy", memory__test_steps=4)
    assert Mira.open(config, seed=0).cost(numbers=1, parameters=0, tokens=0)["test_steps"] == 4
    assert Mira.open(small_config(tmp_path), seed=0).cost(numbers=1, parameters=0, tokens=0)[
        "test_steps"
    ] == (0)
