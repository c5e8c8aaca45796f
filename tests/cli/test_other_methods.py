"""A method of another package on the command line: its name, its settings, its memory."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from memtool_stores import MemoryStore

METHOD = """
from pydantic import Field
import memtool

class MySettings(memtool.Settings):
    k: int = Field(3, ge=1, description="how many")
    word: str = "a"
    share: float = Field(0.5, description="how much")

class Mine(memtool.Mira):
    name = "nearest-mean"
    Settings = MySettings
"""
NAME = "mine.py:Mine"
SMALL = {
    "MEMTOOL_STREAM__TRAIN_PER_TASK": "40",
    "MEMTOOL_STREAM__TEST_PER_TASK": "20",
    "MEMTOOL_TRAIN__EPOCHS": "1",
}


@pytest.fixture
def method(here):
    """The file of the method, some of its settings in memtool.yaml, and an image."""
    (here / "mine.py").write_text(METHOD)
    (here / "some.yaml").write_text(f"method: {NAME}\nnearest_mean:\n  word: b\n")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(here / "image.png")


def settings(done) -> dict[str, tuple[object, str]]:
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)["settings"]
    return {one["key"]: (one["value"], one["origin"]) for one in shown}


def test_config_shows_the_settings_of_a_method(method, memtool):
    shown = settings(memtool("config", "show", "--method", NAME, "--json"))
    assert shown["method"] == (NAME, "command line")
    assert shown["nearest_mean.k"] == (3, "default")
    assert "memory.beta" in shown  # it extends MIRA
    assert "moram.topk" not in shown
    given = ("--config", "some.yaml", "--set", "nearest_mean.share=0.25", "--json")
    shown = settings(memtool("config", "show", *given, MEMTOOL_NEAREST_MEAN__K="7"))
    assert shown["nearest_mean.k"] == (7, "MEMTOOL_NEAREST_MEAN__K")
    assert shown["nearest_mean.word"] == ("b", "some.yaml:3")
    assert shown["nearest_mean.share"] == (0.25, "command line")


def test_init_writes_the_settings_of_a_method(method, memtool, here):
    assert memtool("init", "--method", NAME).returncode == 0
    text = (here / "memtool.yaml").read_text()
    assert f"method: {NAME}  # " in text
    assert "\nnearest_mean:\n  # k: 3  # how many\n  # word: a\n" in text
    (here / "memtool.yaml").write_text(text.replace("# k: 3", "k: 9"))
    assert settings(memtool("config", "show", "--json"))["nearest_mean.k"][0] == 9


def test_a_memory_knows_the_settings_of_its_method(method, memtool, process, here):
    given = ("--config", "some.yaml", "--set", "nearest_mean.share=0.25", "--rank", "2")
    variables = {**SMALL, "MEMTOOL_NEAREST_MEAN__K": "7"}
    for words in (
        ("train-adapter", "--task", "1"),
        ("write",),
        ("train-adapter", "--task", "2"),
        ("write",),
        ("consolidate",),
    ):
        done = memtool(*words, "-q", *given, **variables)
        assert done.returncode == 0, done.stderr
    said = MemoryStore.open(here / "memory").log()[0].metadata["configuration"]
    assert said["method"] == NAME
    assert said["nearest_mean"] == {"k": 7, "word": "b", "share": 0.25}
    assert "modulation" not in said
    record = json.loads(memtool("eval", "--method", NAME, "--json").stdout)
    assert record["run"]["configuration"]["nearest_mean"] == said["nearest_mean"]
    asked = ("retrieve", "--image", "image.png")
    refused = process(*asked)
    assert refused.returncode == 3
    assert f"method '{NAME}', which is not installed here" in refused.stderr
    assert f"try: --method {NAME}" in refused.stderr
    assert process("log", "-q").returncode == 0
    named = process(*asked, "--method", NAME, "--json")
    assert named.returncode == 0, named.stderr
    assert json.loads(named.stdout)["version"] == MemoryStore.open(here / "memory").head()


def test_an_installed_method_is_used_without_a_word(
    method, memtool, process, environ, here, monkeypatch
):
    site = here / "site"
    about = site / "mine-1.0.dist-info"
    about.mkdir(parents=True)
    (here / "mine.py").rename(site / "mine.py")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[memtool.methods]\nnearest = mine:Mine\n")
    monkeypatch.syspath_prepend(str(site))
    given = ("-q", "--method", "nearest", "--set", "nearest_mean.k=7")
    for words in (("train-adapter", "--task", "1"), ("write",), ("consolidate",)):
        done = memtool(*words, *given, **SMALL)
        assert done.returncode == 0, done.stderr
    paths = os.pathsep.join([str(site), environ["PYTHONPATH"]])
    done = process("eval", "--json", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)["run"]
    assert (run["method"], run["configuration"]["nearest_mean"]["k"]) == ("nearest", 7)
    gone = process("retrieve", "--image", "image.png")
    assert gone.returncode == 3
    assert "made with the method 'nearest', which is not installed here" in gone.stderr
    assert "install the package that has it" in gone.stderr
    assert process("log", "-q").returncode == 0
