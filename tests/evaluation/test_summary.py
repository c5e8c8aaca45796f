"""Several seeds: mean, sample standard deviation, t-interval; only of one experiment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from memtool.errors import MismatchError
from memtool.evaluation.summary import summarise, summarise_rows
from tests.reports.sample import record


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=8, unique=True))
def test_interval_equals_scipys(hits: list[int]) -> None:
    values = [hit / 10_000 for hit in hits]
    summary = summarise(values)
    low, high = stats.t.interval(
        0.95,
        len(values) - 1,
        loc=np.mean(values),
        scale=np.std(values, ddof=1) / len(values) ** 0.5,
    )
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.std == pytest.approx(np.std(values, ddof=1))
    assert summary.low == pytest.approx(low)
    assert summary.high == pytest.approx(high)
    assert summary.values == tuple(values)


def test_published_quantile() -> None:
    summary = summarise([0.0, 1.0, 2.0])  # std 1, t(2, 97.5 %) = 4.3027
    assert summary.high == pytest.approx(1 + 4.302653 / 3**0.5)


def test_one_seed_has_no_spread() -> None:
    summary = summarise([0.5])
    assert (summary.n, summary.mean) == (1, 0.5)
    assert summary.std is summary.low is summary.high is None
    assert summary.interval() is None


def test_an_interval_ends_where_values_do():
    summary = summarise([0.95, 0.99])
    assert summary.interval() == (summary.low, summary.high)
    assert summary.interval(0.0, 1.0) == (summary.low, 1.0)
    assert summarise([0.01, 0.05]).interval(0.0)[0] == 0.0


@pytest.mark.parametrize("values", [[], [float("nan")], [[0.1, 0.2]]])
def test_what_has_no_summary(values: list[float]) -> None:
    with pytest.raises(MismatchError):
        summarise(values)


def test_rows_over_seeds() -> None:
    records = [record(seed) for seed in range(3)]
    rows = summarise_rows(records)
    assert [row.id for row in rows] == [row.id for row in records[0].metrics.rows]
    memory = rows[0]
    assert memory.accuracy.shape == (3, 6, 5)
    expected = [r.row("memory").metrics["faa"] for r in records]
    assert memory.metrics["faa"].values == tuple(expected)
    assert memory.seconds is not None
    assert memory.seconds.n == 3
    assert "forgetting.max" in next(row for row in rows if row.id == "oracle").undefined


def test_different_experiments_are_refused() -> None:
    first, second = record(0), record(1)
    with pytest.raises(MismatchError, match="each seed once"):
        summarise_rows([first, first])
    with pytest.raises(MismatchError, match="different streams"):
        summarise_rows([first, record(1, tasks=("a", "b"))])
    other = second.model_copy(update={"run": second.run.model_copy(update={"mix": "params"})})
    with pytest.raises(MismatchError, match="mix 'delta' and 'params'"):
        summarise_rows([first, other])
    fewer = second.metrics.model_copy(update={"rows": second.metrics.rows[:2]})
    with pytest.raises(MismatchError, match="rows"):
        summarise_rows([first, second.model_copy(update={"metrics": fewer})])
    with pytest.raises(MismatchError, match="no records"):
        summarise_rows([])
