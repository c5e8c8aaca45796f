"""What all methods promise, whatever they read: the five verbs, and reading without data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import memtool
from memtool.errors import MemtoolError, NotFoundError
from memtool.evaluation.record import Record
from memtool.methods.forget import forget
from tests.contract.kinds import KINDS, opened, subject


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks learned and written one after another, then consolidated; and an image."""
    folder = tmp_path_factory.mktemp("contract")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    method = opened(kind, folder)
    for task in "12":
        (result,) = method.adapt(task)
        assert (result.task, result.skipped) == (int(task), False)
        assert len(method.write().added) == 1
    method.consolidate()
    return folder


@pytest.fixture
def method(kind: str, folder: Path) -> Any:
    """For reading, or for what changes nothing."""
    return opened(kind, folder)


@pytest.fixture
def copy(kind: str, folder: Path, tmp_path: Path) -> Any:
    """One that a test may change."""
    shutil.copytree(folder, tmp_path / "copy")
    return opened(kind, tmp_path / "copy", folder)


def test_what_was_done_is_not_done_again(method: Any) -> None:
    head = method.workspace.store.head()
    (trained,) = method.adapt("1")
    assert trained.skipped
    written = method.write()
    assert (written.added, len(written.known), written.version) == ((), 2, head)
    again = method.consolidate()
    assert again.unchanged
    assert again.version == method.workspace.store.head() == head


def test_training_anew_gives_the_same_bytes(copy: Any) -> None:
    path = copy.adapt("1")[0].path / "adapter_model.safetensors"
    before = path.read_bytes()
    (result,) = copy.adapt("1", fresh=True)
    assert not result.skipped
    assert path.read_bytes() == before


def test_a_task_and_an_input_recall_what_is_in_memory(
    method: Any, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {record.name for record in method.workspace.store.view().live}
    by_task = method.retrieve(task="2")
    monkeypatch.setattr("memtool.workspace.create_stream", None)
    alone = opened(kind, folder).retrieve(**subject(kind, folder))
    for result in (by_task, alone):
        record = json.loads(result.model_dump_json(by_alias=True))
        assert record["schema"].startswith("memtool.")
        assert record["version"] == method.workspace.store.head()
        parts = record.get("adapters") or record.get("tasks") or record.get("shares")
        assert {part["name"] for part in parts} == names
    assert by_task.samples > 1 if hasattr(by_task, "samples") else by_task.task == 2


def test_a_record_is_whole_and_the_same_when_opened_again(
    method: Any, kind: str, folder: Path
) -> None:
    record = method.evaluate(history=kind != "modulation on images")
    assert Record.from_json(record.model_dump_json(by_alias=True)) == record
    row = next(row for row in record.metrics.rows if row.kind == "method")
    matrix = row.loss or row.accuracy
    assert [len(scores) for scores in matrix] == [2, 2, 2]
    assert all(score is not None for score in matrix[-1])
    if row.accuracy[-1] != (None, None):
        for one in record.metrics.rows:
            assert [right.samples for right in one.right if right] == [20, 20], one.id
    again = opened(kind, folder).evaluate().row(row.id)
    assert (again.loss or again.accuracy)[-1] == matrix[-1]


def test_measuring_a_version_gives_the_figures_of_its_record(method: Any) -> None:
    record = method.evaluate()
    row = next(row for row in record.metrics.rows if row.kind == "method")
    found = method.measure("HEAD", [1, 2])
    if row.loss:
        assert found["loss"] == pytest.approx(sum(row.loss[-1]) / 2)
    else:
        assert found["faa"] == pytest.approx(row.metrics["faa"])
    assert 0 <= found["task_accuracy"] <= 1
    assert method.known_tasks("HEAD") == (1, 2)


def test_the_store_alone_is_enough(method: Any, folder: Path, kind: str) -> None:
    memory = memtool.load(folder / "memory")
    assert memory.version == method.workspace.store.head()
    assert memory.reads == kind.rpartition(" ")[2]
    assert [record.name for record in memory.adapters] == ["task-1-seed-0", "task-2-seed-0"]
    model = memory.attach()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_was_forgotten_is_gone_and_the_rest_is_there(
    copy: Any, kind: str, folder: Path
) -> None:
    forget(copy.workspace.store, ["1"])
    left = opened(kind, copy.config.runs.parent, folder)
    assert left.known_tasks("HEAD") == (2,)
    if kind.startswith("modulation"):  # its predictor knew both
        left.consolidate()
    record = left.evaluate()
    assert len(record.run.tasks) == 1
    with pytest.raises(MemtoolError):
        left.attach(task="1")


def test_words_that_are_no_task_and_no_version_are_refused(method: Any) -> None:
    for verb in (method.adapt, lambda word: method.retrieve(task=word)):
        with pytest.raises(NotFoundError, match="nothing-of-this-name"):
            verb("nothing-of-this-name")
    with pytest.raises(Exception, match="fewer than 99 versions") as refused:
        method.evaluate(version="HEAD~99")
    assert getattr(refused.value, "exit_status", None) == 3
