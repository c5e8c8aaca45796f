"""Prompts looked at under the first task's adapters, beside what `peft` makes of the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import memtool
from memtool.adapters.recalls import equally, every
from memtool.errors import ChangedMeanwhileError, ConfigError, MismatchError
from memtool.experiments.plan import plan
from memtool.learning.looks import PromptLook, looks_of
from memtool.methods.about import said_by
from memtool.methods.forget import chosen, forget, looked_under
from memtool.methods.merge import merge
from memtool.methods.mira import collection
from memtool.methods.mira.moments import PromptState
from memtool.methods.mira.prompts import PromptMemory
from memtool_cli.plan import _cost
from tests.methods.facts import FACTS, write_facts
from tests.methods.test_collection import PROMPTS, SHAPES, opened, write_adapter, write_prompts
from tests.methods.test_prompt_scopes import slow_scores, softmax

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)

FIRST: dict[str, Any] = {
    "memory.look_at": ("final", "block:1", "tokens"),
    "memory.look_under": "first-adapter",
    "memory.beta": 0.02,  # so that no weight is nearly 0 or 1
}
BOTH = {**FIRST, "memory.look_under": "both"}
NAMES = ("letters", "sums", "turned")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, three adapters of it in `adapters`, and prompts of each."""
    folder = write_facts(tmp_path_factory.mktemp("under"))
    for seed, (name, shape) in enumerate(SHAPES.items()):
        write_adapter(folder / "model", folder / "adapters" / name, seed, **shape)
    write_prompts(folder / "prompts.jsonl", PROMPTS)
    return folder


def filled(place: Path, where: Path, *names: str, **changes: Any) -> PromptMemory:
    """A memory of these adapters in their order, with keys."""
    where.mkdir(exist_ok=True)
    method = opened(place, where, **changes)
    collect(method, place, where, *names)
    method.consolidate()
    return method


def collect(method: PromptMemory, place: Path, where: Path, *names: str) -> None:
    file = write_prompts(where / "asked.jsonl", {name: PROMPTS[name] for name in names})
    method.collect([str(place / "adapters" / name) for name in names], file)


def merged_model(place: Path, name: str | None) -> torch.nn.Module:
    """What `transformers` reads; the adapter of this name added to its weights by `peft`."""
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    if name is None:
        return model
    return PeftModel.from_pretrained(model, place / "adapters" / name).merge_and_unload()


def slow_look(method: PromptMemory, models: list[torch.nn.Module], prompt: str) -> np.ndarray:
    """final, block:1 and tokens of a prompt, in every model, one after another."""
    tokens = method.workspace.backbone.encode([prompt]).tokens[0]
    parts: list[np.ndarray] = []
    for number, model in enumerate(models):
        with torch.no_grad():
            out = model(input_ids=tokens[None], output_hidden_states=True)
        final, block = out.hidden_states[-1][0].mean(0), out.hidden_states[1][0].mean(0)
        block = (block - block.mean()) / (block.var(unbiased=False) + 1e-5).sqrt()
        parts += [final.double().numpy(), block.double().numpy()]
        if not number:
            words = model.get_input_embeddings().weight.shape[0]
            shares = np.bincount(tokens, minlength=words) / len(tokens)
            parts.append(np.sqrt(words * shares))
    return np.concatenate(parts)


@pytest.mark.parametrize(("changes", "under"), [(FIRST, ["sums"]), (BOTH, [None, "sums"])])
def test_weights_are_those_of_looks_at_merged_models(
    place: Path, tmp_path: Path, changes: dict[str, Any], under: list[str | None]
) -> None:
    method = filled(place, tmp_path / "m", "sums", "letters", "turned", **changes)
    models = [merged_model(place, name) for name in under]
    view = method.workspace.store.view()
    state = PromptState.load(view)
    assert state is not None
    assert [view.get(id).name for id in state.first] == ["sums"]
    look = method.look_in(view)
    groups = []
    for record in view.adapters:
        slow = np.stack([slow_look(method, models, one) for one in PROMPTS[record.name]])
        fast = looks_of(method.workspace, PROMPTS[record.name], look)
        assert fast.shape[1] == method.look.width(method.workspace.backbone)
        np.testing.assert_allclose(fast, slow, rtol=1e-3, atol=2e-4)
        groups.append([slow])
    scores, asked = slow_scores(groups), ["after 7 and", "turn ab:", "6 and 1 is"]
    expected = [softmax(0.02 * scores(slow_look(method, models, one))) for one in asked]
    loaded = memtool.load(method.workspace.store_path).attach()
    for model in (method.attach(), loaded):
        np.testing.assert_allclose(model.weights(asked), expected, atol=2e-3)
    answers, weights = loaded.answered(asked)
    np.testing.assert_allclose(weights, expected, atol=2e-3)
    assert len(answers) == 3
    frozen = filled(
        place,
        tmp_path / "f",
        "sums",
        "letters",
        "turned",
        **{**changes, "memory.look_under": "frozen"},
    )
    assert not np.allclose(frozen.attach().weights(asked), expected, atol=1e-2)
    found = method.novelty(view, PROMPTS["letters"][0])
    assert found is not None
    assert found > 0


def test_a_later_import_is_looked_at_under_the_same(place: Path, tmp_path: Path) -> None:
    whole = filled(place, tmp_path / "whole", *NAMES, **FIRST)
    turn = filled(place, tmp_path / "turn", "letters", **FIRST)
    for name in ("sums", "turned"):
        collect(turn, place, tmp_path, name)
        turn.consolidate()
    mine, theirs = (one.workspace.store.view().keys() for one in (turn, whole))
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)
    head = turn.workspace.store.head()
    assert turn.consolidate().unchanged
    assert turn.workspace.store.head() == head
    other = opened(place, tmp_path / "turn", **BOTH)
    with pytest.raises(ConfigError, match=r"(?s)look_under is both.*look_under=first-adapter"):
        other.consolidate()


def test_one_adapter_is_itself_and_several_are_in_equal_parts(place: Path, tmp_path: Path) -> None:
    method = filled(place, tmp_path / "m", *NAMES, **FIRST)
    stock = method.values_in(method.workspace.store.view(), method.workspace.store.view().adapters)
    lm = method.workspace.backbone
    tokens = lm.encode(["turn ab:"]).tokens
    with torch.no_grad():
        one = lm.hidden(tokens, equally(stock.take([1]), "delta"))
        torch.testing.assert_close(one, lm.hidden(tokens, every(stock.take([1]))))
        twice = lm.hidden(tokens, equally(stock.take([1, 1]), "delta"))
        torch.testing.assert_close(twice, one, rtol=1e-4, atol=1e-5)
    with pytest.raises(MismatchError, match="none is there"):
        replace(method.look, first=None)(lm, tokens)


def test_adapters_trained_here_are_looked_under_and_forgotten(place: Path, tmp_path: Path) -> None:
    method = opened(place, tmp_path, **{**FIRST, "train.epochs": 1})
    for task in method.workspace.stream.tasks:
        method.learn(task)
        method.task_written(task)
    store = method.workspace.store
    view = store.view()
    state = PromptState.load(view)
    assert state is not None
    assert state.first == (view.adapters[0].id,)
    assert [looked_under(view, chosen(view, [n])) for n in "123"] == [True, False, False]
    # A later task may go, and the look stays.
    forget(store, ["2"])
    assert PromptState.load(store.view()).first == state.first
    # Without the first all is counted again, under the next.
    forget(store, ["1"])
    view = store.view()
    assert view.keys() is None
    assert not any(name.startswith(("routing.", "prompt-")) for name in view.blobs())
    method.consolidate()
    again = PromptState.load(store.view())
    assert again.first == again.adapters == (store.view().adapters[0].id,)


def test_a_collection_without_its_first_is_asked_for_its_prompts(
    place: Path, tmp_path: Path
) -> None:
    method = filled(place, tmp_path / "m", *NAMES, **FIRST)
    forget(method.workspace.store, ["letters"])
    with pytest.raises(memtool.MemtoolError, match=r"(?s)no prompts are known.*import DIR"):
        method.consolidate()
    collect(method, place, tmp_path, "sums", "turned")
    method.consolidate()
    alone = filled(place, tmp_path / "alone", "sums", "turned", **FIRST)
    mine, theirs = (one.workspace.store.view().keys() for one in (method, alone))
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_two_memories_that_began_alike_are_joined(place: Path, tmp_path: Path) -> None:
    whole = filled(place, tmp_path / "whole", *NAMES, **FIRST)
    mine = filled(place, tmp_path / "mine", "letters", "sums", **FIRST)
    merge(mine.workspace.store_path, whole.workspace.store_path, ["turned"])
    mine.consolidate()
    keys = [one.workspace.store.view().keys() for one in (mine, whole)]
    np.testing.assert_allclose(*keys, rtol=1e-3, atol=1e-4)
    new = str(tmp_path / "new")
    with pytest.raises(MismatchError, match="under 'letters', which is not taken along"):
        merge(new, whole.workspace.store_path, ["turned"])
    other = filled(place, tmp_path / "other", "turned", **FIRST)
    with pytest.raises(MismatchError, match="different first adapters"):
        merge(mine.workspace.store_path, other.workspace.store_path)


def test_another_first_adapter_meanwhile_is_noticed(
    place: Path, tmp_path: Path, monkeypatch
) -> None:
    method, moments = opened(place, tmp_path, **FIRST), collection._moments

    def slow(*given: Any) -> bytes:
        if not method.workspace.has_store:
            monkeypatch.setattr(collection, "_moments", moments)
            (tmp_path / "b").mkdir()
            collect(opened(place, tmp_path, **FIRST), place, tmp_path / "b", "turned")
        return moments(*given)

    monkeypatch.setattr(collection, "_moments", slow)
    with pytest.raises(ChangedMeanwhileError, match="others than before"):
        collect(method, place, tmp_path, "letters")
    assert [record.name for record in method.workspace.store.view().live] == ["turned"]


def test_a_plan_counts_the_passes(place: Path, tmp_path: Path) -> None:
    passes = {"frozen": (1, 0), "first-adapter": (0, 1), "both": (1, 1)}
    for under, counts in passes.items():
        config = opened(place, tmp_path, **{**FIRST, "memory.look_under": under}).config
        told = plan(config, seed=0, verb="run")["cost"]
        assert (told["passes"], told["first_adapter"]) == counts
    words = dict(_cost(told))["weights of"]
    assert "1 pass of the frozen model over it and 1 pass of the first adapter over it" in words
    made = filled(place, tmp_path / "m", *NAMES, **BOTH)
    assert told["keys_bytes"] == made.workspace.store.view().keys().nbytes


def test_what_was_stored_before_is_looked_at_by_the_frozen_model(
    place: Path, tmp_path: Path
) -> None:
    method = filled(place, tmp_path / "m", *NAMES)
    state = PromptState.load(method.workspace.store.view())
    assert state is not None
    blob = state.model_dump(mode="json")
    assert (blob.pop("look_under"), blob.pop("first")) == ("frozen", [])
    assert PromptState.model_validate(blob) == state
    assert PromptLook.of(method.settings) == method.look


@pytest.mark.parametrize(
    ("changes", "match", "helps"),
    [
        (
            {"memory.scope": "block", "memory.look_at": ("blocks",)},
            "under memory.scope block",
            {"memory.scope": "model"},
        ),
        (
            {"memory.scope": "token", "memory.look_at": ("blocks",)},
            "under memory.scope token",
            {"memory.scope": "model"},
        ),
        (
            {"memory.look_at": ("tokens",)},
            "with memory.look_at tokens",
            {"memory.look_under": "frozen"},
        ),
    ],
)
def test_looks_that_cannot_be(
    place: Path, tmp_path: Path, changes: dict[str, Any], match: str, helps: dict[str, str]
) -> None:
    require, given = said_by("mira").require, {**changes, "memory.look_under": "both"}
    config = opened(place, tmp_path, **FIRST).config

    def changed(values: dict[str, Any]) -> memtool.settings.Config:
        update = {key.partition(".")[2]: value for key, value in values.items()}
        return config.model_copy(update={"memory": config.memory.model_copy(update=update)})

    with pytest.raises(ConfigError, match=match) as error:
        require(changed(given))
    assert error.value.remedy == "--set {}={}".format(*next(iter(helps.items())))
    require(changed({**given, **helps}))


def test_a_block_that_is_not_there_is_refused_before_anything_is_learned(
    place: Path, tmp_path: Path
) -> None:
    method = opened(place, tmp_path, **{"memory.look_at": ("block:9", "tokens")})
    for step in (
        lambda: plan(method.config, seed=0, verb="run"),
        lambda: method.adapt("1"),
        lambda: collect(method, place, tmp_path, "sums"),
    ):
        with pytest.raises(
            ConfigError, match=r"(?s)block 9 of a model of 2.*look_at=blocks,tokens"
        ):
            step()
    assert not method.workspace.has_store
    assert not (method.config.runs / "adapters").exists()
    assert set(FACTS) == {task.name for task in method.workspace.stream.tasks}
