"""Keys before any learning: one for every class of an adapter's task, against the obvious sums."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from memtool.errors import ConfigError
from memtool.memories.closed_form import SHRINKAGE, QueryStatistics
from memtool.memories.keyed import KeyedMemory
from memtool.methods.forget import forget
from memtool.methods.mira.count import count_queries
from memtool.methods.mira.keys import Draws, start_keys
from memtool.methods.mira.method import Mira
from memtool.methods.mira.state import MemoryState
from memtool.methods.mira.sums import Asked
from memtool.sections import ConsolidateSettings, MemorySettings
from memtool.settings import HeadSettings
from tests.methods.conftest import learn, small_config

DIM = 6
CLASSES = (3, 1, 2)
"""Of three tasks of unequal size."""

ADAPTERS = (0, 1, 2, 2)
"""The task of every adapter: the last has two."""

NO_DRAWS = Draws(0, (), (), 0)


def keys_of(learning, memory, parts, adapter_tasks, draws=NO_DRAWS) -> Tensor:
    """The keys of tasks whose queries were counted."""
    asked = Asked.of(parts, by_class=memory.keys_of == "class")
    return start_keys(learning, memory, asked, adapter_tasks, draws)


def counted(*, by_class: bool = True) -> tuple[list[QueryStatistics], Tensor]:
    """Moments of the queries of every task, and all queries (2, n, DIM)."""
    generator = torch.Generator().manual_seed(0)
    parts, shown = [], []
    for number, classes in enumerate(CLASSES):
        labels = np.arange(40 * classes) % classes + 10 * number
        centres = 2 * torch.randn(2, classes, DIM, generator=generator)
        noise = torch.randn(2, len(labels), DIM, generator=generator)
        queries = centres[:, torch.from_numpy(labels % 10)] + noise
        parts.append(count_queries(queries, labels, by_class=by_class))
        shown.append(queries)
    return parts, torch.cat(shown, dim=1)


def coefficients(memory: MemorySettings, keys: Tensor, queries: Tensor) -> list[Tensor]:
    whole = KeyedMemory.from_settings(memory, (0, 1), DIM, keys)
    asked = torch.cat([queries, torch.ones_like(queries[..., :1])], dim=-1)
    return [whole[block].answer(asked[block]).detach() for block in whole.blocks]


def settings(**changes: object) -> MemorySettings:
    return MemorySettings(**{"keys_of": "class", "query_norm": False, **changes})


@pytest.mark.parametrize("beta", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("similarity", ["dot", "scaled-dot"])
def test_a_coefficient_is_the_posterior_of_all_classes_of_the_task(similarity, beta):
    parts, queries = counted()
    memory = settings(similarity=similarity, beta=beta)
    keys = keys_of(ConsolidateSettings(), memory, parts, ADAPTERS)
    assert keys.shape == (2, len(ADAPTERS), max(CLASSES) * (DIM + 1))
    rule = QueryStatistics.joined(parts)._moments.lda(SHRINKAGE, equal_priors=True)
    for block, found in enumerate(coefficients(memory, keys, queries)):
        scores = queries[block].double() @ rule.weight[block].T + rule.bias[block]
        by_class = (beta * scores).softmax(dim=1).split(list(CLASSES), dim=1)
        by_task = [share.sum(dim=1) for share in by_class]
        expected = torch.stack([by_task[0], by_task[1], by_task[2] / 2, by_task[2] / 2], dim=1)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("routing", ["lda", "prototype"])
def test_hard_routing_follows_the_best_class(routing):
    parts, queries = counted()
    memory = settings(routing=routing)
    keys = keys_of(ConsolidateSettings(), memory, parts, ADAPTERS)
    owner = torch.repeat_interleave(torch.arange(len(CLASSES)), torch.tensor(CLASSES))
    whole = QueryStatistics.joined(parts)
    for block, found in enumerate(coefficients(memory, keys, queries)):
        if routing == "lda":
            rule = whole._moments.lda(SHRINKAGE, equal_priors=True)
            scores = queries[block].double() @ rule.weight[block].T + rule.bias[block]
        else:
            means = whole._moments.means()[block]
            scores = -torch.cdist(queries[block].double(), means)
        right = owner[scores.argmax(dim=1)]
        by_task = torch.stack([found[:, 0], found[:, 1], found[:, 2] + found[:, 3]], dim=1)
        assert torch.equal(by_task.argmax(dim=1), right)
        assert torch.allclose(by_task.sum(dim=1), torch.ones(len(right)))


def test_counting_by_class_loses_nothing():
    found = [
        keys_of(
            ConsolidateSettings(),
            MemorySettings(),
            counted(by_class=by_class)[0],
            ADAPTERS,
        )
        for by_class in (True, False)
    ]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "learning", "said"),
    [
        ({"separation": "affine"}, {}, "posterior of the classes"),
        ({"separation": "sparsemax"}, {}, "posterior of the classes"),
        ({"similarity": "euclidean"}, {}, "posterior of the classes"),
        ({}, {"epochs": 2}, "keys in closed form"),
        ({}, {"keys": "random"}, "keys in closed form"),
    ],
)
def test_what_keys_of_classes_do_not_go_with(changes, learning, said):
    parts, _ = counted()
    with pytest.raises(ConfigError, match="keys_of class") as caught:
        keys_of(ConsolidateSettings(**learning), settings(**changes), parts, ADAPTERS)
    assert said in (caught.value.expected or "")


def test_a_memory_with_keys_of_classes_learns_forgets_and_keeps_its_kind(tmp_path):
    config = small_config(tmp_path, memory__keys_of="class")
    mira = learn(Mira.open(config, seed=0))
    assert mira.evaluate().row("memory").metrics["task_accuracy"] > 0.9
    assert mira.snapshot().view.keys().shape == (1, 3, 10 * (mira.workspace.backbone.dim + 1))
    other = small_config(tmp_path, memory__keys_of="task")
    with pytest.raises(ConfigError, match=r"memory\.keys_of"):
        Mira.open(other, seed=0).consolidate()
    forget(mira.workspace.store, ["inverted"])
    reopened = Mira.open(config, seed=0)
    assert reopened.snapshot().view.keys().shape == (1, 2, 10 * (mira.workspace.backbone.dim + 1))
    assert reopened.consolidate().unchanged


@pytest.mark.parametrize("changes", [{}, {"keys_of": "task"}, {"routing": "lda"}])
def test_solved_keys_are_not_projected(changes):
    parts, _ = counted()
    keys = "random" if "routing" in changes else "closed-form"  # a hard routing solves its own
    learning = ConsolidateSettings(protect="dual-gpm", keys=keys)
    with pytest.raises(ConfigError, match="closed form under --protect dual-gpm"):
        keys_of(learning, settings(**changes), parts, ADAPTERS)


@pytest.mark.parametrize("topk", [1, 2, 9])
def test_a_cut_keeps_the_adapters_whose_classes_are_likeliest_together(topk):
    parts, queries = counted()
    whole = settings(beta=0.3)
    keys = keys_of(ConsolidateSettings(), whole, parts, (0, 1, 2))
    cut = settings(beta=0.3, separation="topk", topk=topk)
    assert torch.equal(keys_of(ConsolidateSettings(), cut, parts, (0, 1, 2)), keys)
    both = zip(coefficients(whole, keys, queries), coefficients(cut, keys, queries), strict=True)
    for all_of_them, found in both:
        for row, kept in zip(all_of_them.tolist(), found.tolist(), strict=True):
            best = sorted(range(3), key=lambda place: -row[place])[:topk]
            total = sum(row[place] for place in best)
            expected = [row[place] / total if place in best else 0.0 for place in range(3)]
            assert kept == pytest.approx(expected, abs=1e-6)


def test_a_random_key_depends_on_seed_task_and_block_alone():
    learning, memory = ConsolidateSettings(keys="random", key_std=0.5), settings(keys_of="task")

    def drawn(numbers: list[int], adapter_tasks: tuple[int, ...], seed: int = 3) -> Tensor:
        draws = Draws(seed, numbers, (2, 7), DIM + 1)
        return start_keys(learning, memory, None, adapter_tasks, draws)

    whole = drawn([1, 4, 6], (0, 1, 2, 2))
    assert whole.shape == (2, 4, DIM + 1)
    # The same however many are there, in whatever order, and whatever was drawn before.
    assert torch.equal(drawn([1, 4], (0, 1)), whole[:, :2])
    assert torch.equal(drawn([6], (0,)), whole[:, 2:3])
    assert torch.equal(drawn([6, 1], (0, 1, 0)), whole[:, [2, 0, 3]])
    # All others differ: adapters, tasks, blocks, seeds.
    rows = torch.cat([*whole, *drawn([1, 4, 6], (0, 1, 2, 2), seed=4)])
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    # key_std is their spread.
    numbers = list(range(1, 400))
    many = Draws(0, numbers, (0,), 40).keys(range(399))
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02
    assert torch.equal(whole, 0.5 * Draws(3, [1, 4, 6], (2, 7), DIM + 1).keys((0, 1, 2, 2)))


def test_a_similarity_that_a_store_names_is_read_as_it_was_meant():
    """Until 0.1 `kl` and `reverse-kl` had each other's name."""
    state = MemoryState(
        memory=MemorySettings(similarity="kl"),
        head=HeadSettings(),
        tasks=(1,),
        adapters=("a",),
        adapter_tasks=(0,),
        class_names=("x", "y"),
        fingerprint="",
    )
    written = json.loads(state.model_dump_json())
    assert MemoryState.model_validate_json(json.dumps(written)) == state
    for named, meant in (("kl", "reverse-kl"), ("reverse-kl", "kl"), ("dot", "dot")):
        written["memory"]["similarity"] = named
        assert MemoryState.model_validate_json(json.dumps(written)).memory.similarity == meant
