"""Streams of texts: a task is a folder of prompts and answers.

    <path>/<task>/train.json         a list of {"prompt": ..., "answer": ...}
    <path>/<task>/eval.json          or validation.json; a task may go without
    <path>/<task>/test.json

A description in YAML names the folder, the tasks in their order, and how an answer of each task is
scored (`memtool.evaluation.text`):

    path: ${MEMTOOL_DATA}/trace      # relative to the description, or absolute
    tasks:
      - {name: FOMC, metric: first-character}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memtool.config import StreamSettings, expand
from memtool.errors import ConfigError, DataError, NotFoundError, did_you_mean
from memtool.streams.ordering import named_places, random_ranks

TextMetric = Literal[
    "first-character", "number", "exact-match", "rouge-l", "edit-similarity", "sari"
]

VALIDATION = ("eval", "validation")
"""Names that the validation split may have; the first one that is there."""

SHOWN = 3
"""Places of wrong entries that a message names."""


@dataclass(frozen=True)
class TextSamples:
    """Prompts and their answers, as many."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def chosen(self, rows: Sequence[int]) -> TextSamples:
        """Those at the given places."""
        return TextSamples(
            tuple(self.prompts[row] for row in rows), tuple(self.answers[row] for row in rows)
        )


@dataclass(frozen=True)
class TextTask:
    """One step of a stream of texts. `number` counts from 1, as on the command line.

    It has no classes, domain or template, which tasks of images have.
    """

    number: int
    name: str
    metric: TextMetric
    train: TextSamples
    validation: TextSamples
    test: TextSamples
    domain: None = None
    classes: tuple[int, ...] = ()
    prompt: None = None


@dataclass(frozen=True)
class TextStream:
    """Tasks of texts in a fixed order; `fingerprint` is a sha256 of the texts, cut and order."""

    name: str
    tasks: tuple[TextTask, ...]
    fingerprint: str
    setting: str = "trace"
    class_names: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many tasks have a number."""
        return len(self.tasks)


class TaskDescription(BaseModel):
    """One task: the name of its folder, and its metric."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    metric: TextMetric


class TextDescription(BaseModel):
    """A stream of texts in YAML; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = ""
    licence: str = ""
    path: Annotated[str, Field(min_length=1)]
    tasks: Annotated[tuple[TaskDescription, ...], Field(min_length=1)]


def text_descriptions() -> dict[str, Path]:
    """The descriptions of texts that ship with memtool, by name."""
    folder = Path(__file__).parent / "descriptions" / "text"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def open_text_stream(settings: StreamSettings) -> TextStream:
    """The stream of texts that `settings.source` names, built in or the path of a description.

    `order` names the tasks in another order and may leave some out; `train_per_task` and
    `test_per_task` choose by the seed, and a larger number keeps what a smaller one chose.
    Raises NotFoundError for a source, folder or split that is not there, ConfigError for settings
    or a description that cannot be used, DataError for texts that cannot be used.
    """
    built_in = text_descriptions()
    file = built_in.get(settings.source) or Path(settings.source).expanduser()
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        raise NotFoundError(
            f"there is no text source {settings.source!r}",
            expected=did_you_mean(settings.source, built_in),
            remedy="a name of these, or the path of a YAML description of prompts and answers",
        )
    description = read_text_description(file)
    root = file.parent / expand(description.path)
    if not root.is_dir():
        raise NotFoundError(
            f"{file.stem}: there is no folder {root}",
            expected=f"the folder that path: {description.path} names",
            remedy=f"correct path: in {file}, or put the data there",
        )
    names = [task.name for task in description.tasks]
    places = named_places(settings.order or names, names, file.stem, "task")
    tasks = tuple(
        _task(root, description.tasks[place], number, settings)
        for number, place in enumerate(places, start=1)
    )
    return TextStream(file.stem, tasks, _fingerprint(tasks))


def read_text_description(file: Path) -> TextDescription:
    """Parse and validate one description; ConfigError names the file and the key."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a YAML file that can be read: {error}") from error
    try:
        description = TextDescription.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "description"
        known = [*TextDescription.model_fields, *TaskDescription.model_fields]
        expected = did_you_mean(key, known) if first["type"] == "extra_forbidden" else None
        raise ConfigError(f"{file}: {key}: {first['msg']}", expected=expected) from error
    names = [task.name for task in description.tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{file}: tasks names {twice!r} twice")
    return description


def read_samples(file: Path) -> TextSamples:
    """The prompts and answers of one JSON file.

    Raises NotFoundError when it is not there; DataError, with the number of the entry (from 1), for
    anything but a list of {"prompt": text, "answer": text}, and for empty prompts and answers: a
    model cannot learn to say nothing, nor is there anything to score.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no {file}",
            expected="train.json and test.json in the folder of every task",
            remedy="add the split, or leave the task out by stream.order",
        ) from error
    except (OSError, ValueError) as error:  # also text that is not UTF-8, or no JSON
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, list) or not content:
        what = "an empty list" if content == [] else f"a JSON {type(content).__name__}"
        raise DataError(f"{file} holds {what}", expected=_SHAPE)
    for number, entry in enumerate(content, start=1):
        _check(entry, f"{file}, entry {number}")
    prompts = tuple(entry["prompt"] for entry in content)
    answers = tuple(entry["answer"] for entry in content)
    _refuse_empty(file, "prompt", prompts)
    _refuse_empty(file, "answer", answers)
    return TextSamples(prompts, answers)


_SHAPE = 'a list of {"prompt": text, "answer": text}'


def _check(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != {"prompt", "answer"}:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{where}: {found}", expected='the keys "prompt" and "answer", no others')
    for key in ("prompt", "answer"):
        if not isinstance(entry[key], str):
            raise DataError(f"{where}: {key} is {entry[key]!r}", expected="text in quotes")


def _refuse_empty(file: Path, what: str, texts: Sequence[str]) -> None:
    empty = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if not empty:
        return
    places = ", ".join(map(str, empty[:SHOWN])) + (", …" if len(empty) > SHOWN else "")
    raise DataError(
        f"{file}: {len(empty)} of {len(texts)} entries have an empty {what}: {places}",
        expected=f"{what}s of at least one visible character",
        remedy="take these entries out",
    )


def _task(
    root: Path, description: TaskDescription, number: int, settings: StreamSettings
) -> TextTask:
    folder = root / description.name
    files = [folder / f"{name}.json" for name in VALIDATION]
    validation = next((file for file in files if file.is_file()), None)
    train = read_samples(folder / "train.json")
    test = read_samples(folder / "test.json")
    return TextTask(
        number=number,
        name=description.name,
        metric=description.metric,
        train=_limited(train, settings.train_per_task, settings.seed),
        validation=TextSamples((), ()) if validation is None else read_samples(validation),
        test=_limited(test, settings.test_per_task, settings.seed),
    )


def _limited(samples: TextSamples, count: int | None, seed: int) -> TextSamples:
    if count is None or count >= len(samples):
        return samples
    ranks = random_ranks(len(samples), "subset", seed)
    return samples.chosen(sorted(np.argsort(ranks)[:count].tolist()))


def _fingerprint(tasks: Sequence[TextTask]) -> str:
    digest = hashlib.sha256()
    for task in tasks:
        parts = (task.train, task.validation, task.test)
        texts = [[list(part.prompts), list(part.answers)] for part in parts]
        digest.update(json.dumps([task.name, task.metric, texts]).encode())
    return digest.hexdigest()
