"""Streams of prompts with pictures, which JSON names beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from memtool.errors import ConfigError, DataError, NotFoundError
from memtool.inference.sources import prompts_in
from memtool.pictured import Prompt, album_of, as_json, require_text_alone, together
from memtool.settings import StreamSettings
from memtool.streams import create_stream
from memtool.streams.task import Stream

ENTRY = {"prompt": "<image> hue:", "answer": "red", "image": "pictures/1.png"}


def paint(file: Path, red: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), (red, 0, 0), dtype=np.uint8)).save(file)


def write(folder: Path, entries: Sequence[Any] = (ENTRY,), red: int = 9) -> Path:
    paint(folder / "pictures" / "1.png", red)
    paint(folder / "pictures" / "2.png", red + 1)
    test = [{"prompt": "<image> hue:", "answer": "red", "image": ["pictures/2.png"]}]
    for part, said in (("train", list(entries)), ("test", test)):
        (folder / f"{part}.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


def opened(source: Path, **changes: Any) -> Stream:
    return create_stream(StreamSettings(source=str(source), setting="trace", **changes), 32)


def test_a_folder_of_tasks_needs_no_description(tmp_path: Path) -> None:
    for name in ("shape", "colour"):
        write(tmp_path / "data" / name)
    stream = opened(tmp_path / "data", metric="first-character")
    assert [task.name for task in stream.tasks] == ["colour", "shape"]
    assert {task.metric for task in stream.tasks} == {"first-character"}
    assert stream.notes == ()  # pictures that are named are used
    (prompt,) = stream.tasks[0].train.prompts
    (picture,) = prompt.album.pictures
    assert (prompt, picture.rgb().size) == (Prompt("<image> hue:", [picture]), (8, 6))
    assert [task.name for task in opened(tmp_path / "data" / "shape").tasks] == ["shape"]
    assert [task.name for task in opened(tmp_path / "data" / "shape" / "train.json").tasks] == [
        "shape"
    ]
    assert [t.name for t in opened(tmp_path / "data", order=("shape",)).tasks] == ["shape"]


def test_other_pictures_are_another_stream_and_the_same_text_is_not(tmp_path: Path) -> None:
    first, same, other = (
        opened(write(tmp_path / place / "task", red=red)).fingerprint
        for place, red in (("a", 9), ("b", 9), ("c", 90))
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("pictures/gone.png", NotFoundError, r"train.json, entry 2: there is no image .*gone.png"),
        ("train.json", DataError, r"entry 2: .*train.json: not an image"),
        (["pictures/1.png", 3], DataError, "entry 2: image is"),
        ("", DataError, "entry 2: image is"),
        ([], DataError, "entry 2: image is"),
    ],
)
def test_a_picture_that_is_none_is_named_with_its_entry(
    tmp_path: Path, said: Any, error: type[Exception], words: str
) -> None:
    write(tmp_path / "task", [ENTRY, {**ENTRY, "image": said}])
    with pytest.raises(error, match=words):
        opened(tmp_path / "task")


def test_other_keys_are_refused_and_folders_without_texts_are_none(tmp_path: Path) -> None:
    write(tmp_path / "task", [{**ENTRY, "picture": "a.png"}])
    with pytest.raises(DataError, match="perhaps") as refused:
        opened(tmp_path / "task")
    assert "picture" in str(refused.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is none of what is read"):
        opened(tmp_path / "empty")


def test_lines_name_pictures_beside_them(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 3)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "<image> hue:", "image": "a.png"}\nplain\n', encoding="utf-8")
    asked = prompts_in(lines)
    assert [album_of(one) is not None for one in asked] == [True, False]
    entry = {"adapter": "hues", "prompt": "<image> hue:", "answer": "red", "image": "a.png"}
    lines.write_text(json.dumps(entry), encoding="utf-8")
    (task,) = opened(lines).tasks
    assert task.test.prompts[0] == asked[0]


def test_texts_are_put_together_with_their_pictures(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 3)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "<image> hue:", "image": "a.png"}', encoding="utf-8")
    (one,) = prompts_in(lines)
    two = together((one, " red\n", one))
    assert len(album_of(two).pictures) == 2
    assert str(two) == "<image> hue: red\n<image> hue:"
    assert type(together(("a", "b"))) is str
    assert as_json(["a", one]) == ["a", ["<image> hue:", album_of(one).content[0]]]
    with pytest.raises(ConfigError, match="--keep-prompts with prompts that come with pictures"):
        require_text_alone([one], "--keep-prompts")
