"""MoRAM by hand and as a whole run, as a user would call it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from memtool.config import resolve
from memtool.methods.moram.method import Moram

QUICK = {
    "stream.train_per_task": "40",
    "stream.test_per_task": "30",
    "stream.splits": "2",
    "train.epochs": "3",
    "adapter.rank": "4",
    "backbone.targets": "q,v",
    "engine.device": "cpu",
}
VARIABLES = {f"MEMTOOL_{key.upper().replace('.', '__')}": value for key, value in QUICK.items()}
PRESET = ("--preset", "moram-digits")


@pytest.fixture
def moram(memtool):
    def run(*arguments: str, status: int = 0):
        done = memtool(*arguments, *PRESET, **VARIABLES)
        assert done.returncode == status, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def _grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atoms")
    values = {**QUICK, "store": str(folder / "memory"), "runs": str(folder / "runs")}
    config = resolve(preset="moram-digits", overrides=values, environ={}, cwd=folder).config
    grown = Moram.open(config, seed=0)
    for task in ("1", "2"):
        grown.adapt(task)
        grown.write()
    return folder


@pytest.fixture
def grown(_grown, here):
    """Two tasks in memory, and a picture, in the working folder."""
    shutil.copytree(_grown, here, dirs_exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), 128, dtype=np.uint8)).save(here / "digit.png")
    return here


@pytest.mark.slow
def test_atoms_are_grown_through_the_gate_that_was_asked_for(moram):
    gate = ("--score-norm", "task", "--topk", "3", "--temperature", "0.05", "--threshold", "0.1")
    done = moram("train-adapter", "--task", "1", *gate)
    assert "next: memtool write --preset moram-digits" in done.stderr
    done = moram("write")
    assert "next: memtool eval --preset moram-digits" in done.stderr
    assert "another gate" in moram("train-adapter", "--task", "2", status=2).stderr
    record = json.loads(moram("eval", "--json").stdout)
    used = record["run"]["configuration"]["moram"]
    assert (used["score_norm"], used["topk"], used["threshold"]) == ("task", 3, 0.1)


@pytest.mark.slow
def test_what_is_recalled_and_where_atoms_fire(moram, grown):
    record = json.loads(moram("eval", "--history", "--json").stdout)
    row = record["metrics"]["rows"][0]
    assert len(row["atom_use"]["norm"]) == 2
    assert {"atom_norm", "atom_drift", "atom_reuse"} <= set(row["metrics"])
    found = json.loads(moram("retrieve", "--image", "digit.png", "--json").stdout)
    assert found["schema"] == "memtool.retrieve-atoms"
    shown = moram("retrieve", "--task", "1")
    assert "task-1-seed-0" in shown.stdout
    assert "below the threshold" in shown.stderr
    where = ("--layer", "v", "--block", "1", "--out", "map.svg")
    done = moram("explain", "--image", "digit.png", *where)
    assert "task-2-seed-0" in done.stdout
    assert done.stdout.startswith("prediction\t")
    assert (grown / "map.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_dead_atoms_are_pruned_once_their_effect_was_seen(moram, grown):
    below = ("--atoms-below", "0.3")
    plan = json.loads(moram("forget", *below, "--dry-run", "--json").stdout)
    assert plan["schema"] == "memtool.prune"
    assert plan["pruned"] > 0
    assert plan["done"] is False
    refused = moram("forget", *below, status=2)
    assert "before and without them" in refused.stderr
    assert "--yes" in refused.stderr
    done = json.loads(moram("forget", *below, "--yes", "--json").stdout)
    assert (done["done"], done["pruned"]) == (True, plan["pruned"])
    assert "adapters left\t1" in moram("forget", "1").stdout
    assert "task-2-seed-0" in moram("ls").stdout
    assert "task-2-seed-0" in moram("show").stdout


@pytest.mark.slow
def test_a_run_and_its_report(moram, here):
    done = moram("run", "--baselines", "frozen", "--report", "report.html", "--json")
    record = json.loads(done.stdout)
    assert record["run"]["method"] == "moram"
    assert record["metrics"]["rows"][0]["id"] == "memory"
    assert "Atoms as the bank grows" in (here / "report.html").read_text()


def test_words_and_subjects_that_cannot_be_used(moram, memtool):
    assert "bnak" in moram("train-adapter", "--task", "1", "--score-norm", "bnak", status=2).stderr
    assert "tasks or adapters, or --atoms-below" in moram("forget", status=2).stderr
    done = memtool("explain", "--task", "1", "--layer", "v")
    assert done.returncode == 2
    assert "method moram" in done.stderr


@pytest.mark.slow
def test_more_atoms_to_keep_than_there_are_and_a_memory_that_is_not_there(moram):
    done = moram("train-adapter", "--task", "1", "--topk", "9", status=2)
    assert "topk of 9 with 4 atoms" in done.stderr
    assert "no memory" in moram("eval", status=3).stderr
