"""Modulation by hand and as a whole run, as a user would call it."""

from __future__ import annotations

import json

import pytest

QUICK = {
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "60",
    "MEMTOOL_STREAM__TEST_PER_TASK": "50",
    "MEMTOOL_TRAIN__EPOCHS": "1",
    "MEMTOOL_MODULATION__HIDDEN": "16",
    "MEMTOOL_MODULATION__PREDICTOR_EPOCHS": "1",
    "MEMTOOL_ENGINE__DEVICE": "cpu",
}
PRESET = ("--preset", "modulation-digits")


@pytest.mark.usefixtures("no_page")
def test_a_run_then_one_adapter_recalled_as_a_peft_directory(memtool, here):
    done = memtool("run", *PRESET, "--splits", "2", "--memory", "bayes-pcn", "--json", **QUICK)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["run"]["method"] == "modulation"
    assert record["run"]["setting"] == "mts"
    assert len(record["run"]["tasks"]) == 2
    rows = {row["id"]: row for row in record["metrics"]["rows"]}
    assert set(rows) == {"bayes-pcn", "exact-predicted", "exact", "frozen"}
    assert rows["bayes-pcn"]["metrics"]["recall_error"] < 0.01

    more = (*PRESET, "--splits", "2", "--memory", "bayes-pcn")
    done = memtool("retrieve", *more, "--task", "2", "--out", "adapter", "--json", **QUICK)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "memtool.recall"
    assert found["novelty"] < 0.01
    assert (here / "adapter" / "adapter_model.safetensors").is_file()
    assert "recall error" in memtool("retrieve", *more, "--task", "1", **QUICK).stdout

    # Another memory over the same adapters is asked for later.
    other = (*PRESET, "--splits", "2", "--memory", "bayes-pcn-published")
    done = memtool("retrieve", *other, "--task", "1", **QUICK)
    assert done.returncode == 2
    assert "memtool consolidate --memory bayes-pcn-published" in done.stderr
    assert memtool("consolidate", *other, **QUICK).returncode == 0
    assert memtool("retrieve", *other, "--task", "1", "-q", **QUICK).returncode == 0


def test_words_that_are_no_memory_or_no_number_of_tasks(memtool):
    done = memtool("run", *PRESET, "--memory", "hopfeld", **QUICK)
    assert done.returncode == 2
    assert "did you mean 'hopfield'" in done.stderr
    done = memtool("run", *PRESET, "--splits", "6", "--dry-run", **QUICK)
    assert done.returncode == 2
    assert "stream.splits is 6" in done.stderr
    done = memtool("retrieve", *PRESET, "--task", "1", **QUICK)
    assert done.returncode == 3
    assert "no memory" in done.stderr
