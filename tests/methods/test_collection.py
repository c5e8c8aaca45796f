"""A collection of LoRA that `peft` made, of unlike shapes, in one memory of prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save, save_file
from transformers import AutoModelForCausalLM

from memtool.backbones.answering import RecallOf, answers
from memtool.config import resolve
from memtool.errors import (
    AlreadyExistsError,
    ConfigError,
    CorruptError,
    DataError,
    MemtoolError,
    MismatchError,
    NotFoundError,
)
from memtool.methods.export import export_peft
from memtool.methods.forget import forget
from memtool.methods.merge import merge
from memtool.methods.mira.moments import SHRINKAGE, PromptState
from memtool.methods.mira.prompts import PromptMemory
from memtool.methods.routed.attached import RoutedTexts
from memtool.remembered import remembered
from memtool_stores import IntegrityError, MemoryStore, Transaction
from tests.methods.facts import FACTS, settings_of, write_facts

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)

SHAPES: dict[str, dict[str, Any]] = {
    "letters": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "sums": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 1},
        "alpha_pattern": {"q_proj": 8},
    },
    "turned": {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["o_proj", "up_proj"],
        "layers_to_transform": [1],
    },
}
PROMPTS = {name: [prompt for prompt, _ in facts] for name, facts in FACTS.items()}


def write_adapter(base: Path, folder: Path, seed: int, **shape: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **shape)
        get_peft_model(model, config).save_pretrained(folder)


def write_prompts(file: Path, prompts: dict[str, list[str]]) -> Path:
    lines = [json.dumps({"adapter": a, "prompt": p}) for a, asked in prompts.items() for p in asked]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_collection(folder: Path) -> Path:
    """A tiny model with its texts, three adapters of it in `adapters`, and prompts of each."""
    write_facts(folder)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        write_adapter(folder / "model", folder / "adapters" / name, seed, **shape)
    write_prompts(folder / "prompts.jsonl", PROMPTS)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection, one of whose adapters has a card."""
    folder = write_collection(tmp_path_factory.mktemp("collection"))
    card = "---\nbase_model: tiny\nlicense: apache-2.0\n---\n# Sums\n"
    (folder / "adapters" / "sums" / "README.md").write_text(card, encoding="utf-8")
    return folder


def opened(place: Path, where: Path, **changes: object) -> PromptMemory:
    overrides = {**settings_of(place, where), "engine.device": "cpu", **changes}
    config = resolve(preset="mira-trace", overrides=overrides, ambient=False).config
    found = PromptMemory.open(config, seed=0)
    assert isinstance(found, PromptMemory)
    return found


@pytest.fixture(scope="module")
def _made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    method = opened(place, folder)
    method.collect([str(place / "adapters")], place / "prompts.jsonl")
    method.consolidate()
    return folder


@pytest.fixture
def made(place: Path, _made: Path) -> PromptMemory:
    """Three adapters with keys, for reading only."""
    return opened(place, _made)


@pytest.fixture
def copy(place: Path, _made: Path, tmp_path: Path) -> PromptMemory:
    """The same in a copy that a test may change."""
    shutil.copytree(_made, tmp_path / "copy")
    return opened(place, tmp_path / "copy")


def products(place: Path, name: str) -> dict[str, torch.Tensor]:
    """What peft adds to every weight for an adapter, in float64."""
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    before = {key: one.clone() for key, one in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, place / "adapters" / name).merge_and_unload()
    return {key: one - before[key] for key, one in merged.state_dict().items()}


def with_weights(place: Path, weights: dict[str, float]) -> Any:
    """The base model with a weighted sum of adapters merged into it."""
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64).eval()
    state = model.state_dict()
    for name, weight in weights.items():
        for key, delta in products(place, name).items():
            state[key] += weight * delta
    model.load_state_dict(state)
    return model


def slow_answer(model: Any, ids: list[int], most: int, ends: tuple[int, ...]) -> list[int]:
    """Greedy, one whole forward pass a token."""
    found: list[int] = []
    with torch.no_grad():
        for _ in range(most):
            logits = model(input_ids=torch.tensor([ids + found])).logits[0, -1]
            if (token := int(logits.argmax())) in ends:
                break
            found.append(token)
    return found


# What comes in and goes out ---------------------------------------------------------------------


def test_every_file_comes_back_byte_for_byte(
    place: Path, made: PromptMemory, tmp_path: Path
) -> None:
    view = made.workspace.store.view()
    assert [(r.name, r.ragged, r.meta["collection"]["rank"]) for r in view.adapters] == [
        ("letters", True, 2),
        ("sums", True, 4),
        ("turned", True, 3),
    ]
    assert view.get("sums").meta["collection"]["licence"] == "apache-2.0"
    assert view.get("sums").meta["collection"]["base"] == str(place / "model")
    export_peft(made.workspace, None, out=tmp_path / "back")
    for name in SHAPES:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            original = (place / "adapters" / name / file).read_bytes()
            assert (tmp_path / "back" / name / file).read_bytes() == original


def test_an_adapter_that_is_named_computes_what_peft_computes(
    place: Path, made: PromptMemory
) -> None:
    lm = made.workspace.backbone
    tokens = lm.encode(["turn ab:"]).tokens
    for name in SHAPES:
        model = made.attach(task=name)
        expected = with_weights(place, {name: 1.0})(input_ids=tokens).logits
        torch.testing.assert_close(model(tokens).double(), expected, atol=1e-3, rtol=1e-3)


def test_a_mixed_batch_answers_as_a_slow_loop_with_the_merged_adapters(
    place: Path, made: PromptMemory
) -> None:
    """Each prompt has weights of its own, lengths differ, and the weights stay."""
    lm = made.workspace.backbone
    routing = made.read().routing
    given = torch.tensor([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    prompts = ["after a comes", "7 and", "turn ab: then b", "x"]
    asked = [tuple(lm.encode([prompt]).tokens[0].tolist()) for prompt in prompts]
    rows = dict(zip(asked, given, strict=True))

    def choose(tokens: torch.Tensor) -> Any:
        real = [tuple(one for one in row if one >= 0) for row in tokens.tolist()]
        return routing.recall(torch.stack([rows[one] for one in real]))

    found = answers(lm, prompts, RecallOf(choose), batch=4, most=5)
    names = list(SHAPES)
    for prompt, weights, answer in zip(prompts, given.tolist(), found, strict=True):
        model = with_weights(place, dict(zip(names, weights, strict=True)))
        ids = lm.encode([prompt]).tokens[0].tolist()
        assert answer == lm.decode(slow_answer(model, ids, 5, lm.ends)).strip()


def test_the_mixture_of_a_prompt_is_one_adapter_for_peft(
    place: Path, copy: PromptMemory, tmp_path: Path
) -> None:
    soft = opened(place, Path(copy.workspace.store_path).parent, **{"memory.beta": 0.001})
    result = soft.retrieve(prompt="after 7 and", out=tmp_path / "mixture")
    weights = {one.name: one.coefficient for one in result.adapters}
    assert result.out == tmp_path / "mixture"
    assert min(weights.values()) > 0.01
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    mixture = PeftModel.from_pretrained(base, tmp_path / "mixture").eval()
    tokens = soft.workspace.backbone.encode(["turn ab:"]).tokens
    expected = with_weights(place, weights)(input_ids=tokens).logits
    found = mixture(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


# Keys -------------------------------------------------------------------------------------------


def test_prompts_find_their_adapter_and_only_what_is_used_is_read(made: PromptMemory) -> None:
    model = made.attach()
    assert isinstance(model, RoutedTexts)
    assert model.names == tuple(SHAPES)
    for place, (name, asked) in enumerate(PROMPTS.items()):
        weights = model.weights(asked)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(asked)))
        assert (weights.argmax(dim=1) == place).float().mean() > 0.8, name


def test_keys_are_those_of_a_slow_discriminant_analysis(place: Path, made: PromptMemory) -> None:
    from memtool.learning.looks import looks_of

    seen = [looks_of(made.workspace, PROMPTS[name], made.look).double().numpy() for name in SHAPES]
    means = np.stack([one.mean(axis=0) for one in seen])
    rest = np.concatenate([one - mean for one, mean in zip(seen, means, strict=True)])
    covariance = rest.T @ rest / len(rest)
    size = np.trace(covariance) / len(covariance)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * size * np.eye(len(covariance))
    asked = looks_of(made.workspace, ["after 7 and"], made.look).double().numpy()
    away = asked[0] - means
    scores = -0.5 * np.einsum("td,de,te->t", away, np.linalg.inv(covariance), away)
    expected = np.exp(scores - scores.max())
    (found,) = made.attach().weights(["after 7 and"])
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-3)


def test_consolidation_needs_no_prompts_and_nothing_new_is_nothing(
    place: Path, copy: PromptMemory
) -> None:
    before = copy.workspace.store.head()
    assert copy.consolidate().unchanged
    assert copy.workspace.store.head() == before
    again = copy.collect([str(place / "adapters" / "sums")])
    assert (again.added, again.skipped) == ((), ("sums",))
    assert copy.workspace.store.head() == before
    other = opened(place, Path(copy.workspace.store_path).parent, **{"memory.look_at": ("final",)})
    with pytest.raises(ConfigError, match=r"look_at is final.*blocks,tokens"):
        other.consolidate()


def test_texts_are_kept_only_where_that_is_asked_for(place: Path, tmp_path: Path) -> None:
    method = opened(place, tmp_path)
    method.collect([str(place / "adapters")], place / "prompts.jsonl")
    store = method.workspace.store
    assert not [name for name in store.view().blobs() if name.startswith("prompts.")]
    again = opened(place, tmp_path / "other")
    again.collect([str(place / "adapters")], place / "prompts.jsonl", keep_prompts=True)
    view = again.workspace.store.view()
    assert json.loads(view.blob(f"prompts.{view.get('sums').id}")) == PROMPTS["sums"]
    forget(again.workspace.store, ["sums"])
    left = [name for name in again.workspace.store.view().blobs() if name.startswith("prompts.")]
    assert len(left) == 2


def test_other_prompts_of_an_adapter_give_it_another_key(
    place: Path, copy: PromptMemory, tmp_path: Path
) -> None:
    before = copy.workspace.store.view()
    same = copy.collect([str(place / "adapters")], place / "prompts.jsonl")
    assert (same.version, copy.consolidate().unchanged) == (before.version, True)
    file = write_prompts(tmp_path / "p.jsonl", {"sums": ["what is 8 plus 9", "1 plus 2"]})
    copy.collect([str(place / "adapters" / "sums")], file)
    assert not copy.consolidate().unchanged
    ours, theirs = before.keys(), copy.workspace.store.view().keys()
    assert ours is not None
    assert theirs is not None
    assert not np.allclose(ours, theirs, atol=1e-3)
    assert copy.consolidate().unchanged


def test_what_comes_later_gets_its_key_beside_the_others(place: Path, tmp_path: Path) -> None:
    whole = opened(place, tmp_path / "whole")
    whole.collect([str(place / "adapters")], place / "prompts.jsonl")
    whole.consolidate()
    parts = opened(place, tmp_path / "parts")
    for name in SHAPES:
        file = write_prompts(tmp_path / f"{name}.jsonl", {name: PROMPTS[name]})
        parts.collect([str(place / "adapters" / name)], file)
        parts.consolidate()
    ours, theirs = (one.workspace.store.view().keys() for one in (whole, parts))
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_forgetting_makes_the_keys_of_who_never_knew_it(
    place: Path, copy: PromptMemory, tmp_path: Path
) -> None:
    store = copy.workspace.store
    sha256 = store.view().get("sums").sha256
    forget(store, ["sums"], purge=True)
    rest = {name: asked for name, asked in PROMPTS.items() if name != "sums"}
    never = opened(place, tmp_path / "never")
    folders = [str(place / "adapters" / name) for name in rest]
    never.collect(folders, write_prompts(tmp_path / "rest.jsonl", rest))
    never.consolidate()
    ours, theirs = store.view().keys(), never.workspace.store.view().keys()
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert store.find_bytes([sha256]) == {}
    (weights,) = copy.attach().weights(["7 and 1 is"])
    assert weights.shape == (2,)
    forget(store, [*rest])
    assert PromptState.load(store.view()) is None
    with pytest.raises(NotFoundError):
        copy.attach()


# What is not as it should be --------------------------------------------------------------------


def test_adapters_without_prompts_are_named_and_can_be_asked_by_name(
    place: Path, tmp_path: Path
) -> None:
    method = opened(place, tmp_path)
    some = write_prompts(tmp_path / "some.jsonl", {n: PROMPTS[n] for n in ("letters", "sums")})
    result = method.collect([str(place / "adapters")], some)
    assert [note for note in result.notes if "no prompts of turned" in note]
    method.consolidate()
    assert method.attach().names == ("letters", "sums")
    tokens = method.workspace.backbone.encode(["ab"]).tokens
    expected = with_weights(place, {"turned": 1.0})(input_ids=tokens).logits
    found = method.attach(task="turned")(tokens).double()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_without_any_prompts_there_is_nothing_to_choose_by(place: Path, tmp_path: Path) -> None:
    method = opened(place, tmp_path)
    method.collect([str(place / "adapters" / "sums")])
    with pytest.raises(DataError, match="no prompts are known") as caught:
        method.consolidate()
    assert "--prompts" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ('{"adapter": "poems", "prompt": "x"}', DataError, "line 1: a prompt of 'poems'"),
        ('{"adapter": "sums"}', DataError, "line 1"),
        ('{"adapter": "sums", "prompt": " "}', DataError, "line 1"),
        ("sums: x", DataError, "line 1 cannot be read as JSON"),
        ("", ConfigError, "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_used(
    place: Path, tmp_path: Path, line: str, error: type[MemtoolError], said: str
) -> None:
    (tmp_path / "p.jsonl").write_text(line, encoding="utf-8")
    method = opened(place, tmp_path)
    with pytest.raises(error, match=said):
        method.collect([str(place / "adapters")], tmp_path / "p.jsonl")
    assert not method.workspace.has_store


def changed(place: Path, folder: Path, **config: object) -> Path:
    """A copy of an adapter with another configuration."""
    shutil.copytree(place / "adapters" / "letters", folder / "letters")
    file = folder / "letters" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}), encoding="utf-8")
    return folder / "letters"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_more_than_a_plain_lora_is_refused_by_name(
    place: Path, tmp_path: Path, config: dict[str, object], said: str
) -> None:
    with pytest.raises(MismatchError, match=said):
        opened(place, tmp_path / "m").collect([str(changed(place, tmp_path, **config))])


def test_numbers_that_are_none_are_refused(place: Path, tmp_path: Path) -> None:
    folder = changed(place, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises((DataError, CorruptError), match=r"finite|NaN"):
        opened(place, tmp_path / "m").collect([str(folder)])


def test_an_adapter_of_another_model_is_refused_and_another_name_is_said(
    place: Path, tmp_path: Path
) -> None:
    folder = changed(place, tmp_path, base_model_name_or_path="org/other-7b")
    result = opened(place, tmp_path / "m").collect([str(folder)])
    assert any("org/other-7b" in note for note in result.notes)
    tensors = load_file(folder / "adapter_model.safetensors")
    strange = {name.replace("self_attn", "attention"): one for name, one in tensors.items()}
    save_file(strange, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="attention"):
        opened(place, tmp_path / "n").collect([str(folder)])


def test_names_that_meet(place: Path, copy: PromptMemory, tmp_path: Path) -> None:
    shutil.copytree(place / "adapters" / "sums", tmp_path / "a" / "sums")
    shutil.copytree(place / "adapters" / "letters", tmp_path / "b" / "sums")
    with pytest.raises(AlreadyExistsError, match="two adapters named 'sums'"):
        copy.collect([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(AlreadyExistsError, match="another adapter named 'sums'"):
        copy.collect([str(tmp_path / "b")])
    with pytest.raises(NotFoundError, match="no adapter in"):
        copy.collect([str(tmp_path)])


def test_a_collection_brings_nothing_to_be_measured_on(place: Path, made: PromptMemory) -> None:
    where = Path(made.workspace.store_path).parent
    bare = opened(place, where, **{"stream.source": "digits"})
    with pytest.raises(ConfigError, match="no texts to be measured on"):
        bare.evaluate()
    record = made.evaluate(compare=True)
    found = {id: record.row(id).loss for id in ("memory", "hard", "uniform", "oracle")}
    assert all(line[-1] and None not in line[-1] for line in found.values())
    assert found["memory"][-1] != found["uniform"][-1]


# What a review found ----------------------------------------------------------------------------


def numbered(place: Path, folder: Path) -> Path:
    """The three adapters under names that look like numbers of tasks, and their prompts."""
    names = dict(zip(SHAPES, ("1", "2", "10"), strict=True))
    for name, other in names.items():
        shutil.copytree(place / "adapters" / name, folder / "adapters" / other)
    write_prompts(folder / "prompts.jsonl", {names[n]: asked for n, asked in PROMPTS.items()})
    return folder


def test_a_name_is_meant_before_a_number(place: Path, tmp_path: Path) -> None:
    folder = numbered(place, tmp_path)
    method = opened(place, tmp_path / "m")
    method.collect([str(folder / "adapters")], folder / "prompts.jsonl")
    method.consolidate()
    view = method.workspace.store.view()
    assert {record.name: record.task for record in view.adapters} == {"1": 1, "10": 2, "2": 3}
    (name,) = method.attach(task="2").names
    assert name == "2"
    forget(method.workspace.store, ["2"])
    assert [record.name for record in method.workspace.store.view().adapters] == ["1", "10"]


def test_an_explanation_says_what_comes_out_without_the_one_that_is_used(
    made: PromptMemory,
) -> None:
    found = made.explain(prompt=PROMPTS["sums"][0])
    best = max(found.adapters, key=lambda one: one.coefficient)
    assert best.name == "sums"
    assert best.contribution != 0


def test_prompts_are_looked_at_in_one_way_from_the_first_import(
    place: Path, tmp_path: Path
) -> None:
    first = opened(place, tmp_path, **{"memory.look_at": ("final",)})
    first.collect(
        [str(place / "adapters" / "sums")],
        write_prompts(tmp_path / "s.jsonl", {"sums": PROMPTS["sums"]}),
    )
    version = first.workspace.store.head()
    with pytest.raises(ConfigError, match="look_at"):
        opened(place, tmp_path).collect([str(place / "adapters")], place / "prompts.jsonl")
    assert first.workspace.store.head() == version
    first.collect([str(place / "adapters")], place / "prompts.jsonl")
    first.consolidate()


def test_an_adapter_stays_of_its_task(place: Path, tmp_path: Path) -> None:
    method = opened(place, tmp_path)
    sums = place / "adapters" / "sums"
    file = write_prompts(tmp_path / "s.jsonl", {"sums": PROMPTS["sums"]})
    method.collect([f"{sums}:arith"])
    with pytest.raises(AlreadyExistsError, match="'arith'"):
        method.collect([f"{sums}:other"])
    method.collect([str(sums)], file)
    method.collect([str(place / "adapters" / "letters")])
    method.consolidate()
    assert method.attach().names == ("sums",)
    assert method.attach(task="arith").names == method.attach(task="sums").names == ("sums",)


def test_a_trained_task_does_not_get_the_number_of_a_collection(
    place: Path, tmp_path: Path
) -> None:
    method = opened(place, tmp_path)
    method.adapt("1")
    method.write()
    method.collect(
        [str(place / "adapters" / "turned")],
        write_prompts(tmp_path / "t.jsonl", {"turned": PROMPTS["turned"]}),
    )
    method.consolidate()
    assert method.attach().names == ("task-1-seed-0", "turned")
    method.adapt("2")
    with pytest.raises(MismatchError, match="task 2 of the memory is 'turned'"):
        method.write()


def test_prompts_of_two_adapters_of_a_task_add_up_and_go_one_by_one(
    place: Path, tmp_path: Path
) -> None:
    method = opened(place, tmp_path)
    folders = [f"{place / 'adapters' / name}:both" for name in ("letters", "sums")]
    method.collect(
        [*folders, str(place / "adapters" / "turned")],
        place / "prompts.jsonl",
        keep_prompts=True,
    )
    method.consolidate()
    (weights,) = method.attach().weights([PROMPTS["sums"][0]])
    assert weights.tolist()[:2] == pytest.approx([0.5, 0.5], abs=0.01)
    store = method.workspace.store
    gone = store.view().get("letters").id
    result = forget(store, ["letters"], purge=True)
    assert result.purged is not None
    assert not result.purged.left
    assert not [name for name in store.view().blobs() if gone in name]
    alone = opened(place, tmp_path / "alone")
    alone.collect(
        [f"{place / 'adapters' / 'sums'}:both"],
        write_prompts(tmp_path / "s.jsonl", {"sums": PROMPTS["sums"]}),
    )
    alone.collect(
        [str(place / "adapters" / "turned")],
        write_prompts(tmp_path / "t.jsonl", {"turned": PROMPTS["turned"]}),
    )
    alone.consolidate()
    ours, theirs = store.view().keys(), alone.workspace.store.view().keys()
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_what_is_left_may_be_too_little_for_keys(place: Path, tmp_path: Path) -> None:
    method = opened(place, tmp_path)
    few = {"sums": PROMPTS["sums"], "letters": PROMPTS["letters"][:1]}
    folders = [str(place / "adapters" / name) for name in few]
    method.collect(folders, write_prompts(tmp_path / "p.jsonl", few))
    method.consolidate()
    store = method.workspace.store
    forget(store, ["sums"])
    assert store.view().keys() is None
    assert method.attach(task="letters").names == ("letters",)


def test_the_same_numbers_with_another_alpha_are_another_adapter(
    place: Path, copy: PromptMemory, tmp_path: Path
) -> None:
    folder = changed(place, tmp_path, lora_alpha=300)
    with pytest.raises(AlreadyExistsError, match="'letters'") as caught:
        copy.collect([str(folder)])
    assert caught.value.expected == "the same configuration"


@pytest.mark.parametrize("line", ["a\u2028b", "a\x0cb\x85c"])
def test_a_line_ends_where_json_lines_end(
    place: Path, copy: PromptMemory, tmp_path: Path, line: str
) -> None:
    text = json.dumps({"adapter": "sums", "prompt": line}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_text(text + "\n", encoding="utf-8")
    result = copy.collect([str(place / "adapters" / "sums")], tmp_path / "p.jsonl")
    assert any("other prompts than before of sums" in note for note in result.notes)


def test_half_a_character_is_no_prompt(place: Path, copy: PromptMemory, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"adapter": "sums", "prompt": "\\ud800"}')
    with pytest.raises(DataError, match="line 1"):
        copy.collect([str(place / "adapters" / "sums")], tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="no character"):
        copy.attach().generate(["\ud800"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"root": None},
        {"count": torch.tensor([0])},
        {"count": torch.tensor([3, 4])},
        {"mean": torch.zeros(4)},
        {"root": torch.zeros(2, 5)},
        {"root": torch.full((2, 4), torch.inf)},
        {"some": torch.zeros(0, 4)},
        {"some": torch.full((1, 4), torch.inf)},
        {"some": torch.zeros(3, 5)},
    ],
)
def test_moments_that_are_none_are_damage(
    copy: PromptMemory, wrong: dict[str, torch.Tensor | None]
) -> None:
    fine = {"count": torch.tensor([3]), "mean": torch.zeros(1, 4)}
    fine |= {"root": torch.ones(2, 4), "some": torch.zeros(3, 4)}
    blob = {name: one for name, one in {**fine, **wrong}.items() if one is not None}
    store = copy.workspace.store
    id = store.view().get("sums").id
    with store.transaction("strange") as txn:
        txn.put_blob(f"looks.{id}", save(blob))
    with pytest.raises(CorruptError, match=f"looks.{id}"):
        copy.consolidate()
    with store.transaction("of another width") as txn:
        txn.put_blob(f"looks.{id}", save(fine))
    with pytest.raises(MismatchError, match="prompts that look like"):
        copy.consolidate()


@pytest.mark.parametrize("wrong", ["more", "wider", "narrower", "none"])
def test_keys_that_fit_no_look_are_damage(copy: PromptMemory, wrong: str) -> None:
    store = copy.workspace.store
    keys = store.view().keys()
    assert keys is not None
    changed = {
        "more": np.concatenate([keys, keys]),
        "wider": np.concatenate([keys, keys], axis=2),
        "narrower": keys[:, :, 1:],
        "none": np.full_like(keys, np.inf),
    }
    try:
        with store.transaction("strange") as txn:
            txn.set_keys(np.ascontiguousarray(changed[wrong]))
    except MemtoolError:
        assert wrong == "none"  # the store itself takes numbers alone
        return
    with pytest.raises(CorruptError, match="as prompts are looked at"):
        copy.attach()


def test_chats_and_plain_prompts_are_not_one_memory(place: Path, made: PromptMemory) -> None:
    state = PromptState.load(made.workspace.store.view())
    chats = opened(place, place / "chats", **{"text.chat": True})
    with pytest.raises(ConfigError, match=r"text.chat is True, but .* under False"):
        chats.require_same_look(state)


def test_moments_that_were_kept_before_clusters_give_the_same_keys(copy: PromptMemory) -> None:
    store = copy.workspace.store
    view = store.view()
    wanted = view.keys()
    assert copy.retrieve(prompt="after 7 and").novelty is not None
    with store.transaction("as before") as txn:
        for record in view.adapters:
            kept = load(view.blob(f"looks.{record.id}"))
            older = {"count": kept["count"], "mean": kept["mean"][0], "root": kept["root"]}
            txn.put_blob(f"looks.{record.id}", save(older))
    copy.consolidate()
    np.testing.assert_array_equal(store.view().keys(), wanted)
    assert copy.retrieve(prompt="after 7 and").novelty is None


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"rows": [1, 1]}, CorruptError),
        ({"rows": [1, 0, 1]}, CorruptError),
        ({"rows": [1, 7, 1]}, CorruptError),
        ({"apart": [2, 0]}, CorruptError),
        ({"scope": "none"}, ConfigError),
        ({"schema_version": 3, "more": 1}, MismatchError),
    ],
)
def test_a_state_that_fits_no_keys_is_damage(
    copy: PromptMemory, said: dict[str, object], error: type[MemtoolError]
) -> None:
    store = copy.workspace.store
    state = PromptState.load(store.view())
    assert state is not None
    as_it_was = {**state.model_dump(mode="json"), "schema_version": 1}  # with all in one blob
    with store.transaction("strange") as txn:
        txn.put_blob("prompt-keys", json.dumps({**as_it_was, **said}).encode())
    with pytest.raises(error):
        copy.attach()


@pytest.mark.parametrize(
    "wrong", [{"rows": torch.tensor([1, 0, 1])}, {"rows": torch.tensor([1, 7, 1])}, None]
)
def test_rows_that_fit_no_keys_are_damage(
    copy: PromptMemory, wrong: dict[str, torch.Tensor] | None
) -> None:
    store = copy.workspace.store
    rows = load(store.view().blob("prompt-keys.adapters.0"))
    with store.transaction("strange") as txn:
        if wrong is None:
            txn.delete_blob("prompt-keys.adapters.0")
        else:
            txn.put_blob("prompt-keys.adapters.0", save({**rows, **wrong}))
    with pytest.raises(MemtoolError):
        copy.attach()


def test_settings_stay_when_the_versions_that_said_them_go(
    copy: PromptMemory, tmp_path: Path
) -> None:
    store = copy.workspace.store
    before = remembered(store)
    assert before["memory.look_at"]
    forget(store, ["sums"], purge=True)
    assert len(store.log()) == 1
    assert remembered(store) == before
    merge(str(tmp_path / "joined"), store.url, ["letters"])
    merge(str(tmp_path / "joined"), store.url)
    joined = MemoryStore.open(tmp_path / "joined")
    joined.gc(keep_last=1)
    assert remembered(joined) == before


def test_a_memory_that_another_made_meanwhile_is_written_to(place: Path, tmp_path: Path) -> None:
    work = opened(place, tmp_path / "made").workspace

    def append(txn: Transaction) -> None:
        if not work.has_store:
            MemoryStore.create(work.store_path, work.space)
        txn.put_blob("a", b"a")

    head = work.commit(append, "import", {})
    assert head == work.store.head()
    assert [one.message for one in work.store.log()] == ["import", "create the memory"]


def test_a_merge_that_fails_makes_no_memory(copy: PromptMemory, tmp_path: Path) -> None:
    store = copy.workspace.store
    for chunk in (Path(store.url) / "ice" / "chunks").iterdir():
        chunk.write_bytes(b"0" * chunk.stat().st_size)
    with pytest.raises(IntegrityError):
        merge(str(tmp_path / "joined"), store.url)
    assert not (tmp_path / "joined").exists()


def test_pickles_are_refused_by_name(place: Path, copy: PromptMemory, tmp_path: Path) -> None:
    shutil.copytree(place / "adapters" / "sums", tmp_path / "other")
    torch.save({}, tmp_path / "other" / "adapter_model.bin")
    (tmp_path / "other" / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFoundError) as caught:
        copy.collect([str(tmp_path / "other")])
    assert "adapter_model.bin is a pickle, which is not read" in str(caught.value)
