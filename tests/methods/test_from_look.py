"""Adapters that begin where the memory looks: one pass, beside the look run by hand before it."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

import memtool
from memtool.adapters.layout import Layout, sites_of
from memtool.adapters.recalls import every, given_for_each
from memtool.adapters.values import AdapterValues
from memtool.backbones import create_backbone
from memtool.backbones.answering import without_answers
from memtool.backbones.causal_lm import PAD, CausalLM
from memtool.backbones.interface import FrozenModel
from memtool.config import resolve
from memtool.errors import AlreadyExistsError, ConfigError
from memtool.experiments.plan import plan
from memtool.learning.looks import PromptLook
from memtool.memories.keyed import KeyedMemory
from memtool.methods import open_method
from memtool.methods.mira.look import ImageLook
from memtool.methods.mira.method import Mira
from memtool.methods.mira.prompts import PromptMemory
from memtool.methods.mira.recall import MemoryModel, features_and_queries
from memtool.methods.routed.memory import Routing
from memtool.program import export_model
from memtool.remembered import remembered
from memtool.sections import MemorySettings
from memtool.settings import BackboneSettings, TextSettings
from memtool_cli.plan import _image_cost
from memtool_stores import MemoryStore
from tests.backbones.tiny_lm import tiny_model, tiny_tokenizer
from tests.cli.conftest import inside
from tests.methods.conftest import learn, small_config
from tests.methods.facts import settings_of, write_facts

BACKBONES = {
    "nano": BackboneSettings(),
    "convnet": BackboneSettings(
        name="timm:test_convnext", weights="random", image_size=32, targets=("conv", "fc1")
    ),
}


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def behind(
    backbone: FrozenModel,
    targets: tuple[str, ...],
    begin: int,
    count: int = 3,
    size: float = 0.1,
) -> AdapterValues:
    """Random adapters in the blocks from `begin` on, in float64."""
    sites = tuple(site for site in backbone.sites(targets) if site.block >= begin)
    layout = Layout(sites, 2)
    return AdapterValues.from_flat(drawn(count, layout.numel, seed=1) * size, layout, 2.0)


def model_of(name: str, settings: MemorySettings, begin: int) -> MemoryModel:
    """A memory of three random adapters, all of it in float64."""
    backbone = create_backbone(BACKBONES[name]).double()
    values = behind(backbone, BACKBONES[name].targets, begin)
    look = ImageLook(backbone, settings)
    width = sum(backbone.block_dim(block) for block in look.blocks)
    at = settings.look_at_block
    blocks = (backbone.depth if at is None else at,)
    keys = drawn(1, 3, width + 1, seed=2)
    memory = KeyedMemory.from_settings(
        settings, blocks, width, keys, prefix_tokens=backbone.prefix_tokens
    )
    return MemoryModel(backbone, values, memory.double(), settings, look)


def images(count: int = 4) -> Tensor:
    return (drawn(count, 32, 32, 3, seed=3) * 60 + 128).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("mix", ["delta", "params"])
@pytest.mark.parametrize("separation", ["softmax", "topk", "affine"])
@pytest.mark.parametrize(
    ("name", "look_at", "begin"),
    [
        ("nano", 2, 2),
        ("nano", 0, 0),
        ("nano", 1, 2),  # the look may end earlier
        ("nano", ("block:2", "block:1"), 2),
        ("nano", ("blocks",), 3),
        ("convnet", 2, 2),
    ],
)
def test_one_pass_is_the_look_and_then_the_mixture(name, look_at, begin, separation, mix) -> None:
    settings = MemorySettings(look_at=look_at, separation=separation, mix=mix)
    model = model_of(name, settings, begin)
    backbone, (at,) = model.backbone, model.memory.blocks
    pixels = backbone.preprocess(images()).double()
    parts = []
    for block in [int(place[6:]) for place in model.look.places]:
        hidden = backbone.hidden(pixels, block)
        parts.append(
            torch.nn.functional.layer_norm(
                hidden[:, backbone.prefix_tokens :].mean(dim=1), hidden.shape[-1:]
            )
        )
    asked = torch.cat(parts, dim=1)
    weights = model.memory[at].coefficients(asked)
    slow = backbone.features(pixels, given_for_each(model.values, weights[:, None], mix))
    features, coefficients, queries = model.seen(pixels)
    assert weights.std() > 1e-3
    torch.testing.assert_close(coefficients[:, 0], weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(queries[:, 0], asked, rtol=0, atol=1e-12)
    torch.testing.assert_close(features, slow, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        backbone.features(pixels, model.recall(pixels)), slow, rtol=0, atol=1e-10
    )


def test_gradients_are_those_of_the_two_passes() -> None:
    model = model_of("nano", MemorySettings(look_at=2, query="linear"), 2)
    (at,) = model.memory.blocks
    here = model.memory[at]
    pixels = model.backbone.preprocess(images()).double()
    learned = [here.keys, *here.query.parameters(), *model.values.parameters()]
    for parameter in learned:
        parameter.requires_grad_(True)
    goal = drawn(4, model.backbone.dim, seed=5)
    fast = (model.seen(pixels)[0] * goal).sum()
    query = ImageLook(model.backbone, model.settings)(model.backbone, pixels, begin=0).query
    assert query is not None  # with adapters from the first block on the look runs ahead
    weights = here.coefficients(query)
    slow = (
        model.backbone.features(pixels, given_for_each(model.values, weights[:, None], "delta"))
        * goal
    ).sum()
    for one, other in zip(
        torch.autograd.grad(fast, learned), torch.autograd.grad(slow, learned), strict=True
    ):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_every_block_runs_once_and_those_before_the_look_keep_nothing(monkeypatch) -> None:
    model = model_of("nano", MemorySettings(look_at=2), 2)
    model.values.requires_grad_(True)
    ran: list[tuple[int, bool, bool]] = []
    for number, block in enumerate(model.backbone.blocks):

        def run(x, *given, _number=number, _inner=block.forward):
            out = _inner(x, *given)
            ran.append((_number, x.requires_grad, out.requires_grad))
            return out

        monkeypatch.setattr(block, "forward", run)
    model.backbone.preprocess(images())
    for recall in (
        lambda pixels: model.recall(pixels),
        lambda _: every(behind(model.backbone, ("q", "v"), 2, 1).requires_grad_(True)),
    ):
        ran.clear()
        pixels = model.backbone.preprocess(images()).double()
        model.backbone.features(pixels, recall(pixels))
        assert ran == [
            (0, False, False),
            (1, False, False),
            (2, False, True),
            (3, True, True),
        ]
    ran.clear()
    look = ImageLook(model.backbone, model.settings)
    own = behind(model.backbone, ("q", "v"), 2, 1)
    counted = features_and_queries(
        model.backbone, model.memory, look, every(own), images(), own.begin
    )
    assert len(ran) == model.backbone.depth
    ahead = features_and_queries(model.backbone, model.memory, look, every(own), images())
    torch.testing.assert_close(counted, ahead, rtol=0, atol=0)
    assert len(ran) == 2 * model.backbone.depth + 2


def test_prompts_are_looked_at_on_the_way_to_their_answers() -> None:
    """Loss, weights and generated answers are those of a look that runs ahead."""
    lm = CausalLM(
        tiny_model(num_hidden_layers=4), tiny_tokenizer(), "tiny", TextSettings()
    ).double()
    values = behind(lm, ("q", "v"), 2, size=0.6)
    look = PromptLook(("block:2", "tokens", "block:1"))
    width = look.width(lm)
    kept = [{"key": drawn(width, seed=seed)} for seed in (6, 7, 8)]

    def rule(looks: Tensor, known) -> Tensor:
        keys = torch.stack([one["key"].to(looks) for one in known])
        return (looks @ keys.T / width**0.5).softmax(dim=1)

    routing = Routing(values, [0, 1, 2], kept, rule, look=look).double()
    made = lm.encode(["one plus one", "a", "what is it"], ["two", "b c d", "rain"])
    prompts = without_answers(made.tokens, made.answers)
    weights = routing.weighed(lm, prompts)
    assert weights.std(dim=0).max() > 1e-2
    recall, told = routing.asked(lm, prompts)
    loss = lm.answer_loss(made.tokens, made.answers, recall)
    ahead = lm.answer_loss(made.tokens, made.answers, routing.recall(weights))
    torch.testing.assert_close(loss, ahead, rtol=0, atol=1e-6)  # the rule works in float32
    recalled = weakref.ref(recall)
    del recall
    assert recalled() is None  # weights that are asked for later hold no adapters
    torch.testing.assert_close(told(), weights, rtol=0, atol=1e-6)
    asked = lm.encode(["one plus one", "a", "what is it"]).tokens
    slow = lm.generate(asked, routing.recall(routing.weighed(lm, asked)), most=6)
    assert lm.generate(asked, routing.recalled(lm, asked), most=6) == slow
    assert lm.generate(asked, None, most=6) != slow
    rows = asked.repeat_interleave(2, dim=0)
    beams = lm.generate(asked, routing.recall(routing.weighed(lm, rows)), most=6, beams=2)
    assert lm.generate(asked, routing.recalled(lm, rows), most=6, beams=2) == beams
    assert (asked == PAD).any()


# A memory of its own -----------------------------------------------------------------------------


FROM_LOOK = {"adapter__blocks": "from-look", "memory__look_at": 1}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    learn(Mira.open(small_config(folder, **FROM_LOOK), seed=0), tasks=2)
    return folder


def begun_in(folder: Path, **changes: object) -> Mira:
    mira = open_method(small_config(folder, **{**FROM_LOOK, **changes}), seed=0)
    assert isinstance(mira, Mira)
    return mira


def test_a_memory_holds_and_says_the_blocks_of_its_adapters(begun: Path) -> None:
    mira = begun_in(begun)
    work = mira.workspace
    assert work.layout.blocks == (1, 2, 3)
    names = [segment.name for segment in work.store.space.layout.segments]
    assert names[0].startswith("blocks.1.")
    assert not any(name.startswith("blocks.0.") for name in names)
    assert remembered(work.store)["adapter.blocks"] == "from-look"
    record = mira.evaluate()
    assert record.metrics.rows[0].metrics["faa"] > 0.5
    assert record.run.configuration["adapter"]["blocks"] == "from-look"


def test_a_memory_answers_as_its_two_passes_and_as_its_program(begun: Path, tmp_path: Path) -> None:
    mira = begun_in(begun)
    _, model, head = mira.snapshot().consolidated()
    shown = torch.from_numpy(mira.workspace.stream.tasks[0].test.images[:5].copy())
    (at,) = model.memory.blocks
    pixels = model.backbone.preprocess(shown)
    weights = model.memory[at].coefficients(
        model.memory[at].query.bare(model.backbone.hidden(pixels, 1))
    )
    features = model.backbone.features(
        pixels, given_for_each(model.values, weights[:, None], "delta")
    )
    slow = head.probabilities(head(features, weights))
    memory = memtool.load(str(begun / "memory"))
    said = memory.attach()(shown).probabilities
    torch.testing.assert_close(said, slow, rtol=1e-4, atol=1e-5)
    program = tmp_path / "memory.pt2"
    export_model(str(begun / "memory"), program)
    found = torch.export.load(program).module()(pixels)
    torch.testing.assert_close(found["probabilities"], slow, rtol=1e-4, atol=1e-5)


def test_a_plan_says_that_no_pass_runs_ahead(tmp_path: Path) -> None:
    began = plan(small_config(tmp_path, **FROM_LOOK), seed=0, verb="run")
    whole = plan(small_config(tmp_path, memory__look_at=1), seed=0, verb="run")
    assert (began["cost"]["frozen"], whole["cost"]["frozen"]) == (0, 0.25)
    assert began["parameters_per_adapter"] * 4 == whole["parameters_per_adapter"] * 3
    assert (began["adapters_from"], whole["adapters_from"]) == (1, 0)
    assert dict(_image_cost(began["cost"]))["passes of an image"] == "recalled 1"


def test_adapters_in_other_blocks_are_others(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExistsError, match="other settings"):
        begun_in(begun, adapter__blocks="all").adapt("1")
    with pytest.raises(AlreadyExistsError, match="other settings"):
        begun_in(begun, memory__look_at=2).adapt("1")
    for changes, words, remedy in (
        ({"adapter__blocks": "all"}, "adapter.blocks all", "adapter.blocks=from-look"),
        ({"memory__look_at": 2}, "memory.look_at 2", "memory.look_at=1"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            begun_in(begun, **changes).evaluate()
        assert remedy in str(refused.value.remedy)
    same_in_other_words = begun_in(begun, memory__look_at=("block:1",))
    assert same_in_other_words.workspace.store.head()
    old = small_config(tmp_path, **{**FROM_LOOK, "store": str(tmp_path / "old")})
    learn(Mira.open(small_config(tmp_path, store=str(tmp_path / "old")), seed=0), tasks=1)
    with pytest.raises(ConfigError, match="made with all"):
        Mira.open(old, seed=0).snapshot()


def test_a_memory_of_before_has_adapters_in_all_blocks(learned_copy: Mira, monkeypatch) -> None:
    """Its versions do not name the setting."""
    store = learned_copy.workspace.store
    said = remembered(store)
    del said["adapter.blocks"]
    monkeypatch.setattr("memtool.workspace.remembered", lambda _: said)
    fresh = Mira.open(learned_copy.config, seed=0)
    assert fresh.snapshot().model is not None
    assert "blocks" not in fresh.config.adapter.decides()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory__look_at": "final"}, "memory.look_at final"),
        ({"memory__look_at": ("block:1", "final")}, "memory.look_at block:1,final"),
        ({"memory__scope": "block"}, "memory.scope block"),
        ({"memory__look_under": "first-adapter"}, "memory.look_under first-adapter"),
        ({"method": "moram", "head__kind": "grown"}, "method moram"),
        ({"method": "modulation", "stream__setting": "til"}, "method modulation"),
    ],
)
def test_no_adapter_begins_where_nothing_looks(tmp_path: Path, changes, words) -> None:
    config = small_config(tmp_path, adapter__blocks="from-look", **changes)
    with pytest.raises(ConfigError, match=f"adapter.blocks from-look .*{words}") as refused:
        open_method(config, seed=0)
    assert "adapter.blocks=all" in str(refused.value.remedy)


def test_a_look_behind_all_targets_leaves_no_adapter(tmp_path: Path) -> None:
    mira = Mira.open(small_config(tmp_path, adapter__blocks="from-look", memory__look_at=9), seed=0)
    with pytest.raises(ConfigError, match="a look at block 9") as refused:
        _ = mira.workspace.layout
    assert refused.value.expected == "a look at one of the blocks 0 to 3"


def test_a_store_alone_tells_the_blocks_of_its_layout(begun: Path) -> None:
    segments = MemoryStore.open(str(begun / "memory")).space.layout.segments
    layout = begun_in(begun).workspace.layout
    assert sites_of((one.name, one.shape) for one in segments) == layout.sites
    asked = ("show", "--store", str(begun / "memory"))
    shown = [inside(begun, os.environ, *asked, *more) for more in ((), ("--json",))]
    assert "q,v from blocks.1 on" in shown[0].stdout
    assert json.loads(shown[1].stdout)["adapters_from"] == "blocks.1"


def test_texts_learn_and_answer_with_one_pass(tmp_path: Path, monkeypatch) -> None:
    write_facts(tmp_path)
    values = settings_of(tmp_path, tmp_path) | {
        "engine.device": "cpu",
        "adapter.blocks": "from-look",
        "memory.look_at": ("block:1", "tokens"),
        "memory.scope": "model",
        "train.epochs": 2,
    }
    config = resolve(preset="mira-trace", overrides=values, ambient=False).config
    said = plan(config, seed=0, verb="run")
    method = open_method(config, seed=0)
    assert isinstance(method, PromptMemory)
    for task in method.workspace.stream.tasks[:2]:
        method.learn(task)
    method.consolidate()
    assert method.workspace.layout.blocks == (1,)
    assert (said["adapters_from"], said["cost"]["passes"]) == (1, 0)
    assert said["parameters_per_adapter"] == method.workspace.layout.numel
    runs: list[object] = []
    inner = CausalLM.hidden

    def hidden(self, *given, **more):
        runs.append(given)
        return inner(self, *given, **more)

    monkeypatch.setattr(CausalLM, "hidden", hidden)
    texts = memtool.load(config.store).attach()
    answers, weights = texts.answered(["after a comes", "3 and 1 is"], most=1)
    assert len(runs) == 1  # the prompt runs once, and its last state is that of the answer
    assert weights.argmax(dim=1).tolist() == [0, 1]
    assert len(answers) == 2
