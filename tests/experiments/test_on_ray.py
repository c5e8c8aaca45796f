"""A sweep on a Ray cluster comes to what one process comes to, also where a trial is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from memtool.config import resolve
from memtool.errors import MemtoolError
from memtool.experiments.on_ray import Work, run_job
from memtool.experiments.sweep import Sweep
from memtool.experiments.swept import CellResult, RowResult
from tests.cli.conftest import inside

ROOT = Path(__file__).parents[2]

SMALL = {
    "stream.order": "upright,inverted",
    "stream.train_per_task": 20,
    "stream.test_per_task": 10,
    "train.epochs": 1,
    "engine.device": "cpu",
    "engine.precision": "fp32",
    "baselines": "none",
}


def planned(folder: Path, **settings: object) -> Sweep:
    config = resolve(overrides={"seed": "1", **SMALL, **settings}, ambient=False).config
    return Sweep.begin(folder, config, {"train.lr": ["1e-2", "3e-3"]})


def test_a_trial_is_a_run_of_the_queue_and_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = planned(tmp_path / "sweep")
    first, second = sweep.jobs
    work = Work(sweep, str(tmp_path))
    found = run_job({"job": first.name}, work)
    assert found["failed"] is False
    assert [job.name for job in sweep.open_jobs()] == [second.name]
    result = sweep.result(first)
    assert result is not None
    assert found["final_average"] == result.rows[0].final_average
    assert run_job({"job": first.name}, work) == found
    leases = sorted(file.name for file in (tmp_path / "sweep" / "queue").glob("*/lease-*"))
    assert leases == ["lease-1"]


def test_a_run_that_another_process_ended_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = planned(tmp_path / "sweep")
    job = sweep.jobs[1]
    row = RowResult(id="m", label="m", kind="method", figure=None, metrics={"loss.final": 0.25})
    result = CellResult(cell=job.cell.name, seed=job.seed, token=1, rows=(row,))
    with sweep.queue.claim(job.name) or pytest.fail("free") as lease:
        assert lease.publish(result.model_dump(mode="json", by_alias=True))
    found = run_job({"job": job.name}, Work(sweep, str(tmp_path)))
    assert found == {"failed": False, "loss": 0.25}


def test_a_machine_without_the_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = planned(tmp_path / "sweep")
    (tmp_path / "sweep").rename(tmp_path / "elsewhere")
    with pytest.raises(MemtoolError, match="sees no sweep in"):
        run_job({"job": sweep.jobs[0].name}, Work(sweep, str(tmp_path)))


def test_options_of_a_cluster_need_one(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "user")}
    memtool = partial(inside, tmp_path, environment, "sweep", "--set", "train.lr=1e-2,3e-3")
    refused = memtool("--resources", "cpu=1")
    assert refused.returncode == 2
    assert "--resources without --ray" in refused.stderr
    assert not (tmp_path / "sweep").exists()


# On a cluster -----------------------------------------------------------------------------------

ASKED = (
    "sweep --set train.lr=1e-2,3e-3 --seed 1 --set stream.order=upright,inverted "
    "--set stream.train_per_task=20 --set stream.test_per_task=10 --set train.epochs=1 "
    "--baselines none --device cpu --precision fp32"
)


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "cli", "stores")),
        "XDG_CONFIG_HOME": str(folder / "user"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    return subprocess.Popen(
        [sys.executable, "-c", "from memtool_cli.main import run; run()", *ASKED.split(), *more],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return out


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_trials_one_of_them_killed_come_to_the_table_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("ray.tune")
    on_ray = started(tmp_path, "--out", "ray", "--ray", "local", "--resources", "cpu=1")
    until, first = time.monotonic() + 150, None
    while first is None:
        assert time.monotonic() < until
        assert on_ray.poll() is None, on_ray.communicate()
        first = next(iter((tmp_path / "ray" / "queue").glob("*/lease-1")), None)
        time.sleep(0.02)
    its_job = first.parent.name
    os.kill(json.loads(first.read_text())["process"], signal.SIGKILL)
    table = ended(on_ray)
    assert table == ended(started(tmp_path, "--out", "one"))
    assert table.startswith("train.lr\tseeds\tfinal average\tforgetting\n")
    ray, one = ((tmp_path / name / "results.json").read_bytes() for name in ("ray", "one"))
    assert ray == one
    taken = {file.parent.name for file in (tmp_path / "ray" / "queue").glob("*/lease-2")}
    assert taken == {its_job}  # lost by the killed one, once
    assert not (tmp_path / "ray" / "ray").exists()
