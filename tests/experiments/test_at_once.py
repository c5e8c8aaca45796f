"""Adapters of several tasks trained at once are those of one after another.

Bit for bit where processes train them, up to rounding where they share a pass.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from memtool.alone import alone
from memtool.config import resolve
from memtool.errors import BusyError, ConfigError, DivergedError, MemtoolError, TrainingInterrupted
from memtool.evaluation.record import Record
from memtool.experiments.at_once import (
    _Worker,
    adapt_at_once,
    plan_at_once,
    require_independent,
    trains_in_one_pass,
)
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


@pytest.mark.parametrize("how", ["processes", "one-pass"])
def test_an_error_of_a_training_is_that_of_the_run(tmp_path: Path, how: str) -> None:
    changes = {"train__lr": 1e30, "train__clip": 1e30, "engine__tasks_at_once": how}
    method = open_method(config_of(tmp_path, **changes), seed=0)
    with pytest.raises(DivergedError):
        adapt_at_once(method, method.workspace.stream.tasks, 2)
    assert not active_children()
    assert trained(tmp_path) == {}


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


# In one pass


def one_pass(folder: Path, **changes: object) -> Config:
    return config_of(folder, **{"engine__tasks_at_once": "one-pass", **changes})


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the adapters, by file and name."""
    found = {}
    for file in sorted(folder.glob("runs/**/adapters/*/*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.relative_to(folder)} {name}"] = tensor
    return found


def require_equal(ours: Path, others: Path) -> None:
    """Up to rounding, and not bit for bit: they were not trained in the same way."""
    mine, theirs = numbers(ours), numbers(others)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        known = torch.isfinite(tensor)  # the bias of a class of another task is not
        assert torch.equal(known, torch.isfinite(theirs[name]))
        apart = (tensor[known] - theirs[name][known]).norm()
        assert apart <= 1e-4 * (1 + theirs[name][known].norm())
    assert trained(ours) != trained(others)


def test_a_run_in_one_pass_is_the_same_to_rounding(
    tmp_path: Path, one_by_one: tuple[Path, list[Record]]
) -> None:
    heard: list[ProgressEvent] = []
    found = run(one_pass(tmp_path), parallel_tasks=3, progress=heard.append)
    folder, wanted = one_by_one
    require_equal(tmp_path, folder)
    assert scores(found) == scores(wanted)
    steps = [event.stage for event in heard if ": adapt" in event.stage]
    assert steps == ["task 1/5 upright: adapt and 2 more"] * 2 + (
        ["task 4/5 rot180-noise: adapt and 1 more"] * 2
    )
    (costs,) = (one.inside.costs for one in found)
    assert costs[0].seconds > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter__per_task": 2, "train__augment": "flip-crop", "train__mixup": 0.4},
        {"stream__setting": "cil", "adapter__per_task": 2, "train__batch_size": 16},
        {"adapter__blocks": "from-look", "memory__look_at": 2},
    ],
)
def test_digits_in_one_pass(tmp_path: Path, changes: dict[str, object]) -> None:
    """Several adapters a task, augmented and mixed; of other classes; from a later block on."""
    alone = open_method(config_of(tmp_path / "alone", **changes), seed=3)
    tasks = alone.workspace.stream.tasks
    each = [alone.adapt(str(task.number)) for task in tasks]
    method = open_method(one_pass(tmp_path / "pass", **changes), seed=3)
    adapt_at_once(method, tasks, 5)
    require_equal(tmp_path / "pass", tmp_path / "alone")
    for task, wanted in zip(tasks, each, strict=True):
        found = method.adapt(str(task.number))
        assert [one.skipped for one in found] == [True] * len(wanted)
        assert [one.losses for one in found] == [pytest.approx(one.losses) for one in wanted]
        assert [one.train_accuracy for one in found] == [one.train_accuracy for one in wanted]


def test_tasks_of_other_sizes_have_passes_of_their_own(tmp_path: Path) -> None:
    """Those of equally many steps share one, though their last batches are of other sizes."""
    rng = np.random.default_rng(0)
    for domain, count in (("noon", 20), ("dusk", 7), ("dawn", 19)):
        for part, images in (("train", count), ("test", 3)):
            for place, name in enumerate("ab"):
                folder = tmp_path / "photos" / part / domain / name
                folder.mkdir(parents=True)
                for number in range(images):
                    pixels = rng.integers(0, 120, (32, 32, 3)) + 120 * place
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    changes: dict[str, object] = {
        "stream__source": str(tmp_path / "photos"),
        "stream__order": ("noon", "dusk", "dawn"),
        "stream__train_per_task": None,
        "train__batch_size": 10,
    }
    method = open_method(one_pass(tmp_path / "pass", **changes), seed=0)
    tasks = method.workspace.stream.tasks
    assert [len(task.train) for task in tasks] == [40, 14, 38]
    assert plan_at_once(method, 3) == [[1, 3], [2]]
    assert plan_at_once(method, 1) is None
    adapt_at_once(method, tasks, 3)
    one = open_method(config_of(tmp_path / "alone", **changes), seed=0)
    for task in tasks:
        one.adapt(str(task.number))
    require_equal(tmp_path / "pass", tmp_path / "alone")


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path: Path) -> None:
    """Bit for bit as one that was not; the finished tasks are left as they are."""
    changes = {"train__epochs": 6, "adapter__per_task": 2}
    whole = open_method(one_pass(tmp_path / "whole", **changes), seed=0)
    tasks = whole.workspace.stream.tasks[:4]
    adapt_at_once(whole, tasks, 2)

    def interrupt(event: ProgressEvent) -> None:
        if event.stage.startswith("task 3") and event.step == 3:
            signal.raise_signal(signal.SIGINT)

    config = one_pass(tmp_path / "cut", **changes)
    method = open_method(config, seed=0, progress=interrupt)
    with pytest.raises(TrainingInterrupted) as caught:
        adapt_at_once(method, tasks, 2)
    assert caught.value.checkpoint.exists()
    assert [method.is_trained(task) for task in tasks] == [True, True, False, False]
    heard: list[ProgressEvent] = []
    adapt_at_once(open_method(config, seed=0, progress=heard.append), tasks, 2)
    assert {event.stage for event in heard} == {"task 3/5 rot90: adapt and 1 more"}
    assert heard[0].step == 4
    assert trained(tmp_path / "cut") == trained(tmp_path / "whole")
    assert [one.resumed for one in method.adapt("3")] == [True, True]
    assert not list(method.workspace.adapter_folder.glob(".*.checkpoint"))


def test_a_task_that_another_trains_is_left_to_it(tmp_path: Path) -> None:
    """The locks of all tasks of a pass are held, and free after it could not have one."""
    method = open_method(one_pass(tmp_path), seed=0)
    folder = method.workspace.adapter_folder
    locks = [folder / f".{name}.lock" for task in (1, 2, 3) for name in [f"task-{task}-seed-0"]]
    with alone(locks[1], "training"), pytest.raises(BusyError):
        method.adapt_together(["3", "2", "1"])
    assert trained(tmp_path) == {}
    held = []

    def look(event: ProgressEvent) -> None:
        for lock in locks:
            with pytest.raises(BusyError), alone(lock, "training"):
                pass
        held.append(event.step)

    open_method(one_pass(tmp_path), seed=0, progress=look).adapt_together(["3", "2", "1"])
    assert held == [1, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train__stop_at": 0.9}, "train.stop_at"),
        ({"stream__setting": "mtl", "adapter__residual": True}, "adapter.residual"),
        ({"stream__setting": "trace", "stream__source": "text_cl5"}, "language model"),
    ],
)
def test_what_has_a_training_of_its_own_is_in_processes(
    tmp_path: Path, changes: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = open_method(one_pass(tmp_path, **changes), seed=0)
    with pytest.raises(ConfigError, match=says) as told:
        require_independent(method, 2)
    assert "engine.tasks_at_once=processes" in str(told.value)
    for how in ("processes", "auto"):
        method = open_method(config_of(tmp_path, **changes, engine__tasks_at_once=how), seed=0)
        monkeypatch.setattr(method.workspace.engine, "device", torch.device("cuda"))
        require_independent(method, 2)
        assert not trains_in_one_pass(method)


def test_a_method_that_trains_otherwise_is_in_processes(tmp_path: Path) -> None:
    method = open_method(config_of(tmp_path, "moram-digits"), seed=0)
    assert "method moram" in (method.trained_apart or "")
    assert open_method(config_of(tmp_path), seed=0).trained_apart is None


def test_auto_is_one_pass_on_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = open_method(config_of(tmp_path), seed=0)
    assert not trains_in_one_pass(method)
    monkeypatch.setattr(method.workspace.engine, "device", torch.device("cuda"))
    assert trains_in_one_pass(method)


LAUNCHED = """
import sys
from pathlib import Path
import torch
from memtool.experiments.at_once import adapt_at_once, require_independent
from memtool.methods import open_method
from memtool.settings import Config
config = Config.model_validate_json(Path(sys.argv[1]).read_text())
method = open_method(config, seed=0)
require_independent(method, 3)
assert method.workspace.engine.processes == 2
adapt_at_once(method, method.workspace.stream.tasks[:3], 3)
torch.distributed.destroy_process_group()  # a thread of it that ends late aborts the process
"""


@pytest.mark.slow
def test_processes_of_a_launcher_share_a_pass(
    tmp_path: Path, one_by_one: tuple[Path, list[Record]]
) -> None:
    config, script = config_of(tmp_path), tmp_path / "launched.py"
    place = tmp_path / "configuration.json"
    place.write_text(config.model_dump_json(), encoding="utf-8")
    script.write_text(LAUNCHED, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, str(script), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    ours, others = numbers(tmp_path), numbers(one_by_one[0])
    assert len(ours) == len(others) * 3 / 5
    for name, tensor in ours.items():
        other = others[name.replace("runs/", "runs/seed-0/")]
        assert torch.allclose(tensor, other, atol=1e-3)
