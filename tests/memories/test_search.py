"""The search among many keys against all scores, in float64."""

from __future__ import annotations

import pytest
import torch

from memtool.memories import search
from memtool.memories.keyed import KeyedMemory
from memtool.memories.search import SEARCHED, KeySearch
from memtool.memories.similarity import SIMILARITIES, SimilarityFunction
from memtool.sections import MemorySettings
from tests.memories.many_keys import READ, draw, highest, require_alike_after_a_change, twice

FORMATS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("score", SEARCHED)
@pytest.mark.parametrize(("count", "of"), [(1, 300), (4, 300), (9, 700), (20, 20), (7, 5)])
def test_the_highest_of_all_keys_are_near(
    score: SimilarityFunction, constant: bool, dtype: torch.dtype, count: int, of: int
) -> None:
    keys, queries = draw(of, 6) * draw(of, 1, seed=2).exp(), draw(5, 6, seed=1)
    if constant:
        queries[:, -1] = 1.0
        keys[:, -1] = 100 * keys[:, -1] - 3000
    near = KeySearch(keys, score, constant=constant, dtype=dtype).near(queries, count)
    assert torch.equal(near, near.unique())
    assert set(highest(score, queries, keys, count).flatten().tolist()) <= {*near.tolist()}


@pytest.mark.parametrize("dtype", FORMATS)
def test_keys_that_differ_by_less_than_the_format_shows_are_told_apart(dtype: torch.dtype) -> None:
    keys = draw(1, 40).repeat(2000, 1)
    keys[:, 0] += torch.arange(2000).flip(0) * 1e-5
    near = KeySearch(keys, SIMILARITIES["dot"], dtype=dtype).near(keys.new_ones(1, 40), 3)
    assert {0, 1, 2} <= {*near.tolist()}


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("score", SEARCHED)
def test_few_of_many_keys_are_near(score: SimilarityFunction, constant: bool) -> None:
    keys, queries = draw(5000, 64), draw(8, 64, seed=1)
    if constant:  # as those in closed form, whose last entry is −|k|² / 2 or so
        queries[:, -1], keys[:, -1] = 1.0, -keys[:, :-1].square().sum(dim=1) / 2
    search = KeySearch(keys, score, constant=constant, dtype=torch.bfloat16)
    assert len(search.near(queries, 4)) < 500


def test_equal_keys_are_all_near() -> None:
    keys = draw(600, 5)
    keys[[3, 77, 599]] = 10 * torch.ones(5)
    near = KeySearch(keys, SIMILARITIES["dot"]).near(torch.ones(2, 5), 1)
    assert {3, 77, 599} <= {*near.tolist()}


@pytest.mark.parametrize(
    "settings",
    [
        *READ,
        *(
            MemorySettings(similarity="manhattan", separation=one, topk=3)
            for one in ("topk", "max")
        ),
    ],
)
def test_a_searched_memory_answers_as_one_that_scores_all_keys(
    settings: MemorySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, wanted, memory, hidden = twice(settings, monkeypatch)
    found = memory.read(hidden)
    assert (found.near is None) == (settings.similarity == "manhattan")
    assert torch.equal(found.coefficients != 0, wanted != 0)
    torch.testing.assert_close(found.coefficients, wanted)
    require_alike_after_a_change(exact, memory, hidden)


def test_keys_that_learn_are_scored_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtool.memories.keyed.LEAST_KEYS", 100)
    settings = MemorySettings(separation="topk")
    memory = KeyedMemory.from_settings(settings, (0,), 8, draw(1, 200, 9))[0]
    assert memory.read(draw(3, 8)).near is None
    with torch.no_grad():
        assert memory.read(draw(3, 8)).near is not None


def test_a_query_of_no_number_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtool.memories.keyed.LEAST_KEYS", 100)
    settings = MemorySettings(separation="topk")
    memory = KeyedMemory.from_settings(settings, (0,), 8, draw(1, 200, 9))[0]
    with torch.no_grad():
        found = memory.coefficients(torch.full((2, 8), torch.nan))
    assert found.isnan().any(dim=1).all()


def test_the_format_is_one_that_the_processor_has() -> None:
    assert search.fastest() in FORMATS


@pytest.mark.parametrize("keys_of", ["task", "class"])
def test_what_a_cut_leaves_out_is_the_softmax_of_the_others(keys_of: str) -> None:
    settings = MemorySettings(separation="topk", topk=2, beta=2.0, keys_of=keys_of)
    keys, hidden = draw(1, 5, 18 if keys_of == "class" else 9), draw(4, 8, seed=1)
    memory = KeyedMemory.from_settings(settings, (0,), 8, keys)[0]
    scores = memory.scores(hidden).double()
    shares = (2 * scores).softmax(dim=1).unflatten(1, (5, -1)).sum(dim=2)
    wanted = 1 - shares.sort(dim=1, descending=True).values[:, :2].sum(dim=1)
    found = memory.left_out(memory.query(hidden))
    assert found is not None
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    plain = KeyedMemory.from_settings(MemorySettings(), (0,), 8, draw(1, 5, 9))[0]
    assert plain.left_out(memory.query(hidden)) is None
