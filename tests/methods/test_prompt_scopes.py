"""Weights of a prompt, of its blocks and of its tokens: the same as in a slow, obvious way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

import memtool
import memtool_stores
from memtool.adapters.mixing import Mixture
from memtool.errors import ConfigError, DataError
from memtool.learning import looks
from memtool.learning.looks import PromptLook, looks_of, token_looks
from memtool.memories.clusters import clustered
from memtool.methods.forget import forget
from memtool.methods.mira import prompt_reach
from memtool.methods.mira.moments import SHRINKAGE, PromptState, moments_of
from memtool.methods.mira.prompts import PromptMemory
from memtool.methods.mira.tokens import TokenRouting
from memtool.methods.routed.attached import RoutedTexts
from tests.methods.facts import write_facts
from tests.methods.test_collection import PROMPTS, SHAPES, opened, write_adapter, write_prompts

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft asks transformers
)

WAYS: dict[str, dict[str, object]] = {
    "model": {},
    "block": {"memory.scope": "block"},
    "token": {"memory.scope": "token", "memory.look_at": ("blocks",)},
    "prefix": {"memory.scope": "token", "memory.look_at": ("prefix",)},
    "clusters": {"memory.clusters": 2},
    "token clusters": {
        "memory.scope": "token",
        "memory.look_at": ("prefix",),
        "memory.clusters": 2,
    },
}
ASKED = ["after 7 and", "turn ab:", "b", "6 and 1 is"]
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, three adapters of it in `adapters`, and prompts of each."""
    folder = write_facts(tmp_path_factory.mktemp("scopes"))
    for seed, (name, shape) in enumerate(SHAPES.items()):
        write_adapter(folder / "model", folder / "adapters" / name, seed, **shape)
    write_prompts(folder / "prompts.jsonl", PROMPTS)
    return folder


def filled(place: Path, where: Path, names: tuple[str, ...] = (), **changes: Any) -> PromptMemory:
    """A memory of the adapters of these names, or of all, with keys."""
    method = opened(place, where, **changes)
    names = names or tuple(SHAPES)
    file = write_prompts(where.with_suffix(".jsonl"), {name: PROMPTS[name] for name in names})
    folders = [str(place / "adapters" / name) for name in names]
    method.collect(folders, file, keep_prompts=True)
    method.consolidate()
    return method


@pytest.fixture(scope="module")
def memories(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a memory of each of `WAYS`, for reading only."""
    folder = tmp_path_factory.mktemp("made")
    for name, changes in WAYS.items():
        filled(place, folder / name, **changes)
    return {name: folder / name for name in WAYS}


def read(place: Path, memories: dict[str, Path], name: str) -> PromptMemory:
    return opened(place, memories[name], **WAYS[name])


def attached(method: PromptMemory) -> RoutedTexts:
    model = method.attach()
    assert isinstance(model, RoutedTexts)
    return model


# Slow twins -------------------------------------------------------------------------------------


def slow_scores(groups: list[list[Array]]) -> Callable[[Array], Array]:
    """log p(task, x) of Gaussian clusters with one covariance, all in numpy, up to a constant."""
    means = [[cluster.mean(axis=0) for cluster in clusters] for clusters in groups]
    away = [
        cluster - mean
        for clusters, own in zip(groups, means, strict=True)
        for cluster, mean in zip(clusters, own, strict=True)
    ]
    rest = np.concatenate(away)
    covariance = rest.T @ rest / len(rest)
    size = np.trace(covariance) / len(covariance)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * size * np.eye(len(covariance))
    inverse = np.linalg.inv(covariance)

    def scores(x: Array) -> Array:
        found = []
        for clusters, own in zip(groups, means, strict=True):
            total = sum(len(cluster) for cluster in clusters)
            parts = [
                -0.5 * (x - mean) @ inverse @ (x - mean) + np.log(len(cluster) / total)
                for cluster, mean in zip(clusters, own, strict=True)
            ]
            found.append(np.logaddexp.reduce(parts))
        return np.array(found)

    return scores


def softmax(scores: Array) -> Array:
    found = np.exp(scores - scores.max())
    result: Array = found / found.sum()
    return result


def states(method: PromptMemory, prompt: str) -> Array:
    """What every block sees at every token of a prompt (blocks, n, dim), without padding."""
    lm, seen = method.workspace.backbone, []
    tokens = lm.encode([prompt]).tokens
    with torch.no_grad():
        lm.hidden(tokens, lambda block, hidden: seen.append(hidden[0].double()))
    return np.stack([np.stack([seen_at(method, one, n) for n in range(len(one))]) for one in seen])


def seen_at(method: PromptMemory, hidden: torch.Tensor, n: int) -> Array:
    """What a block sees at token n of its input (tokens, dim): that token, or the mean so far."""
    prefix = method.settings.places == ("prefix",)
    found = hidden[: n + 1].mean(dim=0) if prefix else hidden[n]
    result: Array = F.layer_norm(found.double(), found.shape).numpy()
    return result


def block_looks(method: PromptMemory, prompt: str) -> Array:
    """What each block sees of a prompt (blocks, d): its own mean, and the shares of tokens."""
    lm, means = method.workspace.backbone, []
    tokens = lm.encode([prompt]).tokens
    with torch.no_grad():
        lm.hidden(tokens, lambda block, hidden: means.append(hidden[0].double().mean(dim=0)))
    words = len(lm.embed.weight)
    shares = np.sqrt(words * np.bincount(tokens[0].numpy(), minlength=words) / tokens.shape[1])
    own = [F.layer_norm(mean, mean.shape).numpy() for mean in means]
    return np.stack([np.concatenate([one, shares]) for one in own])


def test_every_block_has_weights_by_a_slow_discriminant_analysis_of_what_it_sees(
    place: Path, memories: dict[str, Path]
) -> None:
    method = read(place, memories, "block")
    routing, lm = method.read().routing, method.workspace.backbone
    seen = {n: np.stack([block_looks(method, p) for p in PROMPTS[n]]) for n in SHAPES}
    for prompt in ASKED:
        found = routing.weighed(lm, lm.encode([prompt]).tokens)[0].double().numpy()
        assert found.shape == (2, 3)
        asked = block_looks(method, prompt)
        for block in range(2):
            scores = slow_scores([[seen[name][:, block]] for name in SHAPES])
            np.testing.assert_allclose(found[block], softmax(scores(asked[block])), atol=2e-3)


def token_twin(method: PromptMemory) -> Callable[[int, Array], Array]:
    """The weights (adapters,) of a token by its state before a block, from all example tokens."""
    rows = {n: np.concatenate([states(method, p) for p in PROMPTS[n]], axis=1) for n in SHAPES}
    scores = [slow_scores([[rows[name][block]] for name in SHAPES]) for block in range(2)]
    return lambda block, state: softmax(scores[block](state))


def slow_recall(method: PromptMemory) -> Any:
    """Every token weighed by the twin, one by one, on the same adapters."""
    twin, stock = token_twin(method), method.read().routing.values
    assert not isinstance(stock, torch.nn.Module)
    values = stock.take(range(3))

    def recall(block: int, hidden: torch.Tensor) -> Mixture | None:
        each = range(hidden.shape[1])
        weights = [[twin(block, seen_at(method, one, n)) for n in each] for one in hidden]
        here = values.block(block)
        given = torch.from_numpy(np.array(weights)).float()
        return None if here is None else Mixture.weighted(here, given, "delta")

    return recall


@pytest.mark.parametrize("name", ["token", "prefix"])
def test_every_token_has_weights_by_a_slow_discriminant_analysis_as_it_passes(
    place: Path, memories: dict[str, Path], name: str
) -> None:
    method = read(place, memories, name)
    model, lm = attached(method), method.workspace.backbone
    recall = slow_recall(method)
    with torch.no_grad():
        for prompt in ASKED:
            tokens = lm.encode([prompt]).tokens
            expected = lm.logits(tokens, recall)
            torch.testing.assert_close(model(tokens), expected, atol=5e-2, rtol=1e-2)
    unlike = lm.logits(tokens)
    assert not torch.allclose(unlike, expected, atol=0.5)


@pytest.mark.parametrize("name", ["block", "token", "prefix"])
def test_generation_is_that_of_a_slow_loop(
    place: Path, memories: dict[str, Path], name: str
) -> None:
    """One whole pass a token, one prompt at a time; weights of blocks stay, of tokens come."""
    method = read(place, memories, name)
    model, lm = attached(method), method.workspace.backbone
    for prompt, answer in zip(ASKED, model.generate(ASKED, most=5), strict=True):
        tokens = lm.encode([prompt]).tokens
        if name != "block":
            recall = slow_recall(method)
        else:
            routing = method.read().routing
            recall = routing.recall(routing.weighed(lm, tokens))
        said: list[int] = []
        with torch.no_grad():
            while len(said) < 5:
                whole = torch.cat([tokens, torch.tensor([said], dtype=torch.int64)], dim=1)
                token = int(lm.logits(whole, recall)[0, -1].argmax())
                if token in lm.ends:
                    break
                said.append(token)
        assert answer == lm.decode(said).strip()


def test_clusters_of_an_adapter_add_up_to_its_weight(
    place: Path, memories: dict[str, Path]
) -> None:
    method = read(place, memories, "clusters")
    work = method.workspace
    groups = []
    for name in SHAPES:
        seen = looks_of(work, PROMPTS[name], method.look)
        owners = clustered(seen, 2, 0).numpy()
        wide = seen.double().numpy()
        groups.append([wide[owners == cluster] for cluster in range(owners.max() + 1)])
    assert [len(clusters) for clusters in groups] == [2, 2, 2]
    scores = slow_scores(groups)
    found = attached(method).weights(ASKED).double().numpy()
    for prompt, weights in zip(ASKED, found, strict=True):
        (asked,) = looks_of(work, [prompt], method.look).double().numpy()
        np.testing.assert_allclose(weights, softmax(scores(asked)), atol=2e-3)
    keys = work.store.view().keys()
    assert keys is not None
    assert keys.shape == (1, 3, 2 * (method.look.width(work.backbone) + 1))


# What holds of all ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_a_prompt_gets_the_same_alone_and_in_a_batch(
    place: Path, memories: dict[str, Path], name: str
) -> None:
    model = attached(read(place, memories, name))
    texts, weights = model.answered(ASKED, batch=4, most=5)
    assert texts == model.generate(ASKED, batch=4, most=5)
    torch.testing.assert_close(weights, model.weights(ASKED))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))
    for place_, prompt in enumerate(ASKED):
        (alone,), own = model.answered([prompt], most=5)
        assert alone == texts[place_]
        torch.testing.assert_close(own[0], weights[place_], atol=1e-4, rtol=1e-3)
    assert model.answered([])[0] == []


@pytest.mark.parametrize("name", WAYS)
def test_forgetting_makes_the_memory_of_who_never_knew_it(
    place: Path, memories: dict[str, Path], tmp_path: Path, name: str
) -> None:
    shutil.copytree(memories[name], tmp_path / "copy")
    method = opened(place, tmp_path / "copy", **WAYS[name])
    store = method.workspace.store
    gone = [sha for blob, sha in store.view().blob_hashes.items() if blob == "prompt-reach"]
    forget(store, ["sums"], purge=True)
    assert store.find_bytes(gone) == {}
    never = filled(place, tmp_path / "never", ("letters", "turned"), **WAYS[name])
    ours, theirs = store.view(), never.workspace.store.view()
    np.testing.assert_allclose(ours.keys(), theirs.keys(), atol=1e-4)
    assert ours.blob("prompt-reach") == theirs.blob("prompt-reach")
    assert PromptState.load(ours) is not None
    known = attached(opened(place, tmp_path / "copy", **WAYS[name]))
    torch.testing.assert_close(known.weights(ASKED), attached(never).weights(ASKED))


@pytest.mark.parametrize("name", ["block", "prefix", "token clusters"])
def test_a_loaded_memory_knows_how_it_is_asked(
    place: Path, memories: dict[str, Path], name: str
) -> None:
    model = memtool.load(memories[name] / "memory").attach()
    expected = attached(read(place, memories, name))
    assert isinstance(model, RoutedTexts)
    torch.testing.assert_close(model.weights(ASKED), expected.weights(ASKED))
    assert model.generate(ASKED, most=4) == expected.generate(ASKED, most=4)


@pytest.mark.parametrize("name", ["token", "clusters"])
def test_what_comes_later_gets_its_keys_beside_the_others(
    place: Path, memories: dict[str, Path], tmp_path: Path, name: str
) -> None:
    parts = filled(place, tmp_path / "parts", ("letters", "sums"), **WAYS[name])
    file = write_prompts(tmp_path / "turned.jsonl", {"turned": PROMPTS["turned"]})
    parts.collect([str(place / "adapters" / "turned")], file)
    assert parts.attach().names == ("letters", "sums")  # type: ignore[union-attr]
    parts.consolidate()
    whole = read(place, memories, name).workspace.store.view().keys()
    np.testing.assert_allclose(parts.workspace.store.view().keys(), whole, atol=1e-4)


@pytest.mark.parametrize("name", ["block", "token"])
def test_what_is_wide_is_narrowed_and_asked_alike(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The keys of narrowed states are widened once; states of a running pass stay as they are."""
    monkeypatch.setattr(looks, "PART_WIDE", 8)
    method = filled(place, tmp_path / "m", **WAYS[name])
    routing, lm = method.read().routing, method.workspace.backbone
    assert method.look.width(lm) == (16 if name == "token" else 24)
    if name == "block":
        seen = looks_of(method.workspace, ASKED, method.look)
        torch.testing.assert_close(seen[:1], looks_of(method.workspace, ASKED[:1], method.look))
        assert routing.weights(seen).shape == (4, 2, 3)
        return
    assert isinstance(routing, TokenRouting)
    rows = token_looks(method.workspace, ASKED[:1], 100)
    expected = routing.weights(rows)  # (tokens, blocks, adapters), of narrowed states
    found = routing.by_token(lm, lm.encode(ASKED[:1]).tokens)[0]
    torch.testing.assert_close(found[0], expected[:, 0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["token", "prefix"])
def test_a_bounded_number_of_tokens_is_seen_evenly(place: Path, tmp_path: Path, name: str) -> None:
    method = opened(place, tmp_path, **WAYS[name])
    whole = np.concatenate([states(method, prompt) for prompt in ASKED], axis=1)
    found = token_looks(method.workspace, ASKED, 1000, prefix=name == "prefix").double().numpy()
    np.testing.assert_allclose(found, np.concatenate([*whole], axis=1), atol=1e-4)
    some = token_looks(method.workspace, ASKED, 5, prefix=name == "prefix").double().numpy()
    rows = np.linspace(0, len(found) - 1, 5).astype(int)
    np.testing.assert_allclose(some, found[rows], atol=1e-4)


def test_columns_of_a_root_are_a_root_of_what_a_block_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 12, generator=generator)
    whole, apart = moments_of(rows, 1, 0), moments_of(rows, 1, 0, 4)
    assert (tuple(whole["root"].shape), tuple(apart["root"].shape)) == ((12, 12), (4, 12))
    away = (rows - rows.mean(dim=0)).double()
    for own in torch.arange(12).split(4):
        scatter = away[:, own].T @ away[:, own]
        for kept in (whole, apart):
            root = kept["root"][:, own].double()
            torch.testing.assert_close(root.T @ root, scatter, atol=1e-4, rtol=1e-4)


def test_clusters_are_never_empty_and_are_those_that_stand_apart() -> None:
    rows = torch.tensor([[0.0, 0], [9, 9], [0, 1], [9, 8], [0, 0]])
    owners = clustered(rows, 2, 3)
    assert len({*owners[[0, 2, 4]].tolist()}) == len({*owners[[1, 3]].tolist()}) == 1
    assert owners[0] != owners[1]
    assert clustered(rows, 9, 0).unique().tolist() == [*range(int(clustered(rows, 9, 0).max()) + 1)]
    assert clustered(torch.ones(4, 2), 3, 0).tolist() == [0, 0, 0, 0]
    assert torch.equal(clustered(rows, 3, 7), clustered(rows, 3, 7))


# What each gives --------------------------------------------------------------------------------


def test_the_mixture_of_blocks_is_one_adapter(
    place: Path, memories: dict[str, Path], tmp_path: Path
) -> None:
    soft = opened(place, memories["block"], **WAYS["block"], **{"memory.beta": 0.001})
    result = soft.retrieve(prompt="after 7 and", out=tmp_path / "mixture")
    assert result.block_numbers == (0, 1)
    assert result.blocks[0] != result.blocks[1]
    lm, routing = soft.workspace.backbone, soft.read().routing
    tokens = lm.encode(["after 7 and"]).tokens
    with torch.no_grad():
        expected = lm.logits(tokens, routing.recalled(lm, tokens))
    other = opened(place, tmp_path / "other")
    other.collect([str(tmp_path / "mixture")])
    found = other.attach(task="mixture")(tokens)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    token = read(place, memories, "token")
    with pytest.raises(ConfigError, match="every token has a mixture of its own"):
        token.retrieve(prompt="a", out=tmp_path / "none")


def test_an_explanation_shows_blocks_and_tokens(
    place: Path, memories: dict[str, Path], tmp_path: Path
) -> None:
    found = read(place, memories, "block").explain(prompt=ASKED[0])
    assert (found.scope, found.block_numbers, found.columns) == ("block", (0, 1), ())
    method = read(place, memories, "token")
    page, plot = tmp_path / "page.html", tmp_path / "plot.svg"
    found = method.explain(prompt=ASKED[0], out=page)
    lm = method.workspace.backbone
    assert found.columns == tuple(lm.token_texts(lm.encode(ASKED[:1]).tokens[0].tolist()))
    assert np.array(found.tokens).shape == (len(found.columns), 3)
    np.testing.assert_allclose(np.array(found.tokens).sum(axis=1), 1, atol=1e-5)
    means = [part.coefficient for part in found.adapters]
    np.testing.assert_allclose(np.array(found.tokens).mean(axis=0), means, atol=1e-5)
    assert "every token of the prompt" in page.read_text(encoding="utf-8")
    one = method.explain(prompt=ASKED[0], block=1, out=plot)
    assert one.tokens != found.tokens
    assert plot.stat().st_size > 1000
    with pytest.raises(ConfigError, match="--block 2 of a model of 2 blocks"):
        method.explain(prompt=ASKED[0], block=2)
    with pytest.raises(ConfigError, match="--layer and --block"):
        read(place, memories, "block").explain(prompt=ASKED[0], block=1)


@pytest.mark.parametrize("name", ["model", "block", "token"])
def test_a_strange_prompt_is_called_unlike(
    place: Path, memories: dict[str, Path], name: str
) -> None:
    method = read(place, memories, name)
    view = method.workspace.store.view()
    own = [method.novelty(view, p) for asked in PROMPTS.values() for p in asked]
    assert max(one for one in own if one is not None) < 1
    result = method.retrieve(prompt="zzzz\nzzzz\nqqqq:::::qqqq")
    assert result.novelty is not None
    assert result.novelty > 1.2
    assert result.unlike
    assert not method.retrieve(prompt=PROMPTS["sums"][0]).unlike


@pytest.mark.usefixtures("no_page")
def test_a_stream_is_learned_and_measured_under_every_scope(place: Path, tmp_path: Path) -> None:
    from memtool.experiments.run import run

    losses = {}
    for name in ("model", "block", "prefix"):
        where = tmp_path / name
        if losses:  # adapters do not depend on it
            shutil.copytree(tmp_path / "model" / "runs", where / "runs")
        config = opened(place, where, **WAYS[name], **{"memory.beta": 0.001}).config
        (record,) = run(config, baselines=False)
        losses[name] = record.row("memory").metrics["loss.final"]
        compared = opened(place, where, **WAYS[name]).evaluate(compare=True)
        rows = [row.id for row in compared.metrics.rows]
        assert rows == ["memory", "hard", "uniform", "frozen", "oracle"]
        assert opened(place, where, **WAYS[name]).retrieve(task="sums").loss is not None
    assert len({*losses.values()}) == 3


# Keys that learn --------------------------------------------------------------------------------

LEARNING = {"consolidate.epochs": 20, "consolidate.lr": 0.5, "memory.beta": 0.001}


def right(method: PromptMemory) -> float:
    """The mean weight of the right adapter over all example prompts."""
    model = attached(method)
    found = [model.weights(asked)[:, i].mean() for i, asked in enumerate(PROMPTS.values())]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("name", ["model", "block", "token", "clusters"])
def test_keys_learn_on_and_that_is_remembered(place: Path, tmp_path: Path, name: str) -> None:
    where = tmp_path / "m"
    plain = filled(place, where, **{**WAYS[name], "memory.beta": 0.001})
    before, closed = right(plain), plain.workspace.store.view().keys()
    changes = {**WAYS[name], **LEARNING}
    method = opened(place, where, **changes)
    assert not method.consolidate().unchanged
    assert right(method) > before + 0.001
    state = PromptState.load(method.workspace.store.view())
    assert state is not None
    assert (state.epochs, state.lr) == (20, 0.5)
    assert method.consolidate().unchanged
    learned = method.workspace.store.view().keys()
    assert not opened(place, where, **{**changes, "consolidate.lr": 0.1}).consolidate().unchanged
    method.consolidate()
    np.testing.assert_array_equal(method.workspace.store.view().keys(), learned)
    opened(place, where, **{**WAYS[name], "memory.beta": 0.001}).consolidate()
    np.testing.assert_allclose(plain.workspace.store.view().keys(), closed, atol=1e-6)


def test_keys_that_learned_are_in_closed_form_again_where_one_is_forgotten(
    place: Path, tmp_path: Path
) -> None:
    method = filled(place, tmp_path / "m", **LEARNING)
    forget(method.workspace.store, ["sums"])
    never = filled(place, tmp_path / "n", ("letters", "turned"), **{"memory.beta": 0.001})
    ours, theirs = method.workspace.store.view(), never.workspace.store.view()
    np.testing.assert_allclose(ours.keys(), theirs.keys(), atol=1e-4)
    state = PromptState.load(ours)
    assert state is not None
    assert (state.epochs, state.lr) == (0, None)
    assert not method.consolidate().unchanged  # they learn again, without the forgotten


def test_keys_learn_from_the_prompts_of_a_stream(place: Path, tmp_path: Path) -> None:
    method = opened(place, tmp_path, **LEARNING)
    for task in "12":
        method.adapt(task)
        method.write()
        method.consolidate()
    state = PromptState.load(method.workspace.store.view())
    assert state is not None
    assert state.epochs == 20
    assert method.consolidate().unchanged


def test_keys_cannot_learn_without_prompts(place: Path, tmp_path: Path) -> None:
    method = opened(place, tmp_path, **LEARNING)
    method.collect([str(place / "adapters")], place / "prompts.jsonl")
    with pytest.raises(DataError, match="'letters' were not kept") as caught:
        method.consolidate()
    assert "--keep-prompts" in (caught.value.remedy or "")
    method.collect([str(place / "adapters")], place / "prompts.jsonl", keep_prompts=True)
    assert not method.consolidate().unchanged


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory.scope": "block", "memory.look_at": ("tokens",)}, "under memory.scope block"),
        ({"memory.scope": "block", "memory.look_at": 1}, "memory.look_at block:1 under"),
        ({"memory.scope": "token"}, "memory.look_at blocks,tokens under memory.scope token"),
        ({"memory.look_at": ("prefix",)}, "memory.look_at prefix under memory.scope model"),
        ({"consolidate.value_lr": 0.1}, "consolidate.value_lr 0.1 on a stream of texts"),
    ],
)
def test_what_makes_no_sense_is_refused(
    place: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    from memtool.methods import open_method

    config = opened(place, tmp_path, **changes).config
    with pytest.raises(ConfigError, match=said) as caught:
        open_method(config, seed=0)
    key, _, value = (caught.value.remedy or "").removeprefix("--set ").partition("=")
    helped = {**changes, key: tuple(value.split(",")) if key == "memory.look_at" else float(value)}
    open_method(opened(place, tmp_path, **helped).config, seed=0)


@pytest.mark.parametrize(
    "changes",
    [{"memory.scope": "block"}, {"memory.clusters": 3}, {"memory.look_at": ("final",)}],
)
def test_a_memory_is_asked_as_it_was_made(
    place: Path, memories: dict[str, Path], changes: dict[str, object]
) -> None:
    (key,) = changes
    other = opened(place, memories["model"], **changes)
    for ask in (other.consolidate, other.read, other.attach):
        with pytest.raises(ConfigError, match=key) as caught:
            ask()
        assert f"--set {key}=" in (caught.value.remedy or "")


def test_blobs_say_how_prompts_were_looked_at(place: Path, memories: dict[str, Path]) -> None:
    view = read(place, memories, "token").workspace.store.view()
    said = json.loads(view.blob("prompt-keys"))
    assert (said["scope"], said["apart"], said["parts"]) == ("token", [2, 16], 3)
    state = PromptState.load(view)
    assert state is not None
    assert state.rows == (1, 1, 1)
    assert state.adapters == view.ids
    assert PromptLook(("blocks", "tokens"), apart=True).blocks(2) == {0, 1}


@pytest.mark.parametrize("name", ["model", "block", "clusters"])
def test_what_is_known_of_earlier_adapters_is_not_read_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(prompt_reach, "MOST_MEASURED", 1)  # of how far prompts reach: the first
    first, second, last = SHAPES
    method = filled(place, tmp_path / "m", (first, second), **WAYS[name])
    file = write_prompts(tmp_path / "last.jsonl", {last: PROMPTS[last]})
    method.collect([str(place / "adapters" / last)], file)
    store, read_blobs = method.workspace.store, list[str]()
    honest = memtool_stores.MemoryView.blob

    def blob(view: memtool_stores.MemoryView, wanted: str) -> bytes:
        read_blobs.append(wanted)
        return honest(view, wanted)

    monkeypatch.setattr(memtool_stores.MemoryView, "blob", blob)
    method.consolidate()
    monkeypatch.setattr(memtool_stores.MemoryView, "blob", honest)
    ids = [record.id for record in store.view().adapters]
    looks_read = [one for one in read_blobs if one.startswith("looks.")]
    assert f"looks.{ids[1]}" not in looks_read
    assert looks_read.count(f"looks.{ids[0]}") == 1
    together = filled(place, tmp_path / "t", **WAYS[name]).workspace.store.view()
    np.testing.assert_array_equal(store.view().keys(), together.keys())
    for kept in ("asked", "prompt-reach"):
        assert store.view().blob(kept) == together.blob(kept)
        assert store.view().blob(f"{kept}.0") == together.blob(f"{kept}.0")
    assert method.consolidate().unchanged


def test_other_prompts_of_an_earlier_adapter_are_counted_anew(place: Path, tmp_path: Path) -> None:
    method = filled(place, tmp_path / "m")
    other = {"sums": PROMPTS["sums"][:-1]}
    method.collect([str(place / "adapters" / "sums")], write_prompts(tmp_path / "o.jsonl", other))
    method.consolidate()
    changed = {**PROMPTS, **other}
    never = opened(place, tmp_path / "n")
    folders = [str(place / "adapters" / name) for name in SHAPES]
    never.collect(folders, write_prompts(tmp_path / "n.jsonl", changed))
    never.consolidate()
    ours, theirs = (one.workspace.store.view() for one in (method, never))
    np.testing.assert_array_equal(ours.keys(), theirs.keys())
    assert ours.blob("prompt-reach") == theirs.blob("prompt-reach")
