"""Forgetting: what is left answers as if the rest had never been there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memtool.errors import (
    AlreadyExistsError,
    ChangedMeanwhileError,
    ConfigError,
    DataError,
    NotFoundError,
)
from memtool.methods.forget import chosen, forget
from memtool.methods.mira.method import Mira
from memtool.methods.modulation.method import Modulation
from memtool_stores import MemoryStore
from tests.methods.conftest import learn, small_config


def reopened(mira):
    return Mira.open(mira.config, seed=0)


def test_the_rest_is_as_if_it_had_been_learned_alone(learned_copy, tmp_path):
    result = forget(learned_copy.workspace.store, ["inverted"])
    assert result.tasks == (2,)
    assert result.left == 2
    assert set(result.blobs) == {"head.task-2-seed-0", "queries.2", "features.2"}
    mira = reopened(learned_copy)
    state = mira.snapshot().state
    assert state.tasks == (1, 3)
    never = Mira.open(small_config(tmp_path / "never"), seed=0)
    for task, name in ((1, "task-1-seed-0"), (3, "task-3-seed-0")):
        never.write([learned_copy.config.runs / "adapters" / name])
        never.consolidate()
        assert task in never.snapshot().state.tasks
    assert np.allclose(mira.snapshot().view.keys(), never.snapshot().view.keys(), atol=1e-5)
    left = mira.evaluate().row("memory")
    alone = never.evaluate().row("memory")
    assert left.metrics["faa"] == pytest.approx(alone.metrics["faa"])
    assert mira.consolidate().unchanged


def test_learned_keys_of_the_others_stay_bit_for_bit(adapted):
    config = small_config(
        adapted, consolidate__keys="random", consolidate__epochs=1, head__scope="shared"
    )
    mira = learn(Mira.open(config, seed=0))
    before = mira.snapshot().view.keys()
    forget(mira.workspace.store, ["task-1-seed-0"])
    view = reopened(mira).snapshot().view
    assert np.array_equal(view.keys(), before[:, 1:])
    assert reopened(mira).evaluate().row("memory").metrics["faa"] > 0.3


@pytest.mark.parametrize("task", ["2", 2.5])
def test_a_task_that_is_no_number_is_in_nobodys_way(learned_copy, task):
    """Somebody else's catalog may say anything of its adapters."""
    store = learned_copy.workspace.store
    with store.transaction("theirs") as txn:
        value, said = store.view().value("task-1-seed-0"), {"task": task, "peft": [task]}
        txn.add("one", value, said)
        txn.add("other", value, said)
    assert len(reopened(learned_copy).adapt("3", fresh=True)) == 1
    with pytest.raises(DataError, match="'one' does not say which task"):
        reopened(learned_copy).consolidate()
    assert forget(store, ["one"]).tasks == ()
    forget(store, ["other"])
    assert reopened(learned_copy).evaluate().row("memory").metrics["faa"] > 0.5


def test_forgetting_everything_leaves_a_memory_without_keys(learned_copy):
    forget(learned_copy.workspace.store, ["1", "2"])
    assert forget(learned_copy.workspace.store, ["3"]).left == 0
    view = reopened(learned_copy).workspace.store.view()
    assert view.keys() is None
    assert view.blobs() == ()
    with pytest.raises(ConfigError, match="never consolidated"):
        reopened(learned_copy).retrieve(task="1")


def test_a_purge_takes_the_bytes_out_of_everything(learned_copy):
    store = learned_copy.workspace.store
    (record,) = chosen(store.view(), ["2"])
    head = store.view().blob_hashes["head.task-2-seed-0"]
    assert store.find_bytes([record.sha256, head])
    result = forget(learned_copy.workspace.store, ["2"], purge=True)
    assert result.purged.left == {}
    # The row, its head, queries and features; and, of those that knew of them, the state with its
    # rows of tasks and adapters, the rows of heads, and what all of them asked, twice.
    assert result.purged.hashes == 4 + 4 + 2
    assert result.purged.objects == len([p for p in Path(store.url).rglob("*") if p.is_file()])
    assert result.purged.versions_removed >= 6
    fresh = MemoryStore.open(store.url)
    assert fresh.find_bytes([record.sha256, head]) == {}
    assert fresh.verify().ok
    assert [v.message for v in fresh.log()] == ["forget task-2-seed-0"]
    assert reopened(learned_copy).evaluate().row("memory").metrics["faa"] > 0.5


def test_a_purge_of_what_was_forgotten_before(learned_copy):
    store = learned_copy.workspace.store
    (record,) = chosen(store.view(), ["2"])
    forget(store, ["2"])
    assert store.find_bytes([record.sha256])
    keys = store.view().keys()
    forget(store, [record.name], purge=True)
    assert MemoryStore.open(store.url).find_bytes([record.sha256]) == {}
    assert np.array_equal(MemoryStore.open(store.url).view().keys(), keys)


def test_a_purge_that_was_cut_short_is_finished_by_another(learned_copy):
    store = learned_copy.workspace.store
    (record,) = chosen(store.view(), ["2"])
    forget(store, ["2"])
    with store.transaction("forget") as txn:
        txn.purge(record.id)
    assert store.find_bytes([record.sha256])
    head = store.head()
    result = forget(store, ["2"], purge=True)
    assert result.version == head
    assert result.purged.left == {}
    assert store.find_bytes([record.sha256]) == {}


def test_a_purge_of_what_left_without_a_word_to_the_memory(learned_copy):
    store = learned_copy.workspace.store
    with store.transaction("remove") as txn:
        txn.remove("task-2-seed-0")
    assert forget(store, ["task-2-seed-0"], purge=True).purged.left == {}
    mira = reopened(learned_copy)
    assert mira.snapshot().state.tasks == (1, 3)
    assert mira.evaluate().row("memory").metrics["faa"] > 0.5


def test_what_is_found_after_a_purge_is_said(learned_copy):
    store = learned_copy.workspace.store
    value = store.view().value("task-2-seed-0")
    (Path(store.url) / "forgotten-copy").write_bytes(value.tobytes())
    result = forget(store, ["2"], purge=True)
    assert result.purged.left == {"adapter task-2-seed-0": ("forgotten-copy",)}


def test_a_purge_refuses_while_a_tag_or_branch_keeps_it(learned_copy):
    store = learned_copy.workspace.store
    store.tag("v1")
    backup = store.rollback("HEAD~2")  # two tasks, both with keys
    before = store.head()
    with pytest.raises(AlreadyExistsError, match=f"{backup}, v1 still lead"):
        forget(learned_copy.workspace.store, ["2"], purge=True)
    assert store.head() == before
    store.delete_tag("v1")
    store.delete_branch(backup)
    assert forget(learned_copy.workspace.store, ["2"], purge=True).purged.left == {}


def test_names_that_fit_nothing(learned_copy):
    with pytest.raises(NotFoundError, match="'invertd'") as caught:
        forget(learned_copy.workspace.store, ["invertd"])
    assert "did you mean 'inverted'" in caught.value.expected
    with pytest.raises(NotFoundError):
        forget(learned_copy.workspace.store, ["7"])


def test_adapters_without_keys_must_be_consolidated_first(learned_copy):
    store = learned_copy.workspace.store
    with store.transaction("another") as txn:
        value = store.view().value("task-1-seed-0")
        txn.add("extra", value + 1, {"task": 1, "task_name": "upright"})
    with pytest.raises(ConfigError, match="no key yet"):
        forget(store, ["2"])
    keys = store.view().keys()
    assert forget(store, ["extra"]).left == 3
    assert np.array_equal(store.view().keys(), keys)


def test_one_of_two_adapters_of_a_task(learned_copy):
    store = learned_copy.workspace.store
    with store.transaction("another") as txn:
        value = store.view().value("task-1-seed-0")
        txn.add("extra", value, {"task": 1, "task_name": "upright"})
    mira = reopened(learned_copy)
    mira.consolidate()
    blobs = set(store.view().blobs())
    result = forget(store, ["extra"])
    assert result.blobs == ()
    assert set(store.view().blobs()) == blobs
    assert mira.snapshot().state.tasks == (1, 2, 3)
    assert np.allclose(store.view().keys(), learned_copy.snapshot("HEAD~3").view.keys(), atol=1e-5)


def test_moments_that_were_not_kept_apart_must_be_counted_again(learned_copy):
    store = learned_copy.workspace.store
    with store.transaction("as older versions of memtool left it") as txn:
        txn.delete_blob("queries.1")
    with pytest.raises(ConfigError, match="queries of task 1"):
        forget(store, ["2"])
    reopened(learned_copy).consolidate()
    assert forget(store, ["2"]).left == 2


def test_atoms_are_forgotten_like_adapters(learned_copy):
    store = learned_copy.workspace.store
    with store.transaction("atoms") as txn:
        value = store.view().value("task-2-seed-0")
        txn.add_atoms("atoms-2", value * 2, {"task": 2, "task_name": "inverted"})
    assert set(forget(store, ["inverted"]).adapters) == {"task-2-seed-0", "atoms-2"}
    assert store.view().atom_records == ()


def test_somebody_else_was_first(learned_copy, monkeypatch):
    store = learned_copy.workspace.store
    old = store.view()
    with store.transaction("a note") as txn:
        txn.put_blob("note", b"1")
    head = store.head()
    monkeypatch.setattr(store, "view", lambda *_: old)
    with pytest.raises(ChangedMeanwhileError):
        forget(store, ["2"])
    assert store.head() == head


@pytest.mark.parametrize("purge", [False, True])
def test_modulation_unlearns_what_is_forgotten(tmp_path, purge):
    config = small_config(
        tmp_path,
        method="modulation",
        stream__setting="til",
        stream__order=None,
        stream__splits=3,
        adapter__warm_start="none",
        modulation__hidden=16,
    )
    method = Modulation.open(config, seed=0)
    for task in "123":
        method.adapt(task)
        method.write()
    store = method.workspace.store
    forget(store, ["2"], purge=purge)
    record = Modulation.open(config, seed=0).evaluate()
    assert len(record.run.tasks) == 2
    assert record.row("bayes-pcn").metrics["recall_error"] < 0.01
    forget(store, ["1", "3"], purge=purge)
    assert store.view().blobs() == ()
    method.write()
    assert Modulation.open(config, seed=0).evaluate().row("bayes-pcn").metrics["faa"] > 0.3
