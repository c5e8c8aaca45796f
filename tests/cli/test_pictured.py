"""A memory of a model of images and text, verb after verb, as a user would call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import memtool
from memtool.errors import DataError
from tests.backbones.tiny_vlm import MARK, picture, write_tiny_llava
from tests.cli.conftest import Memtool, inside

PRESET = ("--preset", "mira-trace")
TASKS = {"colour": ("hue:", "red"), "count": ("many:", "12")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and two tasks of questions about pictures."""
    folder = tmp_path_factory.mktemp("pictured")
    write_tiny_llava(folder / "model")
    for task, (question, answer) in TASKS.items():
        below = folder / "data" / task
        (below / "pictures").mkdir(parents=True)
        for part, count in (("train", 8), ("test", 2)):
            entries = []
            for number in range(count):
                name = f"pictures/{part}{number}.png"
                picture(len(name) * number + count).save(below / name)
                prompt = f"{MARK} {question}"
                entries.append({"prompt": prompt, "answer": answer, "image": name})
            (below / f"{part}.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture
def asked(place: Path, here: Path, environ: dict[str, str]) -> Memtool:
    """Run `memtool … --preset mira-trace` on the questions in the empty folder."""
    values = {
        "store": here / "memory",
        "runs": here / "runs",
        "backbone.name": f"hf:{place / 'model'}",
        "stream.source": place / "data",
        "adapter.rank": 2,
        "train.epochs": 4,
        "text.prompt_tokens": "none",
        "text.answer_tokens": 6,
        "text.epochs": "none",
        "engine.precision": "fp32",
    }
    variables = {f"MEMTOOL_{k.upper().replace('.', '__')}": str(v) for k, v in values.items()}

    def run(*arguments: str, status: int = 0):
        done = inside(here, environ | variables, *arguments, *PRESET)
        assert done.returncode == status, done.stderr
        return done

    return run


def test_every_verb_takes_a_picture_with_its_prompt(asked, place, here):
    for task in TASKS:
        asked("train-adapter", "--task", task)
        asked("write")
    asked("consolidate")
    photo = str(place / "data" / "colour" / "pictures" / "test0.png")
    subject = ("--prompt", f"{MARK} hue:", "--image", photo)
    found = json.loads(asked("retrieve", *subject, "--json").stdout)
    weights = {one["name"]: one["coefficient"] for one in found["adapters"]}
    assert max(weights, key=weights.get) == "task-1-seed-0"
    said = json.loads(asked("generate", *subject, "--json").stdout)["answers"][0]
    assert said["text"] == found["answer"]
    told = json.loads(asked("explain", *subject, "--json").stdout)
    assert told["outcome"]["label"] == found["answer"]
    row = json.loads(asked("eval", "--json").stdout)["metrics"]["rows"][0]
    assert len(row["loss"][-1]) == 2
    lines = here / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": f"{MARK} hue:", "image": photo}), encoding="utf-8")
    (predicted,) = asked("predict", "--prompts", str(lines)).stdout.splitlines()[1:]
    assert predicted.split("\t")[1].split() == found["answer"].split()

    model = memtool.load(str(here / "memory")).attach()
    assert model.generate([f"{MARK} hue:", "hue:"], images=[photo, None])[0] == found["answer"]
    assert model.answer(f"{MARK} hue:", picture(3)) == model.answer(f"{MARK} hue:", picture(3))
    with pytest.raises(DataError, match="0 pictures and 1 marks"):
        model.generate([f"{MARK} hue:"])

    (here / "bad.png").write_text("no picture")
    for arguments, words in (
        (("--prompt", "hue:", "--image", photo), "1 pictures"),
        (("--prompt", f"{MARK} hue:"), f"--prompt '{MARK} …' --image FILE"),
        (("--prompt", f"{MARK} hue:", "--image", "bad.png"), "bad.png: not an image"),
        (("--prompts", str(lines), "--image", photo), "a file that names its pictures itself"),
    ):
        assert words in asked("generate", *arguments, status=2).stderr
    gone = asked("generate", "--prompt", MARK, "--image", "gone.png", status=3)
    assert "there is no image gone.png" in gone.stderr


def test_all_pictures_are_tried_before_anything_learns(asked, place, here, monkeypatch):
    whole = place / "data" / "count" / "pictures" / "train7.png"
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) - 40])
    try:
        refused = asked("train-adapter", "--task", "count", status=2)
    finally:
        whole.write_bytes(content)
    assert "task 2 count, train: " in refused.stderr
    assert "train7.png: not an image that can be read" in refused.stderr
    assert not (here / "runs" / "adapters").exists()
