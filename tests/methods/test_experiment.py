"""Whole experiments: every row of the table, resumption, several seeds."""

from __future__ import annotations

import pytest

from memtool.errors import ConfigError
from memtool.evaluation.record import read_record
from memtool.methods import experiment
from tests.methods.conftest import small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def first(folder):
    (record,) = experiment.run(small_config(folder), command="test")
    return record


def test_the_table_holds_memory_baselines_and_oracle(first):
    kinds = {row.id: row.kind for row in first.metrics.rows}
    assert kinds == {
        "memory": "method",
        "routed": "baseline",
        "uniform": "baseline",
        "frozen-ridge": "baseline",
        "frozen-lda": "baseline",
        "frozen-ncm": "baseline",
        "frozen-routed": "baseline",
        "frozen-linear": "baseline",
        "sequential": "baseline",
        "sequential-ridge": "baseline",
        "sequential-routed": "baseline",
        "oracle": "upper bound",
    }
    for row in first.metrics.rows:
        assert 0.05 < row.metrics["faa"] <= 1, row.id


def test_files_lie_where_they_should(folder, first):
    place = folder / "runs" / "seed-0"
    assert read_record(place / "record.json") == first
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (folder / "runs" / "results.jsonl").exists()


def test_a_second_run_trains_nothing_and_finds_the_same(folder, first):
    events = []
    (again,) = experiment.run(small_config(folder), command="test", progress=events.append)
    assert not [event for event in events if "adapt" in event.stage]
    for row in first.metrics.rows:
        assert again.row(row.id).accuracy == row.accuracy


def test_a_run_that_was_stopped_goes_on(tmp_path, first):
    config = small_config(tmp_path)

    def stop(event):
        if event.stage.startswith("task 2") and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, progress=stop)
    (record,) = experiment.run(config)
    for row in first.metrics.rows:
        assert record.row(row.id).accuracy == row.accuracy


def test_seeds_have_memories_of_their_own(tmp_path):
    config = small_config(tmp_path, seed=(0, 1), stream__order=("upright", "inverted"))
    records = experiment.run(config, baselines=False)
    assert [record.run.seed for record in records] == [0, 1]
    assert (tmp_path / "memory-seed-0").is_dir()
    assert (tmp_path / "memory-seed-1").is_dir()


def test_a_memory_of_another_seed_or_other_settings_is_not_gone_on_with(folder, first):
    with pytest.raises(ConfigError, match="holds adapters of seed 0"):
        experiment.run(small_config(folder, seed=(1,)))
    with pytest.raises(ConfigError, match="consolidated with other settings"):
        experiment.run(small_config(folder, memory__separation="affine"))
