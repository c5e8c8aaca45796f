"""Streams of texts: what is read, in which order, and what is refused where."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from memtool.errors import ConfigError, DataError, NotFoundError
from memtool.settings import StreamSettings
from memtool.streams import create_stream
from memtool.streams.task import Stream, Texts
from memtool.streams.text import open_text_stream, text_sources

needs_data = pytest.mark.skipif(
    not os.environ.get("MEMTOOL_DATA"), reason="MEMTOOL_DATA is not set: no TRACE texts"
)


def entries(count: int, word: str = "p") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {number}", "answer": str(number)} for number in range(count)]


def write(folder: Path, splits: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, content in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def description(tmp_path: Path) -> Path:
    write(tmp_path / "data/a", {"train": entries(9), "eval": entries(2), "test": entries(4)})
    write(tmp_path / "data/b", {"train": entries(9, "q"), "test": entries(4, "q")})
    file = tmp_path / "two.yaml"
    file.write_text("path: data\ntasks:\n- {name: a, metric: number}\n- {name: b, metric: sari}\n")
    return file


def opened(file: Path, **settings: object) -> Stream[Texts]:
    return open_text_stream(StreamSettings(source=str(file), setting="trace", **settings))


def test_tasks_are_read_in_the_order_of_the_description(description: Path) -> None:
    stream = opened(description)
    assert [(task.number, task.name, task.metric) for task in stream.tasks] == [
        (1, "a", "number"),
        (2, "b", "sari"),
    ]
    assert stream.tasks[0].train.prompts[3] == "p 3"
    assert stream.tasks[0].train.answers[3] == "3"
    assert [len(part.validation) for part in stream.tasks] == [2, 0]


@pytest.mark.parametrize(("validation", "held"), [(0.3, 3), (4, 4), (0.01, 1), (0.99, 8)])
def test_what_has_no_eval_json_holds_some_back(
    description: Path, validation: float, held: int
) -> None:
    first, second = opened(description, validation=validation, seed=3).tasks
    # eval.json of the first task is its validation, whatever the share.
    assert (len(first.train), first.validation) == (9, Texts(("p 0", "p 1"), ("0", "1")))
    assert len(second.validation) == held
    assert sorted(second.train.prompts + second.validation.prompts) == [f"q {n}" for n in range(9)]
    assert second.validation != opened(description, validation=validation, seed=4).tasks[1].train
    measured = opened(description, validation=validation, seed=3, split="validation")
    assert [task.test for task in measured.tasks] == [first.validation, second.validation]
    assert [task.train for task in measured.tasks] == [first.train, second.train]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"split": "validation"}, "has no eval.json and stream.validation is 0"),
        ({"validation": 9}, r"leaves task 2 \(b\) empty, which has 9"),
        ({"validation": 0.5, "train_per_task": 1}, "empty, which has 1 training"),
    ],
)
def test_validation_texts_that_are_not_there(
    description: Path, settings: dict[str, object], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        opened(description, **settings)


def test_an_order_may_turn_tasks_and_leave_some_out(description: Path) -> None:
    assert [task.name for task in opened(description, order=("b", "a")).tasks] == ["b", "a"]
    assert [task.name for task in opened(description, order=("b",)).tasks] == ["b"]


def test_a_larger_limit_keeps_what_a_smaller_one_chose(description: Path) -> None:
    few = opened(description, train_per_task=3, test_per_task=2).tasks[0]
    more = opened(description, train_per_task=6).tasks[0]
    assert (len(few.train), len(few.test), len(more.train)) == (3, 2, 6)
    assert set(few.train.prompts) < set(more.train.prompts)
    other = opened(description, train_per_task=3, seed=5).tasks[0]
    assert other.train != few.train


def test_the_fingerprint_follows_texts_order_and_cut(description: Path) -> None:
    known = opened(description).fingerprint
    assert opened(description).fingerprint == known
    changed = {
        opened(description, order=("b", "a")).fingerprint,
        opened(description, train_per_task=3).fingerprint,
    }
    write(description.parent / "data/a", {"test": entries(5)})
    changed.add(opened(description).fingerprint)
    assert len(changed | {known}) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"prompt": "a"}, "holds a JSON dict"),
        ([], "holds an empty list"),
        ([*entries(2), {"prompt": "a"}], "entry 3"),
        ([*entries(1), {"prompt": "a", "answer": 7}], "entry 2: answer is 7"),
        ([{"prompt": None, "answer": "b"}], "entry 1: prompt is None"),
        (["text"], "entry 1: str"),
        ([{"prompt": "a", "answer": "b", "x": 1}], "entry 1"),
        ([*entries(2), *[{"prompt": "a", "answer": " \n"}] * 5], "5 of 7 entries have an empty"),
        ([*entries(1), {"prompt": "", "answer": "b"}], "1 of 2 entries have an empty prompt: 2"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named(
    description: Path, content: object, said: str
) -> None:
    write(description.parent / "data/b", {"train": content})
    with pytest.raises(DataError, match=said) as caught:
        opened(description)
    assert "train.json" in caught.value.message


def test_empty_answers_are_placed(description: Path) -> None:
    write(description.parent / "data/a", {"train": [*entries(2), {"prompt": "a", "answer": ""}]})
    with pytest.raises(DataError, match="an empty answer: 3"):
        opened(description)


def test_what_is_no_json_is_named(description: Path) -> None:
    (description.parent / "data/a/test.json").write_text("[", encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.json cannot be read as JSON"):
        opened(description)


def test_a_missing_split_is_named(description: Path) -> None:
    (description.parent / "data/b/test.json").unlink()
    with pytest.raises(NotFoundError, match=r"there is no .*b/test\.json"):
        opened(description)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path: data\n", "tasks"),
        ("path: data\ntasks: []\n", "tasks"),
        ("path: data\ntasks: [{name: a, metric: bleu}]\n", "metric"),
        ("path: data\nsource: x\ntasks: [{name: a, metric: sari}]\n", "source"),
        ("path: data\ntasks: [{name: a, metric: sari}, {name: a, metric: sari}]\n", "twice"),
        ("a: [", "YAML"),
    ],
)
def test_a_description_that_cannot_be_used_names_the_key(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        opened(file)


def test_a_source_or_task_that_is_not_there_is_refused(description: Path) -> None:
    with pytest.raises(NotFoundError, match="tracee"):
        open_text_stream(StreamSettings(source="tracee", setting="trace"))
    with pytest.raises(ConfigError, match="'c', which is no task"):
        opened(description, order=("c",))
    with pytest.raises(ConfigError, match="twice"):
        opened(description, order=("a", "a"))
    description.write_text("path: gone\ntasks: [{name: a, metric: sari}]\n", encoding="utf-8")
    with pytest.raises(NotFoundError, match="no folder"):
        opened(description)


def test_images_are_not_read_from_a_stream_of_texts() -> None:
    with pytest.raises(NotFoundError, match="no text source 'digits'"):
        create_stream(StreamSettings(source="digits", setting="trace"), 32)


@pytest.mark.parametrize("name", ["Eval", "validation", "dev", "VAL"])
def test_parts_are_known_by_name_whatever_their_case(description: Path, name: str) -> None:
    folder = description.parent / "data/a"
    (folder / "eval.json").rename(folder / f"{name}.json")
    (folder / "train.json").rename(folder / "Training.json")
    assert len(opened(description).tasks[0].validation) == 2
    write(folder, {"train": entries(3)})
    with pytest.raises(DataError, match=r"Training\.json and train\.json are both for training"):
        opened(description)


def test_what_is_left_out_and_what_comes_twice_is_said(
    description: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = StreamSettings(source=str(description), setting="trace")
    assert create_stream(settings, 32).notes == (
        "a: 4 of 4 test prompts are also among the training prompts, 4 of them with the same "
        "answer",
        "b: 4 of 4 test prompts are also among the training prompts, 4 of them with the same "
        "answer",
    )
    assert "4 of 4 test prompts" in caplog.text
    write(description.parent / "data/a", {"test": entries(4, "new"), "more": entries(1)})
    (description.parent / "data/a/notes.txt").write_text("x")
    notes = opened(description, order=("a",)).notes
    assert notes == ("a: left out: .json (1), .txt (1)",)


def test_halves_of_characters_are_refused(description: Path) -> None:
    text = '[{"prompt": "a", "answer": "\\ud800"}]'
    (description.parent / "data/a/train.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"entry 1: answer has half of a character"):
        opened(description)


@needs_data
@pytest.mark.parametrize(("name", "tasks"), [("trace", 8), ("trace-official", 8), ("text_cl5", 5)])
def test_built_in_streams_are_whole(name: str, tasks: int) -> None:
    assert name in text_sources()
    stream = open_text_stream(StreamSettings(source=name, setting="trace"))
    assert len(stream.tasks) == tasks
    assert all(len(task.train) and len(task.test) for task in stream.tasks)
    if name == "trace":
        assert (stream.tasks[0].name, stream.tasks[7].name) == ("C-STANCE", "20Minuten")
