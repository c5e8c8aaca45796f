"""Bisect: the halving against the linear scan, and a real memory that a commit spoiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtool.errors import ConfigError, MismatchError, NotFoundError
from memtool.experiments.bisect import bisect, first_bad
from memtool.methods.forget import forget
from memtool.methods.mira.method import Mira
from memtool.methods.mira.state import MemoryState
from tests.methods.facts import write_facts
from tests.methods.test_collection import PROMPTS, SHAPES, opened, write_adapter, write_prompts


def reopened(mira):
    return Mira.open(mira.config, seed=0)


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
    return reopened(learned_copy)


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


def test_an_adapter_overwritten_by_noise_is_named(learned_copy):
    store = learned_copy.workspace.store
    noise = np.random.default_rng(0).standard_normal(store.space.numel).astype(np.float32)
    with store.transaction("noise") as txn:
        meta = dict(store.view().get("task-1-seed-0").meta)
        txn.update("task-1-seed-0", name="old")
        txn.add("task-1-seed-0", noise, meta)
        txn.remove("old")
        keys = np.ascontiguousarray(store.view().keys()[:, [1, 2, 0]])
        txn.set_keys(keys)
        state = MemoryState.load(store.view())
        ids = tuple(record.id for record in txn.adapters)
        changed = state.model_copy(update={"adapters": ids, "adapter_tasks": (1, 2, 0)})
        changed.put(txn)
    for number in (2, 3):
        with store.transaction(f"note {number}") as txn:
            txn.put_blob("note", str(number).encode())
    result = bisect(reopened(learned_copy), drop=0.05, good="HEAD~3")
    assert result.culprit.message == "noise"


def test_every_version_is_measured_once(spoiled, monkeypatch):
    measured = []
    measure = spoiled.measure

    def counted(version, tasks, setting=None):
        measured.append(version)
        return measure(version, tasks, setting)

    monkeypatch.setattr(spoiled, "measure", counted)
    result = bisect(spoiled, drop=0.1, good="HEAD~4")
    assert len(measured) == len(set(measured)) == len(result.probes)


def test_a_forgotten_task_is_a_fall_and_a_later_task_is_none(learned_copy):
    store = learned_copy.workspace.store
    good = next(v.id for v in store.log() if v.metadata.get("learned") == [1, 2])
    forget(store, ["1"])
    result = bisect(reopened(learned_copy), drop=0.1, good=good)
    assert result.tasks == ("upright", "inverted")
    assert result.culprit.message == "forget task-1-seed-0"


def test_versions_without_keys_are_skipped_and_named(learned_copy):
    store = learned_copy.workspace.store
    view = store.view()
    keys = view.keys()
    with store.transaction("keys lost") as txn:
        txn.set_keys(None)
    with store.transaction("still lost") as txn:
        txn.put_blob("note", b"1")
    with store.transaction("the wrong keys") as txn:
        txn.set_keys(np.ascontiguousarray(keys[:, ::-1]))
    result = bisect(reopened(learned_copy), drop=0.1, good="HEAD~3")
    assert result.culprit.message == "the wrong keys"
    assert [probe.message for probe in result.suspects] == ["keys lost", "still lost"]
    assert all(probe.value is None and probe.reason for probe in result.suspects)
    with pytest.raises(MismatchError):
        bisect(reopened(learned_copy), drop=0.1, good="HEAD~3", bad="HEAD~1")


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
    with pytest.raises(ConfigError, match="unknown metric 'fa'") as caught:
        bisect(spoiled, metric="fa", drop=0.1)
    assert "did you mean 'faa'" in caught.value.expected
    with pytest.raises(ConfigError, match="none of a single version"):
        bisect(spoiled, metric="forgetting.max", drop=0.1)
    with pytest.raises(ConfigError, match="cut for 'dil'"):
        bisect(spoiled, drop=0.1, setting="cil")
    with pytest.raises(ConfigError, match="a drop of 0 points"):
        bisect(spoiled, drop=0.0)
    with pytest.raises(NotFoundError, match="does not lead to"):
        bisect(spoiled, drop=0.1, good="HEAD", bad="HEAD~2")
    oldest = spoiled.workspace.store.log()[-1].id
    with pytest.raises(NotFoundError, match="knows no task"):
        bisect(spoiled, drop=0.1, good=oldest)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_collection_is_searched_for_what_lost_a_task(
    tmp_path: Path,
) -> None:
    """Tasks are known by name, of ragged adapters too, and a forgotten one is still asked for."""
    place = write_facts(tmp_path)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        write_adapter(place / "model", place / "adapters" / name, seed, **shape)
    method = opened(place, tmp_path / "runs")
    # Neither the order nor the numbers of the stream.
    for name in ("turned", "letters", "sums"):
        prompts = write_prompts(tmp_path / "prompts.jsonl", {name: PROMPTS[name]})
        method.collect([str(place / "adapters" / name)], prompts)
        method.consolidate()
    store = method.workspace.store
    good = store.head()
    store.tag("good")
    with store.transaction("a note") as txn:
        txn.put_blob("note", b"1")
    forget(store, ["letters"])
    with store.transaction("another note") as txn:
        txn.put_blob("note", b"2")
    result = bisect(method, metric="task_accuracy", drop=0.2, good="good")
    assert result.tasks == ("turned", "letters", "sums")
    assert (result.good, result.good_value) == (good, 1.0)
    assert result.culprit is not None
    assert result.culprit.message == "forget letters"
    assert result.bad_value == pytest.approx(14 / 22)  # 6 and 8 of the prompts that are left
    by_loss = bisect(method, drop=50.0, good="good")
    assert (by_loss.metric, by_loss.culprit) == ("loss", None)
    # A number is never given twice: an older version means the same tasks.
    method.collect([str(place / "adapters" / "letters")])
    assert store.view().get("letters").meta["task"] == 4
    nowhere = opened(place, tmp_path / "runs", **{"stream.source": "digits"})
    with pytest.raises(ConfigError, match="brings no texts"):
        bisect(nowhere, drop=1.0, good="good")
