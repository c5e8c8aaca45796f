"""How a memory is read: mixture, energy, decoder; what each of them is worth is not asked here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import memtool
from memtool.adapters.mixing import Mixture
from memtool.errors import ConfigError, CorruptError
from memtool.experiments.ablations import ABLATIONS, _sizes, besides
from memtool.memories import query
from memtool.memories.decoder import RankDecoder, numbers_of
from memtool.memories.keyed import KeyedMemory
from memtool.memories.query import QueryKind, QueryModule
from memtool.memories.separation import separation
from memtool.methods import open_method
from memtool.methods.forget import forget
from memtool.methods.merge import merge
from memtool.methods.mira.explain import explain
from memtool.methods.mira.look import Seen
from memtool.methods.mira.measure import Measure, _with_separation
from memtool.methods.mira.method import Mira
from memtool.methods.mira.protect import Protection
from memtool.methods.mira.read import (
    DECODERS,
    decoder_width,
    load_decoders,
    read_numbers,
)
from memtool.methods.mira.recall import MemoryModel, MemoryRecall
from memtool.methods.mira.state import MemoryState
from memtool.methods.subject import subject_of
from memtool.sections import MemorySettings
from memtool.settings import Config
from tests.methods.conftest import learn, small_config
from tests.methods.test_protect import Asked, hidden_states, memory_of

# A head that is solved on the training images knows them all, and leaves nothing to learn.
LEARNING = {
    "consolidate__keys": "random",
    "consolidate__key_std": 0.1,
    "consolidate__epochs": 1,
    "head__features": "recalled",
    "head__scope": "shared",
}
DECODER = {**LEARNING, "memory__read": "decoder", "memory__read_width": 6, "engine__threads": 1}


def decoding(folder: Path, **more: object) -> Config:
    return small_config(folder, **{**DECODER, **more})


@pytest.fixture(scope="module")
def _decoded(_learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoded")
    shutil.copytree(_learned / "runs", folder / "runs")
    learn(Mira.open(decoding(folder), seed=0))
    return folder


@pytest.fixture
def decoded(_decoded: Path) -> Mira:
    """Three tasks, keys and decoder learned in turn under freeze; for reading only."""
    return Mira.open(decoding(_decoded), seed=0)


@pytest.fixture
def decoded_copy(_decoded: Path, tmp_path: Path) -> Mira:
    """The same; a copy that a test may change."""
    shutil.copytree(_decoded, tmp_path / "copy")
    return Mira.open(decoding(tmp_path / "copy"), seed=0)


def images_of(mira: Mira, task: str = "2", count: int = 10) -> np.ndarray:
    return mira.workspace.task(task).test.images[:count]


def versions(mira: Mira) -> list[str]:
    """The versions of consolidations, in order."""
    log = mira.workspace.store.log()
    return [v.id for v in reversed(log) if v.message.startswith("consolidate")]


# The decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_decoder_that_learned_nothing_is_the_mixture(adapted, scope):
    mira = learn(Mira.open(small_config(adapted, memory__scope=scope), seed=0), each=False)
    images = torch.from_numpy(np.array(images_of(mira)))
    _, model, _ = mira.snapshot().consolidated()
    with torch.no_grad():
        features, weights = model.with_coefficients(images)
    places = 1 if scope == "block" else len(model.values.layout.blocks)
    for block in model.memory.blocks:
        here = model.memory[block]
        here.decoder = RankDecoder.fresh(
            here.query.dim, 4, places=places, adapters=3, rank=model.values.layout.rank
        )
    with torch.no_grad():
        again, same = model.with_coefficients(images)
        assert torch.equal(same, weights)
        torch.testing.assert_close(again, features, rtol=1e-6, atol=1e-6)
        for block in model.memory.blocks:
            model.memory[block].decoder.outer.bias += 0.2
        changed, _ = model.with_coefficients(images)
    assert not torch.allclose(changed, features, atol=1e-2)


def test_a_block_has_its_own_rows_of_the_decoder(decoded):
    """The recall of every block against the equation, one rank at a time."""
    _, model, _ = decoded.snapshot().consolidated()
    (block,) = model.memory.blocks
    here, blocks = model.memory[block], model.values.layout.blocks
    query = torch.randn(3, here.query.dim, generator=torch.Generator().manual_seed(0))
    recall = MemoryRecall(model, Seen(query, None))
    weights, rank = here.coefficients(query), model.values.layout.rank
    hidden = torch.nn.functional.gelu(query @ here.decoder.inner.weight.T + here.decoder.inner.bias)
    for place, adapted in enumerate(blocks):
        mixture = recall(adapted, torch.zeros(3, 1, model.backbone.dim))
        assert isinstance(mixture, Mixture)
        assert mixture.gate is not None
        for adapter in range(3):
            for k in range(rank):
                row = (adapter * len(blocks) + place) * rank + k
                added = hidden @ here.decoder.outer.weight[row] + here.decoder.outer.bias[row]
                expected = weights[:, adapter] + added
                torch.testing.assert_close(mixture.gate[:, adapter, k], expected)


def test_another_separation_keeps_the_decoder_where_that_is_asked(decoded):
    _, model, _ = decoded.snapshot().consolidated()
    images = torch.from_numpy(np.array(images_of(decoded)))
    with torch.no_grad():
        model.memory[model.memory.blocks[0]].decoder.outer.bias += 0.2
        as_read = model(images)
        assert torch.equal(
            _with_separation(model, lambda same: same, decoded=True)(images), as_read
        )
        whole = _with_separation(model, lambda same: same)(images)
    assert not torch.allclose(whole, as_read, atol=1e-2)


def test_it_learns_grows_and_older_rows_stay_bit_for_bit(decoded):
    store = decoded.workspace.store
    first, second, last = (load(store.view(v).blob(DECODERS)) for v in versions(decoded))
    assert [one["outer"].shape[1] for one in (first, second, last)] == [1, 2, 3]
    for older, newer, known in ((first, second, 1), (second, last, 2)):
        assert torch.equal(newer["inner"], older["inner"])
        assert torch.equal(newer["outer"][:, :known], older["outer"])
        assert torch.equal(newer["outer_bias"][:, :known], older["outer_bias"])
    assert bool(last["outer"].flatten(2).any(dim=2).all())  # every adapter's rows have learned


@pytest.mark.slow
def test_without_protection_all_of_it_learns(adapted):
    mira = learn(Mira.open(decoding(adapted, consolidate__protect="none"), seed=0), 2)
    first, last = (load(mira.workspace.store.view(v).blob(DECODERS)) for v in versions(mira))
    assert not torch.equal(last["inner"], first["inner"])
    assert not torch.equal(last["outer"][:, :1], first["outer"])


class Reading(nn.Module):
    """What a memory reads from hidden states as they are: weights by rank."""

    def __init__(self, memory: KeyedMemory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = []
        for block in self.memory.blocks:
            scores, added = self.memory.scores(block, hidden), self.memory.read(block, hidden).added
            found.append(scores[:, None, :, None] + added)
        return torch.stack(found)


def test_under_dual_gpm_past_inputs_have_the_answers_that_they_had():
    memory = memory_of("identity")
    generator = torch.Generator().manual_seed(5)
    for block in memory.blocks:
        decoder = RankDecoder.fresh(16, 24, places=2, adapters=3, rank=2, generator=generator)
        with torch.no_grad():
            decoder.outer.weight += 0.1 * torch.randn(decoder.outer.weight.shape)
        memory[block].decoder = decoder.double()
    reading, past_inputs, new_inputs = Reading(memory), hidden_states(1, count=8), hidden_states(2)
    past = Protection()
    past.observe(Asked(), reading, past_inputs.numpy(), start=1.0, progress=0.0)
    assert {"0.decoder.inner", "0.decoder.outer", "3.decoder.outer"} < set(past.pasts)
    old, new = reading(past_inputs).detach(), reading(new_inputs).detach()
    take_back = past.guard(memory)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (reading(new_inputs) - 1).square().mean().backward()
        optimizer.step()
        take_back()
    assert torch.allclose(reading(past_inputs), old, atol=1e-6)
    assert (reading(new_inputs) - 1).square().mean() < 0.5 * (new - 1).square().mean()


@pytest.mark.slow
def test_a_loaded_memory_says_the_same_and_so_does_its_program(decoded):
    images = torch.from_numpy(np.array(images_of(decoded)))
    _, model, head = decoded.snapshot().consolidated()
    scores, weights = Measure(decoded.workspace).recall(model, head, images.numpy())
    attached = memtool.load(decoded.config.store).attach()
    out = attached(images)
    torch.testing.assert_close(out.probabilities, head.probabilities(scores), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.weights, weights.mean(dim=1), rtol=0, atol=1e-5)
    pixels = attached.pixels(images)
    told = torch.export.export(attached, (pixels,)).module()(pixels)
    torch.testing.assert_close(told.probabilities, out.probabilities, rtol=0, atol=1e-5)


def test_an_adapter_taken_out_adds_nothing(decoded):
    """What `explain` says of the second adapter against a memory without its weight and rows."""
    told = explain(decoded, task="2")
    _, model, head = decoded.snapshot().consolidated()
    images = torch.from_numpy(np.array(subject_of(decoded.workspace, task="2").images.images))

    def said() -> torch.Tensor:
        with torch.no_grad():
            features, weights = model.with_coefficients(images)
            return head.probabilities(head(features, weights.mean(dim=1)))

    won = said().argmax(dim=1, keepdim=True)
    (block,) = model.memory.blocks
    memory = model.memory[block]
    rows, separate = memory.decoder.rows_each, memory.separation
    with torch.no_grad():
        memory.decoder.outer.weight[rows : 2 * rows] = 0
        memory.decoder.outer.bias[rows : 2 * rows] = 0
    memory.separation = lambda s: separate(s) * torch.tensor([1.0, 0.0, 1.0])
    without = told.adapters[1].without
    assert without is not None
    assert without.probability != told.outcome.probability
    assert without.probability == pytest.approx(float(said().gather(1, won).mean()), abs=1e-4)


def test_forgetting_takes_the_rows_of_an_adapter_along(decoded_copy):
    before = load(decoded_copy.workspace.store.view().blob(DECODERS))
    forget(decoded_copy.workspace.store, ["2"])
    mira = Mira.open(decoded_copy.config, seed=0)
    after = load(mira.workspace.store.view().blob(DECODERS))
    assert torch.equal(after["inner"], before["inner"])
    assert torch.equal(after["outer"], before["outer"][:, [0, 2]])
    assert mira.evaluate().row("memory").metrics["faa"] > 0
    forget(mira.workspace.store, ["1", "3"])
    assert DECODERS not in mira.workspace.store.view().blobs()


def test_merging_leaves_it_and_consolidation_lets_it_grow(decoded_copy, adapted, tmp_path):
    config = small_config(adapted, **LEARNING)
    other = Mira.open(config.model_copy(update={"store": str(tmp_path / "other")}), seed=0)
    other.adapt("3")
    other.write()
    forget(decoded_copy.workspace.store, ["3"])
    before = load(decoded_copy.workspace.store.view().blob(DECODERS))
    merge(decoded_copy.config.store, other.config.store, ["3"])
    mira = Mira.open(decoded_copy.config, seed=0)
    mira.consolidate()
    after = load(mira.workspace.store.view().blob(DECODERS))
    assert after["outer"].shape[1] == before["outer"].shape[1] + 1
    assert torch.equal(after["outer"][:, :2], before["outer"])


def test_what_is_no_mixture_of_whole_adapters_is_not_written_as_one(decoded, tmp_path):
    with pytest.raises(ConfigError, match="no mixture of whole adapters") as told:
        decoded.retrieve(task="2", out=tmp_path / "out")
    assert "memtool export --model" in str(told.value)
    assert not (tmp_path / "out").exists()
    assert sum(one.coefficient for one in decoded.retrieve(task="2").adapters) == pytest.approx(1)


def test_a_decoder_of_another_memory_is_refused(decoded):
    snapshot = decoded.snapshot()
    _, model, _ = snapshot.consolidated()
    parts = load(snapshot.view.blob(DECODERS))
    settings = decoded.config.memory
    wrong = {
        "fewer adapters": {
            **parts,
            "outer": parts["outer"][:, :2],
            "outer_bias": parts["outer_bias"][:, :2],
        },
        "another width": {**parts, "inner": parts["inner"][:, :, :-1]},
        "no part": {k: v for k, v in parts.items() if k != "inner"},
        "a hidden layer of two widths": {**parts, "inner_bias": parts["inner_bias"][:, :-1]},
    }
    for tensors in wrong.values():
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        with pytest.raises(CorruptError, match="blob 'decoders'"):
            load_decoders(model.memory, settings, model.values, data)


# Settings ---------------------------------------------------------------------------------------


def test_a_memory_of_before_is_read_as_a_mixture(learned):
    view = learned.workspace.store.view()
    document = MemoryState.load(view).model_dump(mode="json")
    for name in ("read", "read_steps", "read_rate", "read_width"):
        assert name in MemorySettings.later
        del document["memory"][name]
    assert MemoryState.model_validate(document).memory.read == "mixture"


def test_no_step_of_energy_is_the_mixture_and_needs_no_new_learning(learned_copy):
    # Closed-form keys are sure of these digits, and settle where they are.
    soft = learned_copy.config.memory.model_copy(update={"beta": 0.01})
    plain = Mira.open(learned_copy.config.model_copy(update={"memory": soft}), seed=0)
    plain.consolidate()
    images = images_of(plain)
    _, model, head = plain.snapshot().consolidated()
    before, weights = Measure(plain.workspace).recall(model, head, images)
    found = {}
    for steps in (0, 3):
        memory = soft.model_copy(update={"read": "energy", "read_steps": steps})
        mira = Mira.open(learned_copy.config.model_copy(update={"memory": memory}), seed=0)
        mira.consolidate()
        _, moving, head = mira.snapshot().consolidated()
        assert torch.equal(moving.memory.keys(), model.memory.keys())
        found[steps] = Measure(mira.workspace).recall(moving, head, images)
    assert torch.equal(found[0][0], before)
    assert torch.equal(found[0][1], weights)
    assert not torch.equal(found[3][1], weights)
    assert torch.allclose(found[3][1].sum(dim=-1), torch.ones(()))
    out = mira.attach()(torch.from_numpy(np.array(images)))
    torch.testing.assert_close(out.weights, found[3][1].mean(dim=1), rtol=0, atol=1e-5)


def test_a_hard_choice_is_what_the_settled_query_weighs_most(learned_copy):
    _, model, _ = learned_copy.snapshot().consolidated()
    energy = {"read": "energy", "read_steps": 3, "read_rate": 0.7, "scope": "model", "beta": 0.5}
    settings = MemorySettings.model_validate(energy)
    drawn = torch.Generator().manual_seed(0)
    (block,) = model.memory.blocks
    dim = model.memory[block].query.dim
    keys = torch.randn(1, 5, dim + 1, generator=drawn)
    memory = KeyedMemory.from_settings(settings, (block,), dim, keys)
    read = MemoryModel(model.backbone, model.values, memory, settings, model.look)
    hard = _with_separation(read, lambda _: separation("max"))
    queries = torch.randn(200, dim, generator=drawn)
    with torch.no_grad():
        weights = read.memory.coefficients(block, queries)
        chosen = hard.memory.coefficients(block, queries)
    assert torch.equal(chosen, torch.nn.functional.one_hot(weights.argmax(dim=1), 5).float())
    moved = KeyedMemory.from_settings(
        settings.model_copy(update={"read": "mixture"}), (block,), dim, keys
    )
    assert not torch.equal(moved.coefficients(block, queries).argmax(dim=1), weights.argmax(dim=1))


def test_learned_keys_are_not_read_in_another_way(decoded_copy):
    memory = decoded_copy.config.memory.model_copy(update={"read": "mixture"})
    mira = Mira.open(decoded_copy.config.model_copy(update={"memory": memory}), seed=0)
    with pytest.raises(ConfigError, match=r"learned under memory\.read decoder") as told:
        mira.consolidate()
    assert "--set memory.read=decoder" in str(told.value)


@pytest.mark.parametrize(
    ("values", "what", "remedy"),
    [
        ({"memory__separation": "affine"}, "memory.separation affine", "memory.separation=softmax"),
        ({"memory__similarity": "cosine"}, "memory.similarity cosine", "similarity=scaled-dot"),
        ({"memory__routing": "lda"}, "memory.routing lda", "memory.routing=mixture"),
        ({"memory__read": "decoder"}, "consolidate.epochs 0", "consolidate.epochs=4"),
        ({**DECODER, "memory__mix": "params"}, "memory.mix params", "memory.mix=delta"),
        (
            {"stream__setting": "trace", "stream__source": "text_cl5", "stream__order": None},
            "memory.read energy on a stream of texts",
            "memory.read=mixture",
        ),
    ],
)
def test_what_cannot_be_read_so_is_refused(values, what, remedy, tmp_path):
    config = small_config(tmp_path, **{"memory__read": "energy", **values})
    with pytest.raises(ConfigError, match=what) as told:
        open_method(config, seed=0)
    assert remedy in str(told.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("read", "hopfield"),
        ("read_steps", -1),
        ("read_steps", 101),
        ("read_rate", 0),
        ("read_rate", 1.5),
        ("read_width", 0),
        ("read_width", "wide"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, tmp_path):
    with pytest.raises(ConfigError, match=name):
        small_config(tmp_path, **{f"memory__{name}": value})


# Sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", get_args(QueryKind))
def test_a_query_module_learns_as_many_numbers_as_are_counted(kind):
    parameters = QueryModule(kind, 12).parameters()
    assert query.numbers_of(kind, 12) == sum(one.numel() for one in parameters)


def test_keys_without_a_bias_are_counted_without_it(tmp_path):
    found = {}
    for bias in (True, False):
        more = {**LEARNING, "memory__key_bias": bias, "memory__query": "plain-mlp"}
        mira = Mira.open(small_config(tmp_path, **more), seed=0)
        found[bias] = mira.cost(numbers=1, parameters=0, tokens=0)
    assert found[True]["read_numbers"] - found[False]["read_numbers"] == 3
    assert found[True]["keys_bytes"] - found[False]["keys_bytes"] == 3 * 4


@pytest.mark.parametrize("module", ["linear", "mlp"])
def test_a_decoder_is_as_large_as_a_query_module(module):
    plain = MemorySettings(query=module)
    decoder = MemorySettings(read="decoder", read_width=module)
    for memories, rows in ((1, 192), (12, 16)):
        most = read_numbers(plain, 192, memories=memories, rows=rows)
        found = read_numbers(decoder, 192, memories=memories, rows=rows)
        assert most - memories * (192 + 1 + rows) < found <= most
    named = MemorySettings(read="decoder", read_width=5)
    assert read_numbers(named, 192, memories=2, rows=16) == 2 * numbers_of(5, 192, 16)
    with pytest.raises(ConfigError, match="one hidden unit over 40000 ranks") as told:
        decoder_width(decoder, 192, 40_000)
    assert "--set memory.read_width=8" in str(told.value)


def test_the_plan_counts_what_the_memory_then_has(decoded):
    cost = decoded.cost(numbers=1, parameters=0, tokens=0)
    snapshot = decoded.snapshot()
    _, model, _ = snapshot.consolidated()
    assert cost["read_width"] == 6
    assert cost["read_numbers"] == sum(p.numel() for p in model.memory.parameters())
    assert cost["read_numbers"] == decoded.reading_numbers(snapshot.view)
    assert cost["adapter_numbers"] == model.values.flat().numel()


def test_an_ablation_compares_readings_of_one_size(tmp_path):
    config = small_config(tmp_path, memory__mix="params", memory__similarity="cosine")
    variants = ABLATIONS["read"].variants(config)
    assert [*variants] == ["mixture", "mixture-linear", "energy-linear", "decoder-linear"]
    shared = besides(config, "read")
    assert shared["memory.mix"] == ("params", "delta")
    assert shared["memory.similarity"] == ("cosine", "scaled-dot")
    assert shared["consolidate.epochs"] == (0, 4)
    numbers = []
    for one in variants.values():
        values = {key.replace(".", "__"): value for key, value in one.items()}
        said = _sizes(small_config(tmp_path, **values), 0)
        numbers.append(int(said.split()[1].replace(",", "")))
    for name in ("read", "query"):  # under freeze a query module of one adapter never learns
        assert besides(small_config(tmp_path), name)["consolidate.protect"] == (
            "freeze",
            "none" if name == "read" else "dual-gpm",
        )
        several = small_config(tmp_path, adapter__per_task=2)
        assert "consolidate.protect" not in besides(several, name)
    plain, linear, energy, decoder = numbers
    assert plain < decoder <= linear == energy
    assert linear - decoder < 400
