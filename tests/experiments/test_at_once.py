"""Adapters of several tasks trained at once are those of one after another, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from memtool.config import resolve
from memtool.errors import BusyError, ConfigError, DivergedError, MemtoolError, TrainingInterrupted
from memtool.evaluation.record import Record
from memtool.experiments.at_once import _Worker, adapt_at_once, require_independent
from memtool.experiments.run import run
from memtool.methods import open_method
from memtool.progress import ProgressEvent
from memtool.settings import Config

SMALL: dict[str, object] = {
    "stream.train_per_task": 40,
    "stream.test_per_task": 20,
    "train.epochs": 2,
    "adapter.rank": 2,
    "engine.device": "cpu",
    "engine.precision": "fp32",
    "baselines": ("none",),
}


def config_of(folder: Path, preset: str = "digits-dil", **changes: object) -> Config:
    places = {"store": str(folder / "memory"), "runs": str(folder / "runs")}
    named = {key.replace("__", "."): value for key, value in changes.items()}
    overrides = {**SMALL, **places, **named}
    return resolve(preset=preset, overrides=overrides, ambient=False).config


def trained(folder: Path) -> dict[str, bytes]:
    """The weights and heads of all adapters, by where they lie."""
    found = sorted(folder.glob("runs/**/adapters/*/*.safetensors"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def scores(records: list[Record]) -> list[object]:
    return [(row.id, row.accuracy) for record in records for row in record.metrics.rows]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("one-by-one")
    return folder, run(config_of(folder))


def test_a_run_is_the_same_bit_for_bit(
    tmp_path: Path, one_by_one: tuple[Path, list[Record]]
) -> None:
    heard: set[str] = set()
    found = run(config_of(tmp_path), parallel_tasks=3, progress=lambda e: heard.add(e.stage))
    folder, wanted = one_by_one
    assert len(trained(tmp_path)) == 10  # a weight file and a head of five tasks
    assert trained(tmp_path) == trained(folder)
    assert scores(found) == scores(wanted)
    assert {f"task {n}/5" for n in range(1, 6)} <= {stage[:8] for stage in heard}
    assert not active_children()


def test_a_run_that_was_killed_goes_on(
    tmp_path: Path, one_by_one: tuple[Path, list[Record]]
) -> None:
    config = config_of(tmp_path)
    place = tmp_path / "configuration.json"
    place.write_text(config.model_dump_json(), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from memtool.settings import Config\n"
        "from memtool.experiments.run import run\n"
        "if __name__ == '__main__':\n"
        "    config = Config.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "    run(config, parallel_tasks=2)\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(code, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script), str(place)]) as process:
        end = time.monotonic() + 240
        while not trained(tmp_path) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    there = len(trained(tmp_path))
    assert 0 < there < 10
    while True:
        try:
            found = run(config, parallel_tasks=2)
            break
        except BusyError:  # a process finds at its next step that it is alone
            assert time.monotonic() < end
            time.sleep(0.2)
    folder, wanted = one_by_one
    assert trained(tmp_path) == trained(folder)
    assert scores(found) == scores(wanted)


def test_tasks_without_an_order_and_several_adapters_each(tmp_path: Path) -> None:
    changes = {"stream__setting": "mtl", "adapter__per_task": 2, "adapter__warm_start": "previous"}
    for count in (1, 2):
        folder = tmp_path / str(count)
        method = open_method(config_of(folder, **changes), seed=3)
        tasks = method.workspace.stream.tasks[:2]
        require_independent(method, count)
        adapt_at_once(method, tasks, count)
        assert [method.is_trained(task) for task in tasks] == [True, True]
    ours, theirs = (trained(tmp_path / count) for count in "12")
    assert len(ours) == 8
    assert ours == theirs


@pytest.mark.parametrize(
    ("preset", "changes", "count", "says"),
    [
        ("digits-dil", {"adapter__warm_start": "mean"}, 2, "--warm-start none"),
        ("digits-dil", {"adapter__residual": True}, 2, "adapter.residual=false"),
        ("moram-digits", {}, 2, "the same without --parallel-tasks"),
        ("digits-dil", {}, 0, "1 or more"),
    ],
)
def test_tasks_that_need_each_other_are_refused(
    tmp_path: Path, preset: str, changes: dict[str, object], count: int, says: str
) -> None:
    config = config_of(tmp_path, preset, **changes)
    with pytest.raises(ConfigError, match=says):
        run(config, parallel_tasks=count)
    assert not (tmp_path / "memory").exists()
    assert trained(tmp_path) == {}


def test_an_error_of_a_training_is_that_of_the_run(tmp_path: Path) -> None:
    method = open_method(config_of(tmp_path, train__lr=1e30, train__clip=1e30), seed=0)
    with pytest.raises(DivergedError):
        adapt_at_once(method, method.workspace.stream.tasks, 2)
    assert not active_children()


def test_a_process_that_dies_is_named_with_its_task(tmp_path: Path) -> None:
    def kill(event: ProgressEvent) -> None:
        for child in active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    config = config_of(tmp_path, train__epochs=500)
    method = open_method(config, seed=0, progress=kill)
    with pytest.raises(MemtoolError, match=r"trained task [12] \w+ ended with -9"):
        adapt_at_once(method, method.workspace.stream.tasks, 2)


@pytest.mark.parametrize("told", [True, False])
def test_a_process_that_dies_as_it_begins_is_named_too(tmp_path: Path, told: bool) -> None:
    """What it was told it has not read, or nobody is there to be told."""
    method = open_method(config_of(tmp_path), seed=0)
    task = method.workspace.stream.tasks[0]
    worker = _Worker(method, False)
    if told:
        worker.begin(task)
    (child,) = active_children()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    if not told:
        worker.begin(task)
    with pytest.raises(MemtoolError, match=rf"trained task 1 {task.name} ended with -9"):
        worker.hear()
    worker.end()


def test_ctrl_c_saves_how_far_all_are(tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def interrupt(event: ProgressEvent) -> None:
        seen[event.stage] = event.step
        if len(seen) == 2:
            raise KeyboardInterrupt

    config = config_of(tmp_path, train__epochs=500)
    method = open_method(config, seed=0, progress=interrupt)
    with pytest.raises(TrainingInterrupted) as caught:
        adapt_at_once(method, method.workspace.stream.tasks[:2], 2)
    saved = sorted(method.workspace.adapter_folder.glob(".*.checkpoint"))
    assert len(saved) == 2
    assert caught.value.checkpoint in saved
    assert not active_children()
