"""Bisect: the halving against the linear scan, and a real memory that a commit spoiled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtool.errors import ConfigError, NotFoundError
from memtool.methods.bisect import bisect, first_bad
from memtool.methods.mira import Mira


@given(st.data())
def test_halving_finds_what_the_scan_finds_and_asks_each_once(data):
    count = data.draw(st.integers(2, 60))
    culprit = data.draw(st.integers(1, count - 1))
    unknown = data.draw(st.sets(st.integers(1, count - 2))) if count > 2 else set()
    asked = []

    def is_bad(place):
        asked.append(place)
        return None if place in unknown else place >= culprit

    found = first_bad(count, is_bad)
    assert len(asked) == len(set(asked))
    assert 0 not in asked
    assert count - 1 not in asked
    judged = [place for place in range(count) if place not in unknown or place == count - 1]
    scanned = next(place for place in judged if place >= culprit)
    assert found.culprit == scanned
    before = max(place for place in [0, *judged] if place < scanned)
    assert found.suspects == tuple(range(before + 1, scanned))
    assert culprit in (*found.suspects, found.culprit)
    if not unknown:
        assert len(asked) <= int(np.ceil(np.log2(count)))


@pytest.fixture
def spoiled(learned_copy):
    """Three tasks, then a harmless commit, one that turns the keys over, and two harmless ones."""
    store = learned_copy.workspace.store
    with store.transaction("a note") as txn:
        txn.put_blob("note", b"1")
    with store.transaction("keys turned over") as txn:
        txn.set_keys(np.ascontiguousarray(store.view().keys()[:, ::-1]))
    for number in (2, 3):
        with store.transaction(f"note {number}") as txn:
            txn.put_blob("note", str(number).encode())
    return Mira.open(learned_copy.config, seed=0)


def test_the_commit_that_spoiled_the_memory_is_named(spoiled):
    result = bisect(spoiled, drop=0.1, good="HEAD~4")
    assert result.culprit.message == "keys turned over"
    assert result.culprit.fell
    assert result.good_value - result.bad_value >= 0.1
    assert result.suspects == ()
    assert len(result.tasks) == 3
    assert len(result.probes) <= 4
    task = bisect(spoiled, metric="task_accuracy", drop=0.3, good="HEAD~3")
    assert task.culprit.message == "keys turned over"


def test_without_good_it_starts_where_it_can_be_measured(spoiled):
    result = bisect(spoiled, drop=0.1)
    assert result.tasks == ("upright",)
    line = {v.id: v.message for v in spoiled.workspace.store.log()}
    assert line[result.good].startswith("consolidate tasks 1")


def test_a_fall_that_never_was(spoiled):
    result = bisect(spoiled, drop=0.5, good="HEAD~4", bad="HEAD~3")
    assert result.culprit is None
    assert result.good_value == pytest.approx(result.bad_value)


def test_what_cannot_be_asked_is_said(spoiled):
    with pytest.raises(ConfigError, match="metric 'fa'"):
        bisect(spoiled, metric="fa", drop=0.1)
    with pytest.raises(ConfigError, match="a drop of 0 points"):
        bisect(spoiled, drop=0.0)
    with pytest.raises(NotFoundError, match="does not lead to"):
        bisect(spoiled, drop=0.1, good="HEAD", bad="HEAD~2")
    oldest = spoiled.workspace.store.log()[-1].id
    with pytest.raises(NotFoundError, match="knows no task"):
        bisect(spoiled, drop=0.1, good=oldest)
