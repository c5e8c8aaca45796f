"""A memory knows what it was made with: verbs that read it need no setting but --store."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from memtool.errors import NotFoundError
from memtool_stores import MemoryStore

MADE = {
    "mira": ("digits-dil", "--set", "memory.beta=0.5", "--rank", "2"),
    "moram": ("moram-digits", "--set", "stream.splits=5", "--rank", "2"),
    "modulation": ("modulation-digits", "--set", "modulation.hidden=16", "--rank", "2"),
}
SMALL = {
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "40",
    "MEMTOOL_STREAM__TEST_PER_TASK": "20",
    "MEMTOOL_TRAIN__EPOCHS": "1",
    "MEMTOOL_MODULATION__PREDICTOR_EPOCHS": "1",
}


@pytest.fixture(params=MADE)
def made(request, memtool, here, monkeypatch):
    """A memory of two tasks at ./theirs/memory, and nothing else there; an image beside it."""
    (here / "theirs").mkdir()
    given = ("--store", "theirs/memory", "--preset", *MADE[request.param])
    for words in (
        ("train-adapter", "--task", "1"),
        ("write",),
        ("train-adapter", "--task", "2"),
        ("write",),
        ("consolidate",),
    ):
        done = memtool(*words, "-q", *given, **SMALL)
        assert done.returncode == 0, done.stderr
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(here / "image.png")
    return request.param


def _unseen(*_args, **_given):
    raise NotFoundError("the training data were opened")


def test_reading_needs_no_setting_but_the_store(made, memtool, here, monkeypatch):
    store = ("--store", "theirs/memory")
    at = MemoryStore.open(str(here / "theirs" / "memory")).head()
    measured = memtool("eval", *store, "--json")
    assert measured.returncode == 0, measured.stderr
    record = json.loads(measured.stdout)
    assert record["run"]["method"] == made
    assert record["run"]["configuration"]["adapter"]["rank"] == 2
    assert record["run"]["configuration"]["stream"]["train_per_task"] == 40
    exported = memtool("export", *store, "--out", "out", "-q")
    assert exported.returncode == 0, exported.stderr
    monkeypatch.setattr("memtool.workspace.create_stream", _unseen)
    for verb in ("retrieve", "explain"):
        done = memtool(verb, *store, "--image", "image.png", "--json")
        if verb == "explain" and made == "modulation":
            assert "method mira, or moram" in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["version"] == at


def test_what_is_given_wins_and_what_differs_is_named(made, memtool):
    done = memtool("retrieve", "--store", "theirs/memory", "--image", "image.png", "--rank", "3")
    assert done.returncode != 0
    assert "rank" in done.stderr
    assert "--rank 2" in done.stderr
    other = memtool("eval", "--store", "theirs/memory", "-q", "--set", "stream.test_per_task=10")
    assert other.returncode == 0, other.stderr
    shown = memtool("eval", "--store", "theirs/memory", "--json", "--set", "stream.test_per_task=9")
    assert json.loads(shown.stdout)["run"]["configuration"]["stream"]["test_per_task"] == 9


def test_what_a_stranger_says_of_the_model_does_not_make_another(made, memtool, here):
    store = MemoryStore.open(str(here / "theirs" / "memory"))
    configuration = dict(store.view().metadata["configuration"])
    for section, key, value in (
        ("backbone", "name", "timm:vit_giant_patch14_dinov2"),
        ("adapter", "rank", 10**6),
        ("backbone", "weights", "a" * 5000),
        ("seed", None, "x"),
    ):
        strange = {
            **configuration,
            section: {**configuration[section], key: value} if key else value,
        }
        with store.transaction("strange", {"configuration": strange, "seed": True}) as txn:
            txn.put_blob("x", f"{section} {key}".encode())
        done = memtool("retrieve", "--store", "theirs/memory", "--image", "image.png", "-q")
        assert "Traceback" not in done.stderr
        if key == "weights" or key is None:
            assert done.returncode in (2, 3)
            assert "error: " in done.stderr
        else:
            assert done.returncode == 0, done.stderr
