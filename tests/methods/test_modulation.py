"""Modulation on a real store, real digits and the embedded backbone: til and mts."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from memtool.adapters.peft_files import read_peft
from memtool.config import resolve
from memtool.errors import AlreadyExistsError, ConfigError, MismatchError, NotFoundError
from memtool.experiments.run import run
from memtool.methods.modulation.measure import accuracies, relative_errors
from memtool.methods.modulation.method import Modulation
from memtool.methods.modulation.predictor import PREDICTOR
from memtool.methods.modulation.recallers import blob_of, open_memory

SMALL = {
    "method": "modulation",
    "stream.setting": "mts",
    "stream.train_per_task": 60,
    "stream.test_per_task": 50,
    "stream.splits": 3,
    "train.epochs": 2,
    "modulation.hidden": 32,
    "modulation.predictor_epochs": 2,
    "engine.device": "cpu",
    "engine.precision": "fp32",
}


def config(folder, **overrides):
    values = {**SMALL, "store": str(folder / "memory"), "runs": str(folder / "runs")}
    values.update({key.replace("__", "."): value for key, value in overrides.items()})
    return resolve(preset="digits-til", overrides=values, environ={}, cwd=folder).config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks in memory, and the task predictor."""
    place = tmp_path_factory.mktemp("modulation")
    method = Modulation.open(config(place), seed=0)
    for task in "123":
        method.adapt(task)
        method.write()
        method.task_written(method.workspace.task(task))
    method.all_written()
    return place


@pytest.fixture
def learned(folder):
    return Modulation.open(config(folder), seed=0)


@pytest.fixture
def learned_copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return Modulation.open(config(tmp_path / "copy"), seed=0)


def test_recalled_adapters_serve_as_well_as_the_exact_ones(learned):
    record = learned.evaluate(setting="til", history=True, compare=True)
    exact = record.row("exact").metrics["faa"]
    assert exact > 0.7
    for name in ("hopfield", "bayes-pcn"):
        row = record.row(name)
        assert abs(row.metrics["recall_drop"]) < 0.02
        assert row.metrics["recall_drop"] == pytest.approx(exact - row.metrics["faa"])
        errors = np.array(row.recall_error, dtype=float)
        assert errors.shape == (4, 3)
        assert np.isnan(errors[0]).all()
        assert np.isnan(errors[1, 1:]).all()
        assert not np.isnan(errors[3]).any()
        assert row.metrics["recall_error"] == pytest.approx(errors[3].mean())
    assert record.row("hopfield").metrics["recall_error"] < 1e-5
    assert record.row("bayes-pcn").metrics["recall_error"] < 5e-3
    assert record.row("frozen").kind == "baseline"


def test_the_predictor_says_the_task_of_mixed_batches(learned):
    record = learned.evaluate(setting="mts")
    row = record.row("hopfield")
    assert row.metrics["task_accuracy"] > 0.6
    assert row.metrics["faa"] <= row.metrics["task_accuracy"] + 1e-9
    assert row.metrics["faa"] == pytest.approx(
        record.row("exact-predicted").metrics["faa"], abs=0.02
    )
    assert record.row("exact").metrics["faa"] >= row.metrics["faa"]


def test_one_pass_over_mixed_tasks_equals_a_pass_for_each(learned):
    stored = learned.stored()
    tasks = learned.workspace.stream.tasks
    shown = [task.test for task in tasks]
    together = accuracies(learned.workspace, stored, stored.values, shown)
    for place, samples in enumerate(shown):
        own = stored.only(place)
        (alone,) = accuracies(learned.workspace, own, own.values, [samples])
        assert alone == pytest.approx(together[place])


def test_each_write_is_one_version_with_the_memories_in_it(learned):
    store = learned.workspace.store
    versions = [v for v in store.log() if v.message.startswith("write")]
    assert len(versions) == 3
    assert sum(v.message.startswith("consolidate") for v in store.log()) == 1
    for version, count in zip(reversed(versions), (1, 2, 3), strict=True):
        view = store.view(version.id)
        assert len(view) == count
        memory = open_memory("bayes-pcn", view, learned.config.modulation)
        assert memory.recall(
            memory.key_of(torch.from_numpy(view.values().copy()))
        ).nearest.tolist() == list(range(count))


def test_the_state_of_bayes_pcn_is_small_beside_the_adapters(learned):
    view = learned.workspace.store.view()
    # U and R of three layers of width 32, codes, inner products: nothing as wide as an adapter.
    assert len(view.blob(blob_of("bayes-pcn"))) < 80_000


def test_retrieve_gives_the_recalled_adapter_back_as_peft(learned, tmp_path):
    out = tmp_path / "adapter"
    result = learned.retrieve(task="2", out=out)
    assert (result.memory, result.task, result.stored) == ("hopfield", 2, 3)
    assert result.recall_error < 1e-5
    assert result.novelty < 1e-6
    assert result.accuracy > 0.6
    assert result.shares[1].share == pytest.approx(1.0, abs=1e-5)
    stored = learned.stored()
    value = read_peft(out, learned.workspace.layout.sites).value
    assert relative_errors(value[None], stored.values[1:2])[0] == pytest.approx(
        result.recall_error, abs=1e-6
    )
    with pytest.raises(AlreadyExistsError):
        learned.retrieve(task="2", out=out)


def test_retrieve_by_image_and_by_key(learned, tmp_path):
    samples = learned.workspace.stream.tasks[1].test
    Image.fromarray(samples.images[0]).save(tmp_path / "digit.png")
    seen = learned.retrieve(image=tmp_path / "digit.png")
    assert seen.task in (1, 2, 3)
    stored = learned.stored()
    length = seen.key_numbers
    save_file({"query": stored.values[2, :length].clone()}, tmp_path / "key.safetensors")
    assert learned.retrieve(query=tmp_path / "key.safetensors").task == 3
    save_file({"query": torch.randn(length)}, tmp_path / "new.safetensors")
    assert learned.retrieve(query=tmp_path / "new.safetensors").novelty > 0.5
    save_file({"query": torch.randn(length + 1)}, tmp_path / "wide.safetensors")
    with pytest.raises(MismatchError, match="query of shape"):
        learned.retrieve(query=tmp_path / "wide.safetensors")


def test_a_memory_that_was_not_asked_for_is_brought_up_to_date(learned_copy):
    folder = learned_copy.config.runs.parent
    published = config(folder, modulation__memory="bayes-pcn-published")
    late = Modulation.open(published, seed=0)
    with pytest.raises(MismatchError, match="memtool consolidate --memory bayes-pcn-published"):
        late.retrieve(task="1")
    assert not late.consolidate().unchanged
    assert late.retrieve(task="1").task == 1
    again = late.consolidate()
    assert again.unchanged
    assert again.epochs == 0


def test_a_removed_adapter_is_unlearned(learned_copy):
    store = learned_copy.workspace.store
    with store.transaction("forget") as txn:
        txn.remove(txn.adapters[1].name)
        learned_copy._also_commit(txn, [])
    stored = learned_copy.stored()
    assert stored.tasks == (1, 3)
    memory = open_memory("bayes-pcn", stored.view, learned_copy.config.modulation)
    assert (
        relative_errors(memory.recall(memory.key_of(stored.values)).patterns, stored.values).max()
        < 5e-3
    )
    with pytest.raises(MismatchError, match="task predictor knows tasks"):
        learned_copy.evaluate(setting="mts")


def test_a_version_without_any_of_the_tasks_scores_nothing(learned_copy):
    with learned_copy.workspace.store.transaction("forget") as txn:
        txn.remove(txn.adapters[1].name)
    assert learned_copy.measure("HEAD", [2], "til")["faa"] == 0
    assert learned_copy.measure("HEAD", [1, 2], "til")["faa"] > 0.3


def test_what_cannot_be_done_is_said(learned, learned_copy, tmp_path):
    with pytest.raises(ConfigError, match="setting 'dil'"):
        learned.evaluate(setting="dil")
    with pytest.raises(ConfigError, match="what should recall"):
        learned.retrieve()
    with pytest.raises(ConfigError, match="per_task"):
        Modulation.open(config(tmp_path, adapter__per_task=2), seed=0).write([])
    with pytest.raises(NotFoundError):
        Modulation.open(config(tmp_path), seed=0).evaluate()
    store = learned_copy.workspace.store
    with store.transaction("no predictor") as txn:
        txn.delete_blob(PREDICTOR)
    with pytest.raises(NotFoundError, match="no task predictor"):
        learned_copy.evaluate(setting="mts")


def test_a_run_goes_on_where_it_was_and_several_seeds_are_summed_up(tmp_path, request):
    chosen = config(tmp_path, seed=(0, 1), modulation__memory="bayes-pcn")
    first = run(chosen)
    assert [record.run.seed for record in first] == [0, 1]
    assert (tmp_path / "runs" / "seed-1" / "report.html").read_text().count("recall error")
    versions = len(
        Modulation.open(
            config(tmp_path, store=str(tmp_path / "memory-seed-0")), seed=0
        ).workspace.store.log()
    )
    request.getfixturevalue("no_page")
    again = run(chosen)
    assert again[0].row("bayes-pcn").metrics == first[0].row("bayes-pcn").metrics
    assert (
        len(
            Modulation.open(
                config(tmp_path, store=str(tmp_path / "memory-seed-0")), seed=0
            ).workspace.store.log()
        )
        == versions
    )
