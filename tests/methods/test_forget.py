"""Forgetting: what is left answers as if the rest had never been there."""

from __future__ import annotations

import numpy as np
import pytest

from memtool.errors import AlreadyThereError, ConfigError, NotFoundError
from memtool.methods.forget import chosen, forget
from memtool.methods.mira import Mira
from memtool.methods.modulation import Modulation
from memtool_stores import MemoryStore
from tests.methods.conftest import learn, small_config


def reopened(mira):
    return Mira.open(mira.config, seed=0)


def test_the_rest_is_as_if_it_had_been_learned_alone(learned_copy, tmp_path):
    result = forget(learned_copy.config, ["inverted"])
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


def test_learned_keys_of_the_others_stay_bit_for_bit(tmp_path):
    config = small_config(
        tmp_path, consolidate__keys="random", consolidate__epochs=1, head__scope="shared"
    )
    mira = learn(Mira.open(config, seed=0))
    before = mira.snapshot().view.keys()
    forget(config, ["task-1-seed-0"])
    view = reopened(mira).snapshot().view
    assert np.array_equal(view.keys(), before[:, 1:])
    assert reopened(mira).evaluate().row("memory").metrics["faa"] > 0.3


def test_forgetting_everything_leaves_a_memory_without_keys(learned_copy):
    forget(learned_copy.config, ["1", "2"])
    assert forget(learned_copy.config, ["3"]).left == 0
    view = reopened(learned_copy).workspace.store.view()
    assert view.keys() is None
    assert view.blobs() == ()
    with pytest.raises(ConfigError, match="never consolidated"):
        reopened(learned_copy).retrieve(task="1")


def test_a_purge_takes_the_bytes_out_of_everything(learned_copy):
    store = learned_copy.workspace.store
    (record,) = chosen(store.view(), ["2"])
    head = store.view().state.blobs["head.task-2-seed-0"]
    assert store.find_bytes([record.sha256, head])
    result = forget(learned_copy.config, ["2"], purge=True)
    assert result.purged.left == {}
    assert result.purged.hashes_looked_for == 4
    assert result.purged.versions_removed >= 6
    fresh = MemoryStore.open(store.url)
    assert fresh.find_bytes([record.sha256, head]) == {}
    assert fresh.verify().ok
    assert [v.message for v in fresh.log()] == ["forget task-2-seed-0"]
    assert reopened(learned_copy).evaluate().row("memory").metrics["faa"] > 0.5


def test_a_purge_of_what_was_forgotten_before(learned_copy):
    store = learned_copy.workspace.store
    (record,) = chosen(store.view(), ["2"])
    forget(learned_copy.config, ["2"])
    assert store.find_bytes([record.sha256])
    forget(learned_copy.config, [record.name], purge=True)
    assert MemoryStore.open(store.url).find_bytes([record.sha256]) == {}


def test_a_purge_refuses_while_a_tag_or_branch_keeps_it(learned_copy):
    store = learned_copy.workspace.store
    store.tag("v1")
    backup = store.rollback("HEAD~2")  # two tasks, both with keys
    before = store.head()
    with pytest.raises(AlreadyThereError, match=f"{backup}, v1 still lead"):
        forget(learned_copy.config, ["2"], purge=True)
    assert store.head() == before
    store.delete_tag("v1")
    store.delete_branch(backup)
    assert forget(learned_copy.config, ["2"], purge=True).purged.left == {}


def test_names_that_fit_nothing(learned_copy):
    with pytest.raises(NotFoundError, match="'invertd'") as caught:
        forget(learned_copy.config, ["invertd"])
    assert "did you mean 'inverted'" in caught.value.expected
    with pytest.raises(NotFoundError):
        forget(learned_copy.config, ["7"])


def test_adapters_without_keys_must_be_consolidated_first(learned_copy):
    learned_copy.adapt("upright", fresh=True)
    store = learned_copy.workspace.store
    with store.transaction("another") as txn:
        value = store.view().value("task-1-seed-0")
        txn.add("extra", value + 1, {"task": 1, "task_name": "upright"})
    with pytest.raises(ConfigError, match="no key yet"):
        forget(learned_copy.config, ["2"])


def test_modulation_unlearns_what_is_forgotten(tmp_path):
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
    forget(config, ["2"])
    record = Modulation.open(config, seed=0).evaluate()
    assert len(record.run.tasks) == 2
    assert record.row("bayes-pcn").metrics["recall_error"] < 0.01
