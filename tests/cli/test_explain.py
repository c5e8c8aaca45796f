"""explain: tables, the record, plots, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from memtool.backbones.nano import build_nano
from memtool.config import resolve
from memtool.methods.mira.method import Mira
from tests.cli.conftest import inside

SHORT = {
    "stream.train_per_task": "60",
    "stream.test_per_task": "40",
    "train.epochs": "1",
    "memory.separation": "affine",
    "memory.scope": "block",
    "engine.device": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a memory of two tasks in two versions each, and a picture."""
    folder = tmp_path_factory.mktemp("explain")
    values = {**SHORT, "store": str(folder / "memory"), "runs": str(folder / "runs")}
    mira = Mira.open(resolve(overrides=values, environ={}, cwd=folder).config, seed=0)
    for task in ("1", "2"):
        mira.adapt(task)
        mira.write()
        mira.consolidate()
    digit = Image.fromarray(mira.workspace.task("2").test.images[0])
    digit.save(folder / "digit.png")
    digit.resize((90, 60)).save(folder / "photo.png")
    return folder


def memtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTOOL_")}
    environment = {f"MEMTOOL_{key.replace('.', '__').upper()}": SHORT[key] for key in SHORT}
    places = {"XDG_CONFIG_HOME": str(folder / "user"), "OMP_NUM_THREADS": "1"}
    return inside(folder, kept | environment | places, *arguments)


def test_tables_and_a_page(folder):
    done = memtool(folder, "explain", "--image", "photo.png", "--out", "photo.html")
    assert done.returncode == 0, done.stderr
    facts, adapters, blocks = done.stdout.split("\n\n")
    assert facts.startswith("what comes out\t")
    assert "distance\t" in facts
    assert len(adapters.splitlines()) == 3
    assert [line.split("\t")[0] for line in blocks.splitlines()[1:]] == [
        f"block {number}" for number in range(4)
    ]
    assert "drawn in photo.html" in done.stderr
    page = (folder / "photo.html").read_text()
    assert "<svg" in page
    assert "photo.png" in page


def test_the_record_names_its_schema(folder):
    done = memtool(folder, "explain", "--task", "2", "--json", "--out", "task.svg")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["schema"], record["schema_version"]) == ("memtool.explain", 1)
    assert record["samples"] == 40
    assert record["out"] == "task.svg"
    assert len(record["blocks"]) == 4
    assert {part["task"] for part in record["adapters"]} == {1, 2}
    assert record["familiar"][0]["task"] == 2
    svg = (folder / "task.svg").read_text()
    assert svg.startswith("<?xml")
    assert "var(" not in svg


def test_an_old_version_and_one_name(folder):
    versions = memtool(folder, "log", "-q").stdout.split()
    done = memtool(
        folder, "explain", "--image", "photo.png", "--store", f"memory@{versions[2]}", "-q"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "task-1-seed-0\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "one of --task and --image"),
        (["--task", "1", "--image", "photo.png"], 2, "one of --task and --image"),
        (["--image", "nowhere.png"], 3, "nowhere.png"),
        (["--task", "9"], 3, "a number from 1"),
        (["--task", "1", "--out", "plot.pdf"], 2, ".svg, .png, .html"),
        (["--task", "1", "--set", "method=modulation"], 2, "memtool retrieve"),
        (["--task", "1", "--store", "elsewhere"], 3, "no memory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(arguments, code, said, folder):
    done = memtool(folder, "explain", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_asking_for_one_image_loads_no_plotter_and_no_statistics(folder):
    code = """
import os, sys
from memtool_cli.main import main
code = main(["retrieve", "--image", "digit.png", "-q"])
heavy = ("timm", "torchvision", "sklearn", "matplotlib", "scipy", "datasets", "transformers")
loaded = [name for name in heavy if name in sys.modules]
print(code, loaded, file=sys.stderr, flush=True)
os._exit(1 if code or loaded else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_what_is_unlike_all_that_was_learned_is_said_wherever_it_is_predicted(folder):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    shown = memtool(folder, "retrieve", "--image", "noise.png")
    assert re.match(r"prediction\t\d\t[\d.]+ %\n", shown.stdout)
    assert "unlike all that the memory learned" in shown.stderr
    assert "unlike all that the memory" in memtool(folder, "explain", "--image", "noise.png").stderr
    for image, unlike in (("noise.png", True), ("digit.png", False)):
        for verb in ("retrieve", "explain"):
            said = json.loads(memtool(folder, verb, "--image", image, "--json").stdout)
            said = said.get("prediction", said)
            assert said["unlike"] is unlike
            assert (said["novelty"] > 1) == unlike


def test_settings_that_a_reading_verb_does_not_go_by_are_said(folder):
    for verb in (("retrieve", "--task", "1"), ("eval",)):
        done = memtool(folder, *verb, "--set", "memory.mix=params", "--set", "train.epochs=9")
        assert done.returncode == 0, done.stderr
        assert "note: memory.mix has no effect here: a memory is read as it was made" in done.stderr
        assert "note: train.epochs has no effect here" in done.stderr
    query = folder / "query.safetensors"
    save_file({"query": torch.ones(build_nano().embed_dim)}, query)
    done = memtool(folder, "retrieve", "--query", "query.safetensors", "--set", "stream.seed=3")
    assert done.returncode == 0, done.stderr
    assert "note: stream.seed has no effect here: a query stands for itself" in done.stderr
