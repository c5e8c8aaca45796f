"""Choosing on validation samples in cil, dg and on texts: what is learned, read and re-run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from memtool import workspace
from memtool.config import resolve
from memtool.errors import ConfigError
from memtool.evaluation.record import Record, read_record
from memtool.evaluation.selection import Selection
from memtool.experiments import run as experiment
from memtool.experiments.select import cells_of, select, tuning_seed
from memtool.settings import Config
from memtool.streams.task import Images, Task
from tests.contract.kinds import config_of
from tests.methods.test_select import GRID, learned, tiny, watch_training

FEW = {"consolidate__epochs": 1, "stream__test_per_task": 10}
"""Fewer images to learn from leave a class one alone, and LDA no covariance."""
SETTINGS: dict[str, dict[str, Any]] = {
    "cil": {"stream__setting": "cil", "stream__order": None, "stream__classes_per_task": 5},
    "dg": {
        "stream__setting": "dg",
        "stream__order": ("rot0", "rot30", "rot60"),
        "stream__held_out": "rot30",
        "baselines": ("erm",),
    },
}


class Chosen(NamedTuple):
    """A choice and the run that it was for, with hashes of what baselines learned on the way."""

    config: Config
    selection: Selection
    record: Record
    trained: list[str]


def config_in(kind: str, folder: Path, place: Path) -> Config:
    """A small experiment with everything in `folder`, texts and their model in `place`."""
    if kind != "texts":
        return tiny(folder, **FEW, **SETTINGS[kind])
    config = config_of("mira on texts", folder, place)
    stream = config.stream.model_copy(update={"validation": 0.25})
    train = config.train.model_copy(update={"epochs": 1})
    changes = {"stream": stream, "train": train, "baselines": ("sequential",)}
    return config.model_copy(update=changes)


def chosen(config: Config) -> Chosen:
    """Choose on validation samples, then run."""
    trained: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        watch_training(patch, trained)
        patch.setattr(experiment, "write_report", lambda *_, **__: None)
        selection = select(config, cells_of(config, GRID), seed=tuning_seed(config))
        (record,) = experiment.run(config, selection=selection)
    return Chosen(config, selection, record, trained)


@pytest.fixture(scope="module", params=[*SETTINGS, "texts"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Chosen]:
    place = tmp_path_factory.mktemp("chosen")
    return request.param, place, chosen(config_in(request.param, place, place))


def stores(config: Config) -> dict[str, dict[str, str]]:
    """What the memory of a run and those of its cells hold, by name of the store."""
    memory = Path(config.store)
    return {path.name: learned(str(path)) for path in memory.parent.glob(f"{memory.name}*")}


def scrambled(task: Task) -> Task:
    """The samples to test on with labels, or answers, and what they are of dealt anew."""
    draw, test = np.random.default_rng(9), task.test
    if isinstance(test, Images):
        rows = draw.permutation(len(test))
        other: Any = Images(np.array(test.images)[draw.permutation(len(test))], test.labels[rows])
    else:
        answers = tuple(np.roll(test.answers, 1 + int(draw.integers(len(test) - 1))).tolist())
        other = dataclasses.replace(test, answers=answers)
    return dataclasses.replace(task, test=other)


def test_scrambled_test_samples_change_nothing_that_is_learned_or_chosen(
    whole: tuple[str, Path, Chosen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, place, first = whole
    create = workspace.create_stream

    def dealt(settings: Any, *given: Any, **more: Any) -> Any:
        stream = create(settings, *given, **more)
        if settings.split != "test":  # what a choice reads are no test samples
            return stream
        held_out = stream.held_out and scrambled(stream.held_out)
        tasks = tuple(map(scrambled, stream.tasks))
        return dataclasses.replace(stream, tasks=tasks, held_out=held_out)

    monkeypatch.setattr(workspace, "create_stream", dealt)
    again = chosen(config_in(kind, tmp_path, place))
    assert again.selection == first.selection
    assert again.trained == first.trained
    assert len(first.trained) > 2
    assert stores(again.config) == stores(first.config)
    assert len(stores(first.config)) == 3
    scored, before = again.record.row("memory"), first.record.row("memory")
    assert (scored.accuracy, scored.loss) != (before.accuracy, before.loss)


def test_a_record_runs_again_from_its_file_alone(
    whole: tuple[str, Path, Chosen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, first = whole
    monkeypatch.setattr(experiment, "write_report", lambda *_, **__: None)
    file = first.config.runs / "seed-0" / "record.json"
    places = {"store": str(tmp_path / "memory"), "runs": str(tmp_path / "runs")}
    config = resolve(file=file, overrides=places, environ={}, cwd=tmp_path, ambient=False).config
    (again,) = experiment.run(config, selection=read_record(file).run.selection)
    assert again.run.data == first.record.run.data
    assert (again.run.seed, again.run.tasks) == (first.record.run.seed, first.record.run.tasks)
    assert again.run.selection == first.selection
    for row in first.record.metrics.rows:
        found = again.row(row.id)
        assert (found.accuracy, found.loss, found.right) == (row.accuracy, row.loss, row.right)
    assert learned(config.store) == learned(first.config.store)


def test_texts_too_few_to_hold_back_are_told_of_the_choice_in_every_cell(tmp_path: Path) -> None:
    plain = config_of("mira on texts", tmp_path, tmp_path)
    one = {"validation": 0, "train_per_task": 1}
    config = plain.model_copy(update={"stream": plain.stream.model_copy(update=one)})
    notes: list[str] = []
    with pytest.raises(ConfigError, match="--select holds back 20% of the training samples"):
        select(config, cells_of(config, GRID), seed=1000, say=notes.append)
    assert len(notes) == len(cells_of(config, GRID))
    assert all("left out: --select holds back 20%" in note for note in notes)
    assert not any("stream.validation" in note for note in notes)
