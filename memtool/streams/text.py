"""Streams of texts: a task is a folder of prompts and answers.

    <path>/<task>/train.json         a list of {"prompt": ..., "answer": ...}
    <path>/<task>/eval.json          or validation.json, val.json, dev.json; for a task without it
                                     `stream.validation` holds some of train.json back
    <path>/<task>/test.json

The case of these names does not matter. An entry may name the pictures of its prompt, as
`memtool.streams.pictures` says. A folder of such folders is a stream without a description: its
tasks are in the order of their names, and `stream.metric` scores them all; and so is one folder
alone, or its train.json.

A description in YAML names the folder, the tasks in their order, and how an answer of each task is
scored (`memtool.evaluation.text`):

    path: ${MEMTOOL_DATA}/trace      # relative to the description, or absolute
    tasks:
      - {name: FOMC, metric: first-character}

Texts to be tested on alone, as for adapters that were trained elsewhere, are lines of one file:

    {"adapter": "poems", "prompt": "Write four lines about rain.", "answer": "..."}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from memtool.errors import ConfigError, DataError, NotFoundError, did_you_mean
from memtool.paths import expand
from memtool.pictured import album_of, as_json
from memtool.settings import StreamSettings, TextMetric
from memtool.streams.description import folder_of, read_model
from memtool.streams.files import Found, files_below, left_out
from memtool.streams.ordering import named_places, random_ranks
from memtool.streams.parts import PartName, part_of
from memtool.streams.pictures import COLUMN, PictureFile, with_files
from memtool.streams.rows import Written, lines_of, parse_json, text_of
from memtool.streams.sources import require_path
from memtool.streams.task import Stream, Task, Texts
from memtool_stores.printable import printable, shown

SHOWN = 3
"""Places of wrong entries that a message names."""


class TaskDescription(BaseModel):
    """One task: the name of its folder, and its metric."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    metric: TextMetric


class TaskFolders(BaseModel):
    """A stream of texts in YAML; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str = ""
    licence: str = ""
    path: Annotated[str, Field(min_length=1)]
    tasks: Annotated[tuple[TaskDescription, ...], Field(min_length=1)]


def text_sources() -> dict[str, Path]:
    """The descriptions of texts that ship with memtool, by name."""
    folder = Path(__file__).parent / "descriptions" / "text"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def open_text_stream(settings: StreamSettings) -> Stream[Texts]:
    """The stream of texts that `settings.source` names, built in or the path of a description.

    Or that of a file of lines (.jsonl), whose tasks bear the names of adapters and have no training
    texts.

    `order` names the tasks in another order and may leave some out; `train_per_task` and
    `test_per_task` choose by the seed, and a larger number keeps what a smaller one chose.
    Raises NotFoundError for a source, folder or split that is not there, ConfigError for settings
    or a description that cannot be used, DataError for texts that cannot be used.
    """
    built_in = text_sources()
    file = built_in.get(settings.source) or expand(settings.source)
    if file.suffix == ".jsonl":
        return _of_lines(file, settings)
    if file.suffix in (".yaml", ".yml"):
        description = read_task_folders(file)
        root, name = folder_of(description.path, file), printable(file.stem)
    elif (found := _undescribed(file, settings.metric)) is not None:
        description, root = found
        name = printable(file.resolve().name)
    else:
        require_path(settings.source, file, READS)
        raise NotFoundError(
            f"there is no text source {shown(settings.source)}",
            expected=did_you_mean(settings.source, built_in),
            remedy="a name of these, or the path of a YAML description of prompts and answers, of "
            "a folder of tasks, or of a file of lines (.jsonl)",
        )
    names = [task.name for task in description.tasks]
    places = named_places(settings.order or names, names, name, "task")
    notes: list[str] = []
    tasks = tuple(
        _task(root, description.tasks[place], number, settings, notes)
        for number, place in enumerate(places, start=1)
    )
    return Stream(name, "trace", tasks, (), _fingerprint(tasks), notes=tuple(notes))


READS = "a YAML description of texts, a folder of tasks with train.json, or lines (.jsonl)"


def _undescribed(path: Path, metric: TextMetric) -> tuple[TaskFolders, Path] | None:
    """What a folder of tasks, one of them, or its train.json would be described as, and where.

    None for a path that is none of these. Raises DataError for a folder that cannot be listed.
    """
    folder = path.parent if _is_training(path) else path
    if not folder.is_dir():
        return None
    try:
        root, names = _task_folders(folder)
    except OSError as error:
        raise DataError(
            f"{printable(str(error.filename))}: cannot be listed ({error.strerror})",
            remedy="check its permissions, or take it out",
        ) from error
    if not names:
        return None
    tasks = tuple(TaskDescription(name=name, metric=metric) for name in names)
    return TaskFolders(path=str(root), tasks=tasks), root


def _task_folders(folder: Path) -> tuple[Path, list[str]]:
    """The folder that tasks lie in, and their names: those in `folder`, or itself alone."""
    if any(map(_is_training, folder.iterdir())):
        return folder.resolve().parent, [folder.resolve().name]
    names = [
        one.name
        for one in folder.iterdir()
        if one.is_dir() and one.name.isprintable() and any(map(_is_training, one.iterdir()))
    ]
    return folder, sorted(names)


def _is_training(path: Path) -> bool:
    return path.suffix.lower() == ".json" and part_of(path.stem) == "training" and path.is_file()


def _of_lines(file: Path, settings: StreamSettings) -> Stream[Texts]:
    """The stream of a file of lines: a task for every adapter that they name."""
    if settings.split == "validation":
        raise ConfigError(
            f"stream.split is validation, but {printable(str(file))} holds texts to test on alone",
            expected="a stream of folders with train.json",
            remedy="--split test",
        )
    said: dict[str, list[tuple[str, str]]] = {}
    for line in adapter_lines(file, answered=True):
        said.setdefault(line.adapter, []).append((line.prompt, line.answer))
    if not said:
        raise DataError(f"{printable(str(file))} holds no texts", expected=ANSWERED_LINE)
    name, names, none = printable(file.stem), list(said), Texts((), ())
    tasks = []
    for number, place in enumerate(named_places(settings.order or names, names, name, "task"), 1):
        prompts, answers = zip(*said[names[place]], strict=True)
        test = _limited(Texts(prompts, answers), settings.test_per_task, settings.seed)
        tasks.append(Task(number, names[place], none, none, test, metric=settings.metric))
    return Stream(name, "trace", tuple(tasks), (), _fingerprint(tasks))


LINE = 'lines such as {"adapter": "poems", "prompt": "Write four lines about rain."}'
ANSWERED_LINE = LINE.replace("}", ', "answer": "Drops on the roof"}')


@dataclass(frozen=True)
class AdapterLine:
    """One line: a prompt of an adapter, its answer or "", and the words that say where it is."""

    where: str
    adapter: str
    prompt: str
    answer: str


def adapter_lines(file: Path, *, answered: bool) -> Iterator[AdapterLine]:
    """The lines of a file of prompts, with their answers where they are wanted.

    Raises NotFoundError, and DataError with the number of the line for what is none or is empty.
    """
    for where, line in lines_of(file):
        entry = parse_json(line, where)
        keys = ("adapter", "prompt", "answer")[: 3 if answered else 2]
        texts: list[Any] = [entry.get(k) if isinstance(entry, dict) else None for k in keys]
        expected = ANSWERED_LINE if answered else LINE
        if not all(type(text) is str for text in texts):
            raise DataError(f"{where}: {shown(line)[:80]}", expected=expected)
        for key, text in zip(keys, texts, strict=True):
            if not text.strip():
                whose = "" if key == "adapter" else f" of {shown(texts[0])}"
                raise DataError(f"{where}: the {key}{whose} is empty", expected=expected)
        for key, text in zip(keys, texts, strict=True):
            _require_whole(text, key, where)
        texts[1] = with_files(texts[1], entry.get(COLUMN), file.parent, where)
        yield AdapterLine(where, *texts, *("",) * (3 - len(texts)))


def read_task_folders(file: Path) -> TaskFolders:
    """Parse and validate one description; ConfigError names the file, the line and the key."""
    description = read_model(file, TaskFolders, TaskDescription.model_fields)
    names = [task.name for task in description.tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{printable(str(file))}: tasks names {shown(name)} twice")
        if "/" in name or name.startswith(".") or not name.isprintable():
            raise ConfigError(
                f"{printable(str(file))}: tasks names {shown(name)}",
                expected="the name of a folder in path:",
            )
    return description


def read_samples(file: Path) -> Texts:
    """The prompts and answers of one JSON file.

    Raises NotFoundError when it is not there; DataError, with the number of the entry (from 1), for
    anything but a list of {"prompt": text, "answer": text}, and for empty prompts and answers: a
    model cannot learn to say nothing, nor is there anything to score.
    """
    name = printable(str(file))
    try:
        content = parse_json(text_of(file), name)
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no {name}",
            expected="train.json and test.json in the folder of every task",
            remedy="add the split, or leave the task out by stream.order",
        ) from error
    if not isinstance(content, list) or not content:
        what = "an empty list" if content == [] else f"a JSON {type(content).__name__}"
        raise DataError(f"{name} holds {what}", expected=_SHAPE)
    for number, entry in enumerate(content, start=1):
        _check(entry, f"{name}, entry {number}")
    prompts = tuple(entry["prompt"] for entry in content)
    answers = tuple(entry["answer"] for entry in content)
    _refuse_empty(file, "prompt", prompts)
    _refuse_empty(file, "answer", answers)
    seen = tuple(
        with_files(prompt, entry.get(COLUMN), file.parent, f"{name}, entry {number}")
        for number, (prompt, entry) in enumerate(zip(prompts, content, strict=True), start=1)
    )
    return Texts(seen, answers)


_SHAPE = 'a list of {"prompt": text, "answer": text}, perhaps with "image": path'


def _check(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or set(entry) - {COLUMN} != {"prompt", "answer"}:
        found = shown(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(
            f"{where}: {found}",
            expected=f'the keys "prompt" and "answer", perhaps "{COLUMN}", no others',
        )
    for key in ("prompt", "answer"):
        value = entry[key]
        if not isinstance(value, str) or isinstance(value, Written):
            raise DataError(f"{where}: {key} is {_as_json(value)}", expected="text in quotes")
        _require_whole(value, key, where)


def _require_whole(text: str, key: str, where: str) -> None:
    """Raise DataError for half of a pair of surrogates, which is no character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(
            f"{where}: {key} has half of a character: {shown(text)}",
            expected="pairs of \\ud800 to \\udfff",
        )


def _as_json(value: Any) -> str:
    return str(value) if isinstance(value, Written) else shown(value)


def _refuse_empty(file: Path, what: str, texts: Sequence[str]) -> None:
    empty = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if not empty:
        return
    places = ", ".join(map(str, empty[:SHOWN])) + (", …" if len(empty) > SHOWN else "")
    raise DataError(
        f"{printable(str(file))}: {len(empty)} of {len(texts)} entries have an empty {what}: "
        f"{places}",
        expected=f"{what}s of at least one visible character",
        remedy="take these entries out",
    )


def _task(
    root: Path,
    description: TaskDescription,
    number: int,
    settings: StreamSettings,
    notes: list[str],
) -> Task[Texts]:
    folder = root / description.name
    files, below = _parts(folder)
    train = read_samples(files.get("training", folder / "train.json"))
    test = read_samples(files.get("testing", folder / "test.json"))
    held = [read_samples(files["validation"])] if "validation" in files else []
    pictures = _files_of([train, test, *held])
    notes += left_out(description.name, below, [*files.values(), *pictures])
    notes += _repeated(description.name, train, test)
    train = _limited(train, settings.train_per_task, settings.seed)
    if held:
        (validation,) = held
    else:
        train, validation = _held_back(train, settings, f"task {number} ({description.name})")
    return Task(
        number=number,
        name=description.name,
        metric=description.metric,
        train=train,
        validation=validation,
        test=_limited(
            validation if settings.split == "validation" else test,
            settings.test_per_task,
            settings.seed if settings.test_seed is None else settings.test_seed,
        ),
    )


def _held_back(train: Texts, settings: StreamSettings, where: str) -> tuple[Texts, Texts]:
    """What is left to train on and what is held back for validation, drawn by the seed.

    Raises ConfigError where nothing is held back and it is to be measured, or nothing is left.
    """
    wanted, count = settings.validation, len(train)
    if not wanted:
        if settings.split == "validation":
            raise ConfigError(
                f"stream.split is validation, {where} has no eval.json and stream.validation is 0",
                expected="texts that are held back from training",
                remedy="--set stream.validation=0.2, for the training, too",
            )
        return train, train.chosen([])
    number = int(wanted) if wanted >= 1 else min(max(round(wanted * count), 1), count - 1)
    if not 0 < number < count:
        raise ConfigError(
            f"stream.validation {wanted:g} leaves {where} empty, which has {count} training texts",
            expected="a text or more on both sides",
            remedy="another stream.validation, or a larger stream.train_per_task",
        )
    order = np.argsort(random_ranks(count, "validation", settings.seed))
    held, kept = sorted(order[:number].tolist()), sorted(order[number:].tolist())
    return train.chosen(kept), train.chosen(held)


def _files_of(parts: Sequence[Texts]) -> list[Path]:
    """The files of the pictures of prompts."""
    albums = [album_of(prompt) for part in parts for prompt in part.prompts]
    pictures = [one for album in albums if album is not None for one in album.pictures]
    return [one.path for one in pictures if isinstance(one, PictureFile)]


def _parts(folder: Path) -> tuple[dict[PartName, Path], Found]:
    """The files of a task by the part that they hold, as their names say, and all that is there.

    Raises NotFoundError where there is no folder, DataError where two files hold the same part.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no folder {printable(str(folder))}",
            expected="a folder for every task that the description names",
            remedy="add the task, or leave it out by stream.order",
        )
    found = files_below(folder)
    parts: dict[PartName, Path] = {}
    for file in found.files:
        part = part_of(file.stem) if file.suffix.lower() == ".json" else None
        if part is None or file.parent != folder:
            continue
        if part in parts:
            raise DataError(
                f"{printable(str(folder))}: {printable(parts[part].name)} and "
                f"{printable(file.name)} are both for {part}",
                expected="one file for training, one for testing, one or none for validation",
                remedy="put their entries into one, or take one out",
            )
        parts[part] = file
    return parts, found


def _repeated(name: str, train: Texts, test: Texts) -> list[str]:
    """A sentence on the test prompts that are among the training prompts; none for none."""
    learned = set(train.prompts)
    pairs = set(zip(train.prompts, train.answers, strict=True))
    both = [pair for pair in zip(test.prompts, test.answers, strict=True) if pair[0] in learned]
    if not both:
        return []
    same = sum(pair in pairs for pair in both)
    return [
        f"{name}: {len(both):,} of {len(test):,} test prompts are also among the training prompts, "
        f"{same:,} of them with the same answer"
    ]


def _limited(samples: Texts, count: int | None, seed: int) -> Texts:
    if count is None or count >= len(samples):
        return samples
    ranks = random_ranks(len(samples), "subset", seed)
    return samples.chosen(sorted(np.argsort(ranks)[:count].tolist()))


def _fingerprint(tasks: Sequence[Task[Texts]]) -> str:
    digest = hashlib.sha256()
    for task in tasks:
        parts = (task.train, task.validation, task.test)
        texts = [[as_json(part.prompts), list(part.answers)] for part in parts]
        digest.update(json.dumps([task.name, task.metric, texts]).encode())
    return digest.hexdigest()
