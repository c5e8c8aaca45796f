"""Order bounds against all orders, looked at one by one."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest

from memtool.streams import bounds as module
from memtool.streams.bounds import bounds, similarity_of_classes, similarity_of_domains


def _similarity(count: int, seed: int) -> np.ndarray:
    return similarity_of_classes(np.random.default_rng(seed).normal(size=(count, 4)))


def _slow(similarity: np.ndarray, widths: list[int] | None, order: tuple[int, ...]) -> float:
    """Pair by pair."""
    if widths is None:
        return statistics.mean(similarity[a, b] for a, b in itertools.pairwise(order))
    tasks = [task for task, width in enumerate(widths) for _ in range(width)]
    return statistics.mean(
        similarity[order[i], order[j]]
        for i in range(len(order))
        for j in range(len(order))
        if tasks[i] != tasks[j]
    )


@pytest.mark.parametrize("widths", [None, [2, 2, 2], [3, 3], [2, 2, 1]])
@pytest.mark.parametrize("searched", [False, True])
def test_bounds_are_those_of_all_orders(
    widths: list[int] | None, searched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if searched:  # by exchanges of two, as where there are too many orders to look at
        monkeypatch.setattr(module, "EXHAUSTIVE", 0)
    for seed in range(3):
        count = 6 if widths is None else sum(widths)
        similarity = _similarity(count, seed)
        hardest, median, easiest = bounds(similarity, widths, seed=0)
        orders = itertools.permutations(range(count))
        scores = sorted(_slow(similarity, widths, order) for order in orders)
        ends = (scores[-1], scores[0]) if widths is None else (scores[0], scores[-1])
        found = (hardest.similarity, easiest.similarity)
        if searched and widths is None:  # a chain may end at a bound of its neighbourhood
            assert found[0] >= np.quantile(scores, 0.98)
            assert found[1] <= np.quantile(scores, 0.02)
        else:
            assert found == pytest.approx(ends)
        for bound in (hardest, median, easiest):
            assert bound.similarity == pytest.approx(_slow(similarity, widths, bound.order))
        if not searched:
            assert median.similarity == pytest.approx(statistics.median_low(scores))


def test_many_classes_end_beyond_what_is_drawn_and_the_same_at_every_call() -> None:
    similarity = _similarity(20, 3)
    first = bounds(similarity, [5] * 4, seed=0)
    assert first == bounds(similarity, [5] * 4, seed=0)
    draw = np.random.default_rng(1)
    drawn = [
        module.between_tasks(similarity, [5] * 4, tuple(draw.permutation(20))) for _ in "ab" * 50
    ]
    assert first[0].similarity < min(drawn) < first[1].similarity < max(drawn) < first[2].similarity
    assert all(sorted(bound.order) == list(range(20)) for bound in first)


def test_pairs_that_are_alike_are_together_where_it_is_hard() -> None:
    axes = np.eye(3).repeat(2, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(6, 3))
    hardest, _, easiest = bounds(similarity_of_classes(axes), [2, 2, 2], seed=0)
    pairs = [{one // 2 for one in hardest.order[i : i + 2]} for i in (0, 2, 4)]
    assert all(len(pair) == 1 for pair in pairs)
    assert all(len({one // 2 for one in easiest.order[i : i + 2]}) == 2 for i in (0, 2, 4))


def test_domains_are_as_similar_as_the_classes_that_both_have() -> None:
    means = np.random.default_rng(2).normal(size=(3, 4, 5))
    means[2, 1:] = np.nan  # one class only
    found = similarity_of_domains(means)
    centred = means - np.nanmean(means.reshape(-1, 5), axis=0)
    unit = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    assert found[0, 1] == pytest.approx(np.mean([unit[0, c] @ unit[1, c] for c in range(4)]))
    assert found[0, 2] == pytest.approx(unit[0, 0] @ unit[2, 0])
    assert np.allclose(np.diag(found), 1)
