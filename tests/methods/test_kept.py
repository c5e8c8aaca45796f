"""Results that are kept on disk, and the versions that a history is read at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from memtool.engine import Engine
from memtool.errors import CorruptError
from memtool.methods.kept import fingerprint_of, kept
from memtool.methods.method import newest_after_each
from memtool.settings import EngineSettings

NUMBERS = TypeAdapter(list[float])


def test_a_result_is_found_once_and_read_again(tmp_path: Path) -> None:
    file, engine = tmp_path / "runs" / "numbers.json", Engine(EngineSettings(device="cpu"))
    found = kept(file, NUMBERS, engine, lambda: [0.1, 2.0])
    assert found == [0.1, 2.0]
    assert kept(file, NUMBERS, engine, lambda: [3.0]) == found
    assert json.loads(file.read_bytes())["result"] == found


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-4], lambda text: text.replace("2.0", "2.5")]
)
def test_a_result_that_is_not_what_was_written_is_refused(tmp_path: Path, damage) -> None:
    file, engine = tmp_path / "numbers.json", Engine(EngineSettings(device="cpu"))
    kept(file, NUMBERS, engine, lambda: [0.1, 2.0])
    file.write_text(damage(file.read_text()))
    with pytest.raises(CorruptError, match=r"numbers\.json") as refused:
        kept(file, NUMBERS, engine, lambda: [3.0])
    assert f"without {file}" in str(refused.value)
    file.unlink()
    assert kept(file, NUMBERS, engine, lambda: [3.0]) == [3.0]


def test_results_of_before_there_were_checksums_are_found(tmp_path: Path) -> None:
    file, engine = tmp_path / "numbers.json", Engine(EngineSettings(device="cpu"))
    file.write_text("[\n  0.1,\n  2.0\n]\n")
    assert kept(file, NUMBERS, engine, lambda: [3.0]) == [0.1, 2.0]
    mapping = TypeAdapter(dict[str, float])
    file.write_text('{"a": 1.5}')
    assert kept(file, mapping, engine, dict) == {"a": 1.5}


def test_a_fingerprint_follows_from_what_is_said_not_from_its_order() -> None:
    assert fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": [2], "a": 1})
    assert fingerprint_of([1, 2]) != fingerprint_of([2, 1])


def test_the_newest_version_after_every_task() -> None:
    history = [("e", (3, 1, 2)), ("d", (3, 1)), ("c", (3, 1)), ("b", (1,)), ("a", (3,)), ("0", ())]
    assert newest_after_each(history, [3, 1, 2]) == {3: "e", 2: "d", 1: "a"}
    assert newest_after_each(history, [1]) == {1: "b"}
