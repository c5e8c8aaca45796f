"""predict and calibrate in a folder of pictures, as somebody with files and a pipe."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import memtool
from memtool.config import resolve
from memtool.methods import open_method
from memtool.streams import load_image
from memtool_stores import MemoryStore
from tests.cli.conftest import ROOT, inside
from tests.methods.test_collection import PROMPTS, write_collection

SMALL = {
    "stream.train_per_task": 40,
    "stream.test_per_task": 30,
    "train.epochs": 1,
    "adapter.rank": 4,
    "adapter.alpha": 4,
    "modulation.hidden": 32,
    "modulation.predictor_epochs": 1,
    "engine.device": "cpu",
    "engine.precision": "fp32",
}
KINDS = {
    "mira": (
        "digits-dil",
        {"stream.validation": 0.4, "stream.train_per_task": 250},
    ),
    "moram": ("moram-digits", {"stream.splits": 5}),
    "modulation": ("modulation-digits", {"modulation.memory": "hopfield"}),
}


def run(folder: Path, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMTOOL_")}
    own = {"XDG_CONFIG_HOME": str(folder / "user"), "MEMTOOL_CACHE": str(folder / "cache")}
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))):
        return inside(folder, kept | own | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}, *words)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def remember(folder: Path, kind: str) -> Path:
    """A memory of two tasks in a folder, and test images of them as pictures/task/class-n.png."""
    preset, changes = KINDS[kind]
    where = {"store": str(folder / "memory"), "runs": str(folder / "runs")}
    overrides = {**SMALL, **changes, **where}
    config = resolve(preset=preset, overrides=overrides, environ={}, cwd=folder).config
    method = open_method(config, seed=0)
    for task in "12":
        method.adapt(task)
        method.write()
    method.consolidate()
    names = method.workspace.stream.class_names
    for number in "12":
        test = method.workspace.task(number).test
        there = folder / "pictures" / f"task {number}"
        there.mkdir(parents=True)
        for place, (image, label) in enumerate(zip(test.images, test.labels, strict=True)):
            Image.fromarray(image).save(there / f"{names[label]}-{place:02}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a memory that was calibrated, sixty pictures, and what is none."""
    folder = remember(tmp_path_factory.mktemp("predict"), "mira")
    before = MemoryStore.open(str(folder / "memory")).head()
    (folder / "before").write_text(before, encoding="utf-8")
    done = run(folder, "calibrate", "--wrong", "0.03", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "calibrated.json").write_text(done.stdout, encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "mixed").mkdir()
    some = sorted((folder / "pictures/task 1").iterdir())[:3]
    for file in some:
        shutil.copy(file, folder / "mixed" / f"é {file.name}")
    (folder / "mixed/broken.png").write_bytes(b"no image")
    (folder / "mixed/notes.txt").write_text("no image either", encoding="utf-8")
    return folder


# What is said of pictures -----------------------------------------------------------------


def test_a_row_says_what_the_attached_model_says(place: Path) -> None:
    done = run(place, "predict", "pictures", "--out", "out/all.csv", "--topk", "3", "--batch", "7")
    assert done.returncode == 0, done.stderr
    rows = rows_of((place / "out/all.csv").read_text(encoding="utf-8"))
    files = sorted((place / "pictures").rglob("*.png"))
    assert [row["file"] for row in rows] == [str(file.relative_to(place)) for file in files]
    memory = memtool.load(place / "memory")
    images = np.stack([load_image(file, 32) for file in files])
    out = memory.attach()(torch.from_numpy(images))
    assert [row["label"] for row in rows] == [memory.classes[one] for one in out.logits.argmax(1)]
    for row, shares, weights in zip(
        rows, out.probabilities.tolist(), out.weights.tolist(), strict=True
    ):
        three = sorted(shares, reverse=True)[:3]
        told = [row["probability"], row["probability_2"], row["probability_3"]]
        assert [float(one) for one in told] == pytest.approx(three, abs=1e-5)
        best = weights.index(max(weights))
        name, weight = row["adapters"].split("; ")[0].rsplit("=", 1)
        assert name == memory.adapters[best].name
        assert float(weight) == pytest.approx(weights[best], abs=1e-4)
        assert row["task"] == str(best + 1)
        assert row["abstained"] == "false"
    assert [row["unlike"] == "true" for row in rows] == out.unlike.tolist()
    right = [row["label"] == Path(row["file"]).name.partition("-")[0] for row in rows]
    assert sum(right) > len(right) / 2


def test_json_has_the_same_as_csv(place: Path) -> None:
    run(place, "predict", "mixed", "--out", "same.csv", "--topk", "2")
    run(place, "predict", "mixed", "--out", "same.jsonl", "--topk", "2")
    rows = rows_of((place / "same.csv").read_text(encoding="utf-8"))
    lines = (place / "same.jsonl").read_text(encoding="utf-8").splitlines()
    said = [json.loads(line) for line in lines]
    printed = run(place, "predict", "mixed", "--topk", "2", "--json")
    assert printed.stdout.splitlines() == lines
    assert [one["file"] for one in said] == [row["file"] for row in rows]
    assert [one["label"] or "" for one in said] == [row["label"] for row in rows]
    assert [one.get("error", "") for one in said] == [row["error"] for row in rows]
    for one, row in zip(said, rows, strict=True):
        assert one["schema"] == "memtool.prediction"
        if one["label"] is not None:
            assert [two["label"] for two in one["classes"]] == [row["label"], row["label_2"]]
            assert one["adapters"][0]["task"] == int(row["task"])


@pytest.mark.parametrize("kind", ["moram", "modulation"])
def test_every_method_predicts(kind: str, tmp_path: Path) -> None:
    folder = remember(tmp_path, kind)
    done = run(folder, "predict", "pictures", "--json")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(list((folder / "pictures").rglob("*.png")))
    for one in said:
        assert one["label"] == one["classes"][0]["label"]
        assert 0 < sum(share["weight"] for share in one["adapters"]) < 1.001
        assert one["task"] in (1, 2)
    done = run(folder, "predict", "pictures", "--reject")
    assert done.returncode == 2
    assert "was never calibrated" in done.stderr
    assert "stream.validation=0.1" in done.stderr


# Files ------------------------------------------------------------------------------------


def test_broken_files_are_said_and_keep_their_places(place: Path) -> None:
    done = run(place, "predict", "mixed", "--out", "-")
    assert done.returncode == 1
    rows = rows_of(done.stdout)
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    assert [Path(row["file"]).name for row in rows if not row["label"]] == ["broken.png"]
    assert all((place / row["file"]).is_file() for row in rows)
    assert len(rows) == 4
    assert "no format that is read here" in rows[0]["error"]
    assert "error: mixed/broken.png: not an image" in done.stderr
    assert ".txt (1)" in done.stderr
    assert "1 could not be read" in done.stderr
    only = run(place, "predict", "mixed/broken.png", "-q")
    assert (only.returncode, only.stdout, only.stderr) == (1, "\n", "")


def test_the_first_twenty_of_many_broken_files_are_named(place: Path, tmp_path: Path) -> None:
    for number in range(23):
        (tmp_path / f"{number:02}.png").write_bytes(b"\x89PNG")
    done = run(place, "predict", str(tmp_path), "--out", "-")
    assert done.returncode == 1
    assert len(rows_of(done.stdout)) == 23
    assert done.stderr.count("error: ") == 20
    assert "and 3 more" in done.stderr


def test_patterns_and_lists_name_files_in_their_order(place: Path) -> None:
    shell = sorted(str(one.relative_to(place)) for one in (place / "pictures/task 2").glob("*.png"))
    both = run(place, "predict", "pictures/task 2/*.png", "--out", "-", "--topk", "1")
    assert [row["file"] for row in rows_of(both.stdout)] == shell
    listed = [shell[3], "mixed", "nowhere.png", shell[0]]
    lines = "\r\n".join([*listed, ""]).encode()
    piped = run(place, "predict", "-", "--out", "-", "--topk", "1", stdin=lines)
    assert piped.returncode == 1, piped.stderr
    rows = rows_of(piped.stdout)
    assert [rows[0]["file"], rows[-1]["file"]] == [shell[3], shell[0]]
    assert "there is no image nowhere.png" in [row["error"] for row in rows]
    assert len(rows) == 3 + 4


def test_names_that_are_no_words_come_out_as_files_that_open(place: Path) -> None:
    source = sorted((place / "pictures/task 1").iterdir())[0]
    names = [b"=1+1.png", b"a[1].png", b"caf\xe9.png", b'two\nlines, and "more".png']
    odd = place / "odd"
    odd.mkdir()
    for name in names:
        shutil.copy(source, os.fsencode(odd) + b"/" + name)
    named = sorted(os.listdir(odd))  # noqa: PTH208 - as a shell gives them
    done = run(odd, "predict", "--store", "../memory", "--topk", "1", "--out", "x.csv", *named)
    assert done.returncode == 0, done.stderr
    with (odd / "x.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        found = [row["file"] for row in csv.DictReader(file)]
    assert [os.fsencode(Path(name)) for name in found] == [os.fsencode(name) for name in named]
    assert not any(name.startswith("=") for name in found)
    done = run(odd, "predict", "--store", "../memory", "--json", *named)
    found = [json.loads(line)["file"] for line in done.stdout.splitlines()]
    assert found == named


def test_whoever_reads_no_further_ends_it_without_a_word(place: Path) -> None:
    packages = os.pathsep.join(str(ROOT / name) for name in ("", "cli", "stores"))
    start = f'"{sys.executable}" -c "from memtool_cli.main import run; run()" "$@"'
    line = "find pictures | grep png | memtool predict - --out - --batch 1 -q | head -n 2"
    done = subprocess.run(
        ["bash", "-c", f"memtool() {{ {start}; }}\n{line}; echo ${{PIPESTATUS[2]}}"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    header, row, code = done.stdout.splitlines()
    assert header.startswith("file,label,probability,label_2")
    assert row.startswith("pictures/task ")
    assert code == "141"
    assert done.stderr == ""


def test_a_file_of_rows_appears_whole_or_not_at_all(place: Path) -> None:
    (place / "kept.csv").write_text("before", encoding="utf-8")
    done = run(place, "predict", "pictures", "--out", "kept.csv", "--store", "memory@nowhere")
    assert done.returncode == 3
    assert (place / "kept.csv").read_text(encoding="utf-8") == "before"
    done = run(place, "predict", "mixed", "--out", "kept.csv", "-q")
    assert (done.returncode, done.stdout) == (1, "kept.csv\n")
    assert (place / "kept.csv").read_text(encoding="utf-8").startswith("file,label")
    assert not list(place.glob(".*memtool-part"))


def test_an_image_too_large_is_refused_before_it_is_decoded(place: Path) -> None:
    large = place / "large.png"
    Image.new("1", (4000, 4000)).save(large)
    done = run(place, "predict", "large.png", "--set", "limits.image_pixels=1000000")
    assert done.returncode == 1
    assert "4000 x 4000: 16,000,000 pixels; expected 0 to 1,000,000 (limits.image_pixels)" in (
        done.stderr
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere", "mixed", "nor here.png"], 3, "no file or folder nowhere, nor here.png"),
        (["nowhere/*.png"], 3, "no image matches 'nowhere/*.png'"),
        (["empty"], 2, "empty holds no images"),
        ([], 2, "what should be predicted?"),
        (["mixed", "--prompts", "x.txt"], 2, "paths and --prompts together"),
        (["--prompts", "x.txt"], 2, "reads images"),
        (["mixed", "--out", "x.parquet"], 2, "ends in .csv or .jsonl"),
        (["mixed", "--out", "empty"], 2, "is a folder"),
        (["mixed", "--wrong", "0.1"], 2, "--wrong without --reject"),
        (["mixed", "--reject", "--wrong", "2"], 2, "between 0 and 1"),
        (["mixed", "--reject", "--task", "1"], 2, "without the task"),
        (["mixed", "--reject", "--wrong", "0.001"], 2, "cannot vouch"),
        (["mixed", "--store", "nowhere"], 3, "no memory at 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said(words: list[str], code: int, said: str, place: Path) -> None:
    done = run(place, "predict", *words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def test_a_memory_without_keys_says_what_comes_first(tmp_path: Path, place: Path) -> None:
    store = MemoryStore.open(str(place / "memory"))
    written = [one.id for one in store.log() if one.metadata.get("verb") == "write"]
    for version in (written[0], written[-1]):  # with keys of the adapters before, and without any
        done = run(place, "predict", "mixed", "--store", f"memory@{version}")
        assert done.returncode == 2
        assert "memtool consolidate" in done.stderr
        assert done.stdout == ""


# To be sure enough ------------------------------------------------------------------------


def test_what_was_calibrated_is_what_is_rejected(place: Path) -> None:
    told = json.loads((place / "calibrated.json").read_text(encoding="utf-8"))
    assert told["images"] == 200
    assert told["tasks"] == [1, 2]
    assert told["coverage"] * (1 - told["accuracy"]) <= 0.03
    done = run(place, "predict", "pictures", "--reject", "--wrong", "0.03", "--out", "r.jsonl")
    assert done.returncode == 0, done.stderr
    all_of_them = run(place, "predict", "pictures", "--json").stdout.splitlines()
    lines = (place / "r.jsonl").read_text(encoding="utf-8").splitlines()
    silent = 0
    for line, open_line in zip(lines, all_of_them, strict=True):
        one, other = json.loads(line), json.loads(open_line)
        assert one["label"] in (None, other["label"])
        assert one["abstained"] == (one["label"] is None)
        assert one["classes"] == other["classes"]
        assert one["abstained"] or not one["unlike"]
        silent += one["abstained"]
    assert 0 < silent < len(lines)
    assert f"coverage {100 * (1 - silent / len(lines)):.1f} %" in done.stderr
    stricter = run(place, "predict", "pictures", "--reject", "--wrong", "0.01", "-q")
    assert stricter.stdout.splitlines().count("") >= silent


def test_calibrating_again_changes_nothing(place: Path) -> None:
    head = MemoryStore.open(str(place / "memory")).head()
    done = run(place, "calibrate", "-q")
    assert (done.returncode, done.stdout) == (0, f"{head}\n")


def test_a_calibration_is_of_one_memory(place: Path, tmp_path: Path) -> None:
    before = (place / "before").read_text(encoding="utf-8")
    done = run(place, "predict", "mixed", "--reject", "--store", f"memory@{before}")
    assert done.returncode == 2
    assert f"was never calibrated at version {before}" in done.stderr
    shutil.copytree(place, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert run(copy, "forget", "2").returncode == 0
    done = run(copy, "predict", "mixed", "--reject")
    assert done.returncode == 2
    assert "has changed since it was calibrated" in done.stderr
    again = run(copy, "calibrate", "--set", "stream.validation=0.5")
    assert again.returncode == 2
    assert "may have learned from these samples" in again.stderr


def test_a_record_says_how_much_is_answered(place: Path) -> None:
    done = run(place, "eval", "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]["rows"][0]["metrics"]
    told = json.loads(run(place, "calibrate", "--json").stdout)  # of 5 %, as the record
    assert metrics["reject.coverage"] == told["coverage"]
    assert metrics["reject.accuracy"] == told["accuracy"]


# Prompts ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_prompts_of_a_file_get_rows_too(tmp_path: Path) -> None:
    folder = write_collection(tmp_path)
    made = ["import", "adapters", "--base", "hf:model", "--prompts", "prompts.jsonl"]
    assert run(folder, *made).returncode == 0
    assert run(folder, "consolidate").returncode == 0
    asked = [prompts[1] for prompts in PROMPTS.values()]
    lines = [json.dumps({"prompt": asked[0]}), *asked[1:]]
    (folder / "asked.txt").write_text("\n".join(lines), encoding="utf-8")
    few = ["--set", "text.answer_tokens=3"]
    done = run(folder, "predict", "--prompts", "asked.txt", "--out", "-", "--batch", "2", *few)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert [row["prompt"] for row in rows] == asked
    assert [row["adapters"].rsplit("=", 1)[0].split("=")[0] for row in rows] == [*PROMPTS]
    one = json.loads(
        run(folder, "predict", "--prompts", "asked.txt", "--json", *few).stdout.splitlines()[0]
    )
    assert (one["schema"], one["prompt"]) == ("memtool.answer", asked[0])
    assert one["answer"].strip() == rows[0]["answer"].strip()
    retrieved = json.loads(run(folder, "retrieve", "--prompt", asked[0], "--json").stdout)
    assert one["novelty"] == pytest.approx(retrieved["novelty"], rel=1e-4)
    assert one["unlike"] == retrieved["unlike"]
    done = run(folder, "predict", "photo.png")
    assert done.returncode == 2
    assert "is of a language model" in done.stderr
