"""Work that was half done, changed or done twice: gone on with, refused by name, never believed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memtool.adapters.peft_files import CONFIG_NAME, WEIGHTS_NAME
from memtool.alone import alone
from memtool.errors import BusyError, CorruptError, MemtoolError
from memtool.evaluation.record import read_record
from memtool.methods.exchange import ABOUT, OWN_HEAD
from memtool.methods.mira.method import Mira
from memtool_stores.files import is_part
from tests.methods.conftest import small_config

ROOT = Path(__file__).parents[2]


def tiny(folder: Path, **changes: object) -> Mira:
    changes = {"stream__train_per_task": 20, "train__epochs": 1, **changes}
    return Mira.open(small_config(folder, **changes), seed=0)


def test_an_adapter_that_cannot_be_replaced_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mira = tiny(tmp_path)
    path = mira.adapt("1")[0].path
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if (self / ABOUT).is_file() and target == path and not self.samefile(aside[0]):
            raise OSError(28, "No space left on device")
        aside.append(target)
        return rename(self, target)

    aside: list[Path] = []
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises((OSError, MemtoolError), match="No space left"):
        mira.adapt("1", fresh=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert not any(is_part(one.name) for one in path.parent.iterdir())


def test_a_changed_adapter_is_refused_by_name_and_both_remedies_help(tmp_path: Path) -> None:
    mira = tiny(tmp_path)
    path = mira.adapt("1")[0].path
    for name in (ABOUT, WEIGHTS_NAME, CONFIG_NAME, OWN_HEAD):
        whole = (path / name).read_bytes()
        changed = bytearray(whole)
        changed[changed.rindex(b"e" if name in (ABOUT, CONFIG_NAME) else whole[-1:])] ^= 1
        (path / name).write_bytes(changed)
        with pytest.raises(CorruptError, match=re.escape(str(path / name))) as refused:
            mira.write()
        assert "train-adapter --fresh" in str(refused.value)
        assert "--task N without memtool.json and head.safetensors" in str(refused.value)
        (path / name).write_bytes(whole)
    weights = bytearray((path / WEIGHTS_NAME).read_bytes())
    weights[weights.rindex(b"\x3c")] ^= 1  # a number of B: still an adapter
    (path / WEIGHTS_NAME).write_bytes(weights)
    with pytest.raises(CorruptError):
        mira.write()
    aside = tmp_path / "aside"
    shutil.copytree(path, aside)
    mira.adapt("1", fresh=True)
    assert len(mira.write().added) == 1
    for own in (ABOUT, OWN_HEAD):
        (aside / own).unlink()
    assert len(mira.write([aside], task="1").added) == 1  # it is anybody's adapter


def test_an_adapter_of_before_there_were_checksums_is_written(tmp_path: Path) -> None:
    mira = tiny(tmp_path)
    file = mira.adapt("1")[0].path / ABOUT
    about = json.loads(file.read_text())
    del about["seal"], about["files"]
    file.write_text(json.dumps(about))
    with pytest.raises(CorruptError, match="has no checksum"):
        mira.write()
    about["schema_version"] = 1
    file.write_text(json.dumps(about))
    assert mira.adapt("1")[0].skipped
    assert len(mira.write().added) == 1


def test_the_second_of_two_trainings_is_told_who_is_there(tmp_path: Path) -> None:
    mira = tiny(tmp_path)
    folder = mira.workspace.adapter_folder
    with (
        alone(folder / ".task-1-seed-0.lock", "training"),
        pytest.raises(BusyError, match=f"process {os.getpid()} on .* is training") as refused,
    ):
        mira.adapt("1")
    assert refused.value.exit_status == 4
    assert not mira.adapt("1")[0].skipped
    assert [path.name for path in folder.glob(".*")] == [".task-1-seed-0.lock"]
    assert mira.adapt("1")[0].skipped


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MemtoolError, match=r"cannot lock .*file/runs.*Not a directory") as refused:
        tiny(tmp_path, runs=str(tmp_path / "file" / "runs")).adapt("1")
    assert not isinstance(refused.value, CorruptError)
    assert "--set runs=DIR" in str(refused.value)


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start `memtool …` in an empty folder, on little data."""
    environ = {name: value for name, value in os.environ.items() if "MEMTOOL_" not in name} | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "cli", "stores")),
        "XDG_CONFIG_HOME": str(tmp_path / "user"),
        "OMP_NUM_THREADS": "1",
    }
    small = ("stream.train_per_task=100", "stream.test_per_task=40", "engine.precision=fp32")

    def start(*arguments: str) -> subprocess.Popen[str]:
        sets = [part for one in small for part in ("--set", one)]
        return subprocess.Popen(
            [sys.executable, "-c", "from memtool_cli.main import run; run()", *arguments, *sets],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_in_one_folder(
    begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Real processes: one ends right, the other is told which process is there."""
    line = ("run", "--baselines", "frozen", "--set", "stream.order=upright,inverted")
    line += ("--set", "train.epochs=2")
    both = [begin(*line), begin(*line)]
    told = [process.communicate(timeout=250)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 4], told
    done, refused = codes.index(0), codes.index(4)
    assert f"process {both[done].pid} on" in told[refused]
    again = begin(*line)
    assert "Traceback" not in again.communicate(timeout=250)[1]
    assert again.returncode == 0
    assert len(read_record(tmp_path / "runs" / "seed-0" / "record.json").metrics.rows) > 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_is_killed_goes_on_or_begins_anew_and_ends_the_same(
    begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    line = ("train-adapter", "--task", "2", "--set", "train.epochs=4")
    straight = begin(*line, "--set", "runs=straight")
    assert straight.wait(timeout=120) == 0, straight.communicate()
    draw = random.Random(0)
    kills = 0
    for number in range(8):
        process = begin(*line)
        time.sleep(draw.uniform(2, 8))
        # Ctrl-C first, every other time: what is killed then may be saving.
        if number % 2:
            process.send_signal(signal.SIGINT)
            time.sleep(draw.uniform(0, 0.05))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills > 0
    last = begin(*line)
    assert last.wait(timeout=120) == 0, last.communicate()
    last.communicate()
    straight.communicate()
    for name in (WEIGHTS_NAME, CONFIG_NAME, OWN_HEAD):
        found = [
            next(tmp_path.glob(f"{runs}/adapters/[!.]*/{name}")) for runs in ("straight", "runs")
        ]
        assert found[0].read_bytes() == found[1].read_bytes(), name
