"""What the code of MIRA's authors has as settings: names, old words, bad input, small laws."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memtool.adapters.layout import Layout
from memtool.adapters.lora import init_lora
from memtool.backbones import create_backbone
from memtool.config import find_preset, resolve, with_values
from memtool.engine import Batch, Batches
from memtool.errors import ConfigError, NotFoundError
from memtool.experiments.ablations import ABLATIONS
from memtool.experiments.plan import plan
from memtool.learning.mixup import mixing
from memtool.memories.closed_form import QueryStatistics, same_for_every_input
from memtool.memories.dual_gpm import DualGPM
from memtool.memories.keyed import KeyedMemory, set_centre
from memtool.memories.query import QueryModule
from memtool.memories.separation import FLOOR, floored, normalised
from memtool.memories.similarity import over_memories
from memtool.methods.mira.interference import _keys, _old, _turned
from memtool.methods.mira.keys import Draws, start_keys
from memtool.methods.mira.measure import drift
from memtool.methods.mira.protect import HEAD, Protection
from memtool.methods.mira.sums import Asked
from memtool.sections import ConsolidateSettings, MemorySettings
from memtool.settings import BackboneSettings

PRESETS = ("mira-dg-authors", "mira-cil-authors", "mira-dil-authors")


@pytest.mark.parametrize("name", PRESETS)
def test_the_old_names_name_the_new_ones(name):
    config = resolve(preset=name, environ={}).config
    assert (config.memory.separation, config.memory.mix) == ("normalised", "params")
    old = name.replace("-authors", "-paper")
    with pytest.raises(NotFoundError) as refused:
        find_preset(old)
    assert name in refused.value.remedy
    assert find_preset(refused.value.remedy.split()[-1]).name == name


def test_a_norm_that_was_a_switch_is_read():
    assert MemorySettings.model_validate({"query_norm": True}).query_norm == "layer"
    assert MemorySettings.model_validate({"query_norm": False}).query_norm == "none"
    assert MemorySettings.model_validate({"query_norm": "true"}).query_norm == "layer"
    assert MemorySettings.model_validate({"blocks": ["3", "1"]}).blocks == (1, 3)
    assert MemorySettings.model_validate({"blocks": "all"}).blocks is None


def test_what_met_the_floor_is_known_by_its_sum():
    scores = torch.tensor([[0.3, -0.3 + FLOOR / 2], [0.2, 0.1], [-0.2, 0.2 - FLOOR / 4]])
    found = normalised(scores)
    assert floored(found).tolist() == [True, False, True]
    assert torch.allclose(found[1].sum(), torch.tensor(1.0))
    assert (found[0] * FLOOR - scores[0]).abs().max() < 1e-6
    assert (found[2] * -FLOOR - scores[2]).abs().max() < 1e-6
    assert not floored(normalised(scores[:, :1])).any()


def statistics(constant: bool) -> QueryStatistics:
    generator = torch.Generator().manual_seed(0)
    found = QueryStatistics(2, 6)
    for task in range(2):
        queries = torch.randn(2, 20, 6, generator=generator) + task
        if constant:
            queries[0] = torch.arange(6.0) / 7
        found.add(task, queries)
    return found


def test_keys_in_closed_form_name_the_block_that_is_asked_the_same():
    memory = MemorySettings(scope="block", token="class")
    draws = Draws(0, (1, 2), (0, 1), 7)
    parts = [statistics(constant=True)]
    assert same_for_every_input(parts) == (0,)
    with pytest.raises(ConfigError, match="block 0 is asked the same by every image") as refused:
        start_keys(ConsolidateSettings(), memory, Asked.of(parts), (0, 0), draws)
    assert refused.value.remedy == "--set memory.blocks=1, or --set memory.token=mean"
    assert same_for_every_input([statistics(constant=False)]) == ()
    start_keys(ConsolidateSettings(), memory, Asked.of([statistics(constant=False)]), (0, 0), draws)


def test_uniform_keys_are_drawn_for_task_and_block():
    settings = ConsolidateSettings(keys="uniform")
    memory = MemorySettings(scope="block", key_bias=False)
    keys = start_keys(settings, memory, None, (0, 0, 0), Draws(0, (1,), (0, 1), 6))
    assert keys.shape == (2, 3, 6)
    assert -1 <= keys.min() < -0.5 < 0.5 < keys.max() <= 1
    fewer = start_keys(settings, memory, None, (0, 0), Draws(0, (1,), (0, 1), 6))
    assert torch.equal(fewer, keys[:, :2])


def test_a_centre_is_taken_before_the_query_module():
    module = QueryModule("linear", 4, norm=False, centred=True)
    with torch.no_grad():
        module.g.weight.copy_(2 * torch.eye(4))
        module.centre.copy_(torch.arange(4.0))
    hidden = torch.randn(3, 2, 4)
    assert torch.equal(module.bare(hidden), 2 * (hidden[:, 0] - torch.arange(4.0)))
    assert "centre" in module.state_dict()
    assert "centre" not in QueryModule("linear", 4).state_dict()
    settings = MemorySettings(centre="first-task", token="class")
    memory = KeyedMemory.from_settings(settings, (2, 5), 4, torch.zeros(2, 1, 5))
    set_centre(memory, torch.ones(2, 4))
    assert torch.equal(memory[5].query.centre, torch.ones(4))


def test_projected_gradients_end_where_they_should():
    past = DualGPM(4)
    past.update(torch.eye(4)[:2], 1.0)
    protection = Protection({"1.keys": past, HEAD: past})
    settings = MemorySettings(key_bias=False)
    memory = KeyedMemory.from_settings(settings, (1,), 4, torch.randn(1, 3, 4))
    head = torch.nn.Parameter(torch.randn(1, 2, 4))
    end = protection.project_gradients(memory, head)
    (memory[1].keys.sum() + head.sum()).backward()
    for gradient in (memory[1].keys.grad, head.grad):
        assert torch.allclose(gradient[..., :2], torch.zeros(()), atol=1e-6)
        assert torch.allclose(gradient[..., 2:], torch.ones(()), atol=1e-6)
    end()
    memory[1].keys.grad = None
    memory[1].keys.sum().backward()
    assert torch.equal(memory[1].keys.grad, torch.ones(3, 4))


def test_adapters_that_differ_by_start_see_every_sample():
    inputs, labels = np.arange(10)[:, None], np.arange(10)
    plan = Batches(inputs, labels, 4, 1, 0, groups=3, bootstrap=False)
    seen = [batch for step in range(len(plan)) for batch in plan.micro_batches(step, 1)]
    groups = torch.cat([batch.labels.view(3, -1) for batch in seen], dim=1)
    assert [sorted(group) for group in groups.tolist()] == [list(range(10))] * 3
    assert len({tuple(group) for group in groups.tolist()}) == 3
    assert all(bool((batch.weights == 1).all()) for batch in seen)


def test_mixup_of_a_class_stays_in_it():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2] * 2)
    batch = Batch(torch.zeros(16, 1), labels, labels, torch.ones(16), 5)
    drawn = mixing(batch, 0.4, 2, of_class=True)
    assert torch.equal(labels[drawn.partners], labels)
    assert not torch.equal(drawn.partners, torch.arange(16))
    assert bool((drawn.partners[:8] < 8).all())


def test_kaiming_draws_are_within_the_root_of_the_inputs():
    layout = Layout(create_backbone(BackboneSettings()).sites(("q", "v")), 2)
    values = init_lora(layout, 2, generator=torch.Generator().manual_seed(0), draw="kaiming")
    for site in layout.sites:
        a = layout.unflatten(values)[f"{site.name}.lora_A"] * site.in_features**0.5
        assert 0.8 < a.abs().max() <= 1


@pytest.mark.parametrize("preset", PRESETS)
def test_the_variants_of_the_ablation_can_be_had(preset):
    small = {"backbone.name": "nano", "backbone.image_size": 32}
    config = resolve(preset=preset, overrides=small, environ={}).config
    variants = ABLATIONS["authors"].variants(config)
    assert {"keys-frozen", "as-configured", "closed-form"} <= variants.keys()
    assert variants["closed-form"]["memory.blocks"] == (1, 2, 3)
    assert ("centred" in variants) == (preset != "mira-dg-authors")
    with pytest.raises(ConfigError, match=r"memory\.scope model"):
        ABLATIONS["authors"].variants(resolve(preset="mira-dil", environ={}).config)


def test_keys_turn_as_they_are_asked_when_a_new_one_comes():
    settings = MemorySettings(key_norm="memories", key_bias=False)
    all_keys = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def seen(count: int) -> torch.Tensor:
        memory = KeyedMemory.from_settings(settings, (1, 2), 4, all_keys[:, :count])
        whole = (None, SimpleNamespace(memory=memory), None)
        return _keys(SimpleNamespace(consolidated=lambda: whole, records=range(count)))

    assert torch.equal(seen(3)[1, :, 0], over_memories(all_keys[1]))
    assert _turned(seen(2), seen(3)[:, :2]) > 1  # though none of them learned


def test_inputs_without_any_weight_have_no_drift():
    before, after = torch.zeros(2, 1, 1), torch.ones(2, 1, 2)
    keys = torch.ones(1, 2, 1, 3)
    found = _old((before, keys[:, :1]), after, keys, [0], 0.5)
    assert (found.coefficient_drift, found.new_coefficients, found.new_share) == (None, None, 0.5)
    assert drift([before], [after]) == {}
    there = torch.full((2, 1, 1), 0.5)
    assert drift([before, there], [after, after]) == drift([there], [after])


def test_a_memory_in_a_block_that_is_not_there_is_refused_before_anything_learns(tmp_path):
    values = {
        "memory.scope": "block",
        "memory.blocks": (1, 2, 9),
        "store": str(tmp_path / "memory"),
    }
    with pytest.raises(ConfigError, match=r"memory\.blocks names 9") as refused:
        plan(with_values(resolve().config, values, "a test"), seed=0, verb="run")
    assert refused.value.remedy == "--set memory.blocks=1,2"
    cured = with_values(resolve().config, values | {"memory.blocks": (1, 2)}, "a test")
    assert plan(cured, seed=0, verb="run")["setting"] == "dil"
