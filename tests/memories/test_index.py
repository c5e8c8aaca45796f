"""The index of keys against all scores, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtool.errors import ConfigError
from memtool.memories import index
from memtool.memories.closed_form import for_similarity
from memtool.memories.index import CANDIDATES, LEAST, KeyIndex, index_bytes, name_of
from memtool.memories.keyed import KeyedMemory
from memtool.memories.search import SEARCHED
from memtool.memories.similarity import SIMILARITIES, SimilarityFunction
from memtool.sections import MemorySettings
from tests.memories.many_keys import READ, draw, highest, require_alike_after_a_change, twice

DOT = SIMILARITIES["dot"]


@pytest.fixture
def usearch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, on one thread, on which the same keys give the same index."""
    pytest.importorskip("usearch", reason="usearch is not installed")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def share_found(near: Tensor, wanted: Tensor) -> float:
    """The share of what is wanted (b, count) that is among what was found (b, c)."""
    return (wanted.unsqueeze(2) == near.unsqueeze(1)).any(dim=2).double().mean().item()


@pytest.mark.usefixtures("usearch")
@pytest.mark.parametrize("lengths", [0.0, 1.0])
@pytest.mark.parametrize("score", SEARCHED)
def test_the_highest_of_many_keys_are_found(score: SimilarityFunction, lengths: float) -> None:
    keys = draw(2500, 24) * (lengths * draw(2500, 1, seed=2)).exp() + draw(24, seed=3)
    queries = draw(20, 24, seed=1)
    near = KeyIndex(keys, score).near(queries, 4)
    assert near.shape == (20, LEAST)
    assert share_found(near, highest(score, queries, keys, 4)) > 0.9


@pytest.mark.usefixtures("usearch")
@pytest.mark.parametrize("name", ["dot", "scaled-dot", "euclidean"])
def test_the_highest_of_keys_in_closed_form_are_found(name: str) -> None:
    means, within = draw(2500, 24) + draw(24, seed=3), torch.linspace(0.5, 2, 24)
    queries = means[::125] + within * draw(20, 24, seed=1)
    solved = torch.cat([means, -means.square().mul(1 / within**2).sum(dim=1, keepdim=True) / 2], 1)
    solved[:, :-1] /= within**2
    keys, score = for_similarity(solved[None], name)[0], SIMILARITIES[name]
    queries = torch.cat([queries, torch.ones(20, 1)], dim=1)
    near = KeyIndex(keys, score, constant=True).near(queries, 4)
    assert share_found(near, highest(score, queries, keys, 4)) > 0.95


@pytest.mark.usefixtures("usearch")
def test_what_is_found_does_not_depend_on_the_batch() -> None:
    found, queries = KeyIndex(draw(1500, 16), DOT), draw(7, 16, seed=1)
    near = found.near(queries, 9)
    assert near.shape == (7, CANDIDATES * 9)
    for one, own in zip(queries, near, strict=True):
        assert torch.equal(found.near(one[None], 9)[0], own)
    assert all(len({*row}) == len(row) for row in near.tolist())


@pytest.mark.usefixtures("usearch")
@pytest.mark.parametrize("count", [1, 5, 6, 400])
def test_of_fewer_keys_than_are_wanted_all_are_found(count: int) -> None:
    near = KeyIndex(draw(5, 3), DOT).near(draw(2, 3, seed=1), count)
    assert near.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.usefixtures("usearch")
@pytest.mark.parametrize("keys", [torch.zeros(40, 3), torch.ones(40, 3), draw(1, 3)])
def test_keys_that_do_not_differ_are_found_as_well(keys: Tensor) -> None:
    for score in SEARCHED:
        assert len(KeyIndex(keys, score, constant=True).near(torch.ones(2, 3), 1)) == 2


@pytest.mark.usefixtures("usearch")
def test_keys_that_several_adapters_share_are_found_together() -> None:
    keys = draw(200, 16).repeat_interleave(10, dim=0)
    near = KeyIndex(keys, DOT).near(keys[::100] * 2, 1)
    scores = (2 * keys[::100] @ keys.T).gather(1, near)
    assert (scores >= scores.amax(dim=1, keepdim=True) - 1e-4).sum(dim=1).tolist() == [10] * 20


@pytest.mark.usefixtures("usearch")
def test_queries_of_no_number_find_nothing() -> None:
    found = KeyIndex(draw(50, 3), DOT)
    assert found.near(torch.full((2, 3), torch.nan), 1).shape == (0,)
    assert found.near(torch.empty(0, 3), 1).shape == (0,)


@pytest.mark.usefixtures("usearch")
def test_an_index_is_its_bytes() -> None:
    keys, queries = draw(1200, 30), draw(6, 30, seed=1)
    made = KeyIndex(keys, DOT)
    data = made.to_bytes()
    assert data == KeyIndex(keys, DOT).to_bytes()
    assert len(data) == pytest.approx(index_bytes(1200, 30), rel=0.1)
    read = KeyIndex(keys, DOT, data=data)
    assert torch.equal(read.near(queries, 4), made.near(queries, 4))


@pytest.mark.usefixtures("usearch")
def test_it_computes_in_float32_whatever_the_model_does() -> None:
    keys, queries = draw(300, 30), draw(6, 30, seed=1)
    wanted = KeyIndex(keys, DOT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = KeyIndex(keys, DOT)
        assert torch.equal(found.near(queries, 4), wanted.near(queries, 4))
    assert found.to_bytes() == wanted.to_bytes()


@pytest.mark.usefixtures("usearch")
def test_its_name_says_what_it_follows_from(monkeypatch: pytest.MonkeyPatch) -> None:
    import usearch

    keys, moved = draw(6, 4), draw(6, 4)
    moved[3, 2] += 1e-6
    names = [
        name_of(keys, DOT, constant=False),
        name_of(moved, DOT, constant=False),
        name_of(keys.view(3, 8), DOT, constant=False),
        name_of(keys, SIMILARITIES["cosine"], constant=False),
        name_of(keys, DOT, constant=True),
    ]
    assert names[0] == name_of(keys.clone(), DOT, constant=False)
    monkeypatch.setattr(usearch, "__version__", "2.0.0")
    names.append(name_of(keys, DOT, constant=False))
    monkeypatch.setattr(index, "GRAPH", {**index.GRAPH, "connectivity": 8})
    names.append(name_of(keys, DOT, constant=False))
    assert len({*names}) == len(names)


@pytest.mark.usefixtures("usearch")
@pytest.mark.parametrize("settings", READ)
def test_weights_are_those_of_all_scores_where_all_was_found(
    settings: MemorySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, wanted, memory, hidden = twice(settings, monkeypatch)
    memory.searched_by = KeyIndex
    found = memory.read(hidden)
    assert found.near is not None
    assert len(found.near) < 900
    torch.testing.assert_close(found.coefficients, wanted)
    missed = memory.missed(memory.query(hidden))
    assert missed is not None
    assert missed.tolist() == [0.0] * 6
    assert exact.missed(exact.query(hidden)) is None
    # An index never changes: other keys have another one, whole.
    require_alike_after_a_change(exact, memory, hidden)


class Blind:
    """Never finds the nearest key."""

    def __init__(
        self, keys: Tensor, likeness: SimilarityFunction, *, constant: bool = False
    ) -> None:
        self.keys = keys

    def near(self, queries: Tensor, count: int) -> Tensor:
        return (queries @ self.keys.T).topk(8).indices[:, 1:]


def test_what_is_missed_is_told_and_the_rest_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtool.memories.keyed.LEAST_KEYS", 100)
    settings = MemorySettings(similarity="dot", separation="topk", topk=4)
    memory = KeyedMemory.from_settings(settings, (0,), 8, draw(1, 200, 9)).requires_grad_(False)[0]
    memory.searched_by = Blind
    hidden = draw(3, 8, seed=1)
    queries = memory.query(hidden)
    assert memory.missed(queries).tolist() == [0.25] * 3  # type: ignore[union-attr]
    scores, wanted = memory.scores(hidden), torch.zeros(3, 200)
    for row in range(3):
        places = scores[row].argsort(descending=True)[1:5]
        wanted[row, places] = scores[row, places].softmax(dim=0)
    torch.testing.assert_close(memory.coefficients(hidden), wanted)


@pytest.mark.usefixtures("usearch")
def test_where_it_finds_nothing_all_keys_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtool.memories.keyed.LEAST_KEYS", 100)
    settings = MemorySettings(separation="topk")
    memory = KeyedMemory.from_settings(settings, (0,), 8, draw(1, 200, 9)).requires_grad_(False)[0]
    memory.searched_by = KeyIndex
    assert memory.coefficients(torch.full((2, 8), torch.nan)).isnan().any(dim=1).all()


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package usearch") as told:
        KeyIndex(draw(5, 3), DOT)
    assert "pip install 'memtool[usearch]'" in str(told.value.remedy)
