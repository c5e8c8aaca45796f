"""A sweep is the same whoever works on it, and whatever befalls them: killed, stopped, astray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from memtool import sealed
from memtool.config import resolve
from memtool.errors import AlreadyExistsError, ConfigError, CorruptError
from memtool.experiments import queue as queues
from memtool.experiments.queue import Fenced, Queue
from memtool.experiments.runs import find_all
from memtool.experiments.sweep import Sweep, axes_of
from memtool.experiments.swept import CellResult, RowResult
from tests.cli.conftest import inside

ROOT = Path(__file__).parents[2]

WORKER = """
import sys, time
from pathlib import Path
folder, lease_seconds, clock = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
steps = int(sys.argv[4])  # of its first job
now = time.time
time.time = lambda: now() + clock
from memtool.experiments.queue import Fenced, Queue

queue = Queue(folder, lease_seconds=lease_seconds)
jobs = [f"job-{n}" for n in range(5)]
while open_jobs := [job for job in jobs if not queue.is_done(job)]:
    for job in open_jobs:
        lease = queue.claim(job)
        if lease is not None:
            break
    else:
        time.sleep(0.05)
        continue
    with lease:
        print("took", job, lease.token, flush=True)
        try:
            for _ in range(steps):
                time.sleep(0.01)
                lease.require_held()
            won = lease.publish({"job": job, "token": lease.token})
        except Fenced:
            won = False
        steps = 10
        print("published" if won else "in vain", job, lease.token, flush=True)
"""


def worker(folder: Path, *, clock: float = 0.0, steps: int = 10) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "cli", "stores"))
    }
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), "3", str(clock), str(steps)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def took(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    word, job, _ = process.stdout.readline().split()
    assert word == "took"
    return job


def test_one_killed_one_stopped_one_astray_lose_at_most_their_job_and_none_counts_twice(
    tmp_path: Path,
) -> None:
    killed = worker(tmp_path, steps=10**6)
    its_job = took(killed)
    stopped = worker(tmp_path, steps=10**6)
    another = took(stopped)
    killed.kill()
    stopped.send_signal(signal.SIGSTOP)
    try:
        # Its clock is ten minutes ahead: it must not take what another holds.
        astray = worker(tmp_path, clock=600)
        others = [took(astray)]
        said, _ = astray.communicate(timeout=60)
    finally:
        stopped.send_signal(signal.SIGCONT)
    late, _ = stopped.communicate(timeout=60)
    killed.communicate()
    lines = said.split("\n")
    others += [line.split()[1] for line in lines if line.startswith("took")]
    assert sorted(others) == [f"job-{n}" for n in range(5)]
    assert f"in vain {another} 1" in late
    assert f"took {another}" not in late
    for number in range(5):
        job = f"job-{number}"
        token = 2 if job in (its_job, another) else 1
        assert sealed.read_json(tmp_path / job / "result.json").content == {
            "job": job,
            "token": token,
        }
    # The dead one left a place to go on in; who is only stopped may still write in his.
    assert json.loads((tmp_path / its_job / "lease-2").read_text())["place"] == ""
    assert json.loads((tmp_path / another / "lease-2").read_text())["place"] == "attempt-2"


def test_a_holder_elsewhere_is_gone_after_a_lease_of_the_observers_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Queue(tmp_path, lease_seconds=600).claim("job")
    assert held is not None
    monkeypatch.setattr(queues, "machine", lambda: "another machine")
    clock = 1000.0
    monkeypatch.setattr(queues, "time", SimpleNamespace(monotonic=lambda: clock))
    other = Queue(tmp_path, lease_seconds=60)
    assert other.claim("job") is None
    clock += 59
    assert other.claim("job") is None
    held._write("1")  # a sign of life: from now on again
    clock += 59
    assert other.claim("job") is None
    clock += 59
    assert other.claim("job") is None
    clock += 1
    taken = other.claim("job")
    assert taken is not None
    assert (taken.token, taken.holder.place) == (2, "attempt-2")
    assert not held.publish({"from": "the first"})
    with pytest.raises(Fenced):
        held.require_held()
    assert taken.publish({"from": "the second"})
    assert not taken.publish({"from": "the second again"})
    assert other.result("job") == {"from": "the second"}
    for lease in (held, taken):
        lease.release()
    assert Queue(tmp_path, lease_seconds=60).claim("job") is None


def test_what_is_given_back_is_taken_at_once_and_goes_on_where_it_was(tmp_path: Path) -> None:
    queue = Queue(tmp_path, lease_seconds=600)
    with queue.claim("job") or pytest.fail("free") as lease:
        assert queue.claim("job") is None
        assert lease.holder.place == ""
    again = Queue(tmp_path, lease_seconds=600).claim("job")
    assert again is not None
    assert (again.token, again.holder.place) == (2, "")
    again.release()


def test_damage_to_a_result_is_said(tmp_path: Path) -> None:
    queue = Queue(tmp_path, lease_seconds=600)
    with queue.claim("job") or pytest.fail("free") as lease:
        assert lease.publish({"figure": 1})
    file = tmp_path / "job" / "result.json"
    file.write_text(file.read_text().replace("1,", "2,"))
    with pytest.raises(CorruptError, match="result"):
        queue.result("job")


# What is asked for ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "plain", "axes"),
    [
        (["train.lr=1e-3,2e-3"], [], {"train.lr": ["1e-3", "2e-3"]}),
        (["adapter.rank=1..3"], [], {"adapter.rank": ["1", "2", "3"]}),
        (["adapter.rank=1..2,8"], [], {"adapter.rank": ["1", "2", "8"]}),
        (["backbone.targets=q,v"], ["backbone.targets=q,v"], {}),
        (["backbone.targets=q,v;q"], [], {"backbone.targets": ["q,v", "q"]}),
        (["train.lr=1e-3"], ["train.lr=1e-3"], {}),
        (["adapter.rank=2..2"], ["adapter.rank=2"], {}),
        (["train.iterations=5..6"], [], {"train.iterations": ["5", "6"]}),
    ],
)
def test_settings_with_several_values_are_axes(
    texts: list[str], plain: list[str], axes: dict[str, list[str]]
) -> None:
    assert axes_of("mira", texts) == (plain, axes)


def planned(folder: Path, *texts: str, **more: object) -> Sweep:
    plain, axes = axes_of("mira", texts)
    assert not plain
    config = resolve(overrides={"seed": "0..1", **more}, ambient=False).config
    return Sweep.begin(folder, config, axes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.lr=1e-3,0.001", "comes twice"),
        ("train.lr=1e-3,fast", "fast"),
        ("memory.topk=1,2", "no effect under memory.separation"),
        ("store=a,b", "store cannot be"),
        ("adapter.rank=3..1", "range 3..1"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        planned(tmp_path / "sweep", text)
    assert not (tmp_path / "sweep").exists()


def test_the_same_sweep_joins_and_another_one_is_told_what_differs(tmp_path: Path) -> None:
    first = planned(tmp_path, "train.lr=1e-3,2e-3", runs="elsewhere", lock_timeout=3)
    again = planned(tmp_path, "train.lr=1e-3,2e-3")
    assert [job.name for job in again.jobs] == [job.name for job in first.jobs]
    assert len({job.name for job in first.jobs}) == 4
    alone = Sweep.join(tmp_path)
    assert [alone.config_of(job) for job in alone.jobs] == [
        again.config_of(job) for job in again.jobs
    ]
    with pytest.raises(AlreadyExistsError, match=r"train\.epochs 4, this one train\.epochs 5"):
        planned(tmp_path, "train.lr=1e-3,2e-3", **{"train.epochs": 5})
    with pytest.raises(AlreadyExistsError, match="seeds"):
        planned(tmp_path, "train.lr=1e-3,2e-3", seed="0..3")
    with pytest.raises(ConfigError, match="no sweep"):
        Sweep.join(tmp_path / "nowhere")


def test_results_are_mean_and_spread_over_seeds_and_failures_go_again(tmp_path: Path) -> None:
    sweep = planned(tmp_path, "train.lr=1e-3,2e-3")
    figures = iter((0.5, 0.7, 0.9))
    for job in sweep.jobs:
        with sweep.queue.claim(job.name) or pytest.fail("free") as lease:
            result = CellResult(cell=job.cell.name, seed=job.seed, token=1, failed="no memory left")
            if job is not sweep.jobs[-1]:
                row = RowResult(
                    id="memory", label="memory", kind="method", figure=next(figures), metrics={}
                )
                result = result.model_copy(update={"failed": None, "rows": (row,)})
            assert lease.publish(result.model_dump(mode="json", by_alias=True))
    found = sweep.write_results()
    first, second = (cell.row() for cell in found.cells)
    assert first is not None
    assert second is not None
    assert (first.values, second.values) == ((0.5, 0.7), (0.9,))
    assert first.mean == pytest.approx(0.6)
    assert first.std == pytest.approx(0.02**0.5)
    assert second.std is None
    assert found.failed == 1
    assert found.cells[1].failed == {1: "no memory left"}
    assert sweep.retry_failed() == 1
    assert sweep.results().left == 1
    assert [job.name for job in sweep.open_jobs()] == [sweep.jobs[-1].name]


def test_two_who_retry_at_once_never_undo_what_one_of_them_made(tmp_path: Path) -> None:
    queue, other = (Queue(tmp_path, lease_seconds=600) for _ in range(2))
    failed = {"failed": "no memory left"}
    with queue.claim("job") or pytest.fail("free") as lease:
        assert lease.publish(failed)

    def fits(found: dict[str, object]) -> bool:
        return found.get("failed") is not None

    def late(found: dict[str, object]) -> bool:
        """Of one who read the result, and was then overtaken by another's whole retry."""
        assert queue.open_again("job", fits)
        assert not queue.is_done("job")
        with queue.claim("job") or pytest.fail("free") as lease:
            assert lease.publish({"failed": None, "figure": 1})
        return fits(found)

    assert not other.open_again("job", late)
    for one in (queue, other):
        assert one.result("job") == {"failed": None, "figure": 1}
        assert not one.open_again("job", fits)
        assert one.claim("job") is None
    assert not Queue(tmp_path, lease_seconds=600).open_again("another", fits)


PLACES = ("", "attempt-2/", "attempt-3/")


def test_what_a_killed_worker_left_is_not_listed_and_is_taken_away(tmp_path: Path) -> None:
    sweep = planned(tmp_path / "sweep", "train.lr=1e-3,2e-3")
    first, second, *_ = sweep.jobs
    cell = tmp_path / "sweep" / "cells" / first.cell.name
    counted = f"cells/{first.cell.name}/attempt-2/seed-{first.seed}"
    for place in PLACES:
        for seed in (first.seed, second.seed):
            (cell / place / f"seed-{seed}").mkdir(parents=True)
            (cell / place / f"seed-{seed}" / "record.json").write_text("{}")
            (cell / place / f"memory-seed-{seed}").mkdir()
    result = CellResult(cell=first.cell.name, seed=first.seed, token=2, record=counted)
    with sweep.queue.claim(first.name) or pytest.fail("free") as lease:
        assert lease.publish(result.model_dump(mode="json", by_alias=True))
    record = tmp_path / "sweep" / counted / "record.json"
    for folder in (tmp_path, tmp_path / "sweep", cell, cell / "attempt-2"):
        assert list(find_all(folder)) == [record]
    assert not list(find_all(cell / "attempt-3"))
    sweep.clear()
    left = {path.relative_to(cell).as_posix() for path in cell.glob("**/*seed-*")}
    own = {f"{place}{kind}seed-{second.seed}" for place in PLACES for kind in ("", "memory-")}
    assert left == own | {f"attempt-2/{kind}seed-{first.seed}" for kind in ("", "memory-")}


def test_a_worker_that_lost_its_job_and_may_write_still_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = planned(tmp_path / "sweep", "train.lr=1e-3,2e-3")
    job = sweep.jobs[0]
    cell = tmp_path / "sweep" / "cells" / job.cell.name
    stopped = sweep.queue.claim(job.name)
    assert stopped is not None
    monkeypatch.setattr(sweep.queue, "lease_seconds", 0.0)  # as silent as one on another machine
    assert sweep.queue.claim(job.name) is None
    taken = sweep.queue.claim(job.name)
    assert taken is not None
    assert (stopped.holder.place, taken.holder.place) == ("", "attempt-2")
    for place in PLACES:
        (cell / place / f"seed-{job.seed}").mkdir(parents=True)
        (cell / place / f"memory-seed-{job.seed}").mkdir()
    where = f"cells/{job.cell.name}/attempt-2/seed-{job.seed}"
    result = CellResult(cell=job.cell.name, seed=job.seed, token=2, record=where)
    with taken:
        assert taken.publish(result.model_dump(mode="json", by_alias=True))

    def cleared() -> list[bool]:
        sweep.clear()
        return [(cell / place / f"memory-seed-{job.seed}").exists() for place in PLACES]

    assert cleared() == [True, True, False]  # nobody ever had the third
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(queues, "machine", lambda: "another machine")
        stopped._lock.release()  # its machine is away: whether it is dead nobody here can tell
        assert cleared() == [True, True, False]
    assert not stopped.publish({})
    stopped.release()
    assert cleared() == [False, True, False]


def test_accuracy_and_loss_have_a_column_each(tmp_path: Path) -> None:
    sweep = planned(tmp_path / "sweep", "train.lr=1e-3,2e-3", seed="0")
    for job, metrics in zip(
        sweep.jobs, ({"loss.final": 0.25}, {"loss.final": 0.5, "faa": 0.75}), strict=True
    ):
        row = RowResult(
            id="memory", label="memory", kind="method", figure=metrics.get("faa"), metrics=metrics
        )
        result = CellResult(cell=job.cell.name, seed=0, token=1, rows=(row,))
        with sweep.queue.claim(job.name) or pytest.fail("free") as lease:
            assert lease.publish(result.model_dump(mode="json", by_alias=True))
    assert sweep.results().measure == "accuracy"
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "user")}
    shown = inside(tmp_path, environment, "sweep")
    assert shown.stdout.splitlines() == [
        "train.lr\tseeds\tfinal average\tforgetting\tloss",
        "0.001\t1\t-\t-\t0.2500",
        "0.002\t1\t75.0 %\t-\t0.5000",
    ]


def test_the_verb_plans_joins_and_shows_a_table(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "user")}
    memtool = partial(inside, tmp_path, environment)
    asked = ["sweep", "--set", "train.lr=1e-3,2e-3", "--seed", "0..1", "--set", "train.epochs=9"]
    planned = memtool(*asked, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.splitlines() == [
        "cell\truns\tleft",
        "train.lr=0.001\t2\t2",
        "train.lr=0.002\t2\t2",
    ]
    assert not (tmp_path / "sweep").exists()
    alone = memtool("sweep")
    assert alone.returncode == 2
    assert "memtool sweep --set" in alone.stderr
    sweep = Sweep.begin(
        tmp_path / "sweep",
        resolve(overrides={"seed": "0..1", "train.epochs": 9}, ambient=False).config,
        {"train.lr": ["1e-3", "2e-3"]},
        preset="digits-dil",
    )
    for place, job in enumerate(sweep.jobs):
        row = RowResult(
            id="memory",
            label="memory",
            kind="method",
            figure=0.5 + place / 10,
            metrics={"forgetting.max": 0.125},
        )
        with sweep.queue.claim(job.name) or pytest.fail("free") as lease:
            result = CellResult(cell=job.cell.name, seed=job.seed, token=1, rows=(row,))
            assert lease.publish(result.model_dump(mode="json", by_alias=True))
    for arguments in (asked, ["sweep"]):
        shown = memtool(*arguments)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.splitlines() == [
            "train.lr\tseeds\tfinal average\tforgetting",
            "0.001\t2\t55.0 % ± 7.1\t12.5 %",
            "0.002\t2\t75.0 % ± 7.1\t12.5 %",
        ]
    assert memtool("sweep", "-q").stdout.startswith("lr-0.002-")
    other = memtool(*asked[:-1], "train.epochs=8")
    assert other.returncode == 4
    assert "train.epochs 9" in other.stderr


# Processes --------------------------------------------------------------------------------------

FORKING = """
import os, signal, sys, time
from pathlib import Path
import torch._dynamo
import memtool.experiments.sweep, memtool.reports.charts, memtool.reports.html
from memtool_cli.main import main
from memtool_cli.verbs import sweep

ARGUMENTS = sys.argv[1:]

def start(out, said):
    child = os.fork()
    if child:
        return child
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    code = main([*ARGUMENTS, "--out", out])
    sys.stdout.flush()
    os._exit(code)

workers = [start("three", f"worker-{n}") for n in range(3)]
killed = workers[0]
until = time.monotonic() + 100
while not (Path("worker-0.err").exists() and "adapt:" in Path("worker-0.err").read_text()):
    assert time.monotonic() < until
    time.sleep(0.02)
os.kill(killed, signal.SIGKILL)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in workers]
assert codes == [-signal.SIGKILL, 0, 0], codes
assert os.waitpid(start("one", "alone"), 0)[1] == 0
os._exit(0)
"""


@pytest.mark.slow
def test_three_processes_one_of_them_killed_come_to_the_table_of_one(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "cli", "stores")),
        "XDG_CONFIG_HOME": str(tmp_path / "user"),
        "OMP_NUM_THREADS": "1",
    }
    asked = (
        "sweep --set train.lr=1e-2,3e-3 --seed 1 --set stream.order=upright,inverted "
        "--set stream.train_per_task=20 --set stream.test_per_task=10 --set train.epochs=1 "
        "--baselines none --device cpu --precision fp32"
    )
    done = subprocess.run(
        [sys.executable, "-c", FORKING, *asked.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    said = "".join(file.read_text() for file in sorted(tmp_path.glob("*.err")))
    assert done.returncode == 0, done.stderr + said
    tables = {(tmp_path / f"{name}.out").read_text() for name in ("worker-1", "worker-2", "alone")}
    assert len(tables) == 1
    assert "train.lr\tseeds\tfinal average\tforgetting" in tables.pop()
    three, one = ((tmp_path / name / "results.json").read_bytes() for name in ("three", "one"))
    assert three == one
    results = sealed.read_json(tmp_path / "three" / "results.json").content
    assert [cell["seeds"] for cell in results["cells"]] == [[1], [1]]
    taken = sorted(file.name for file in (tmp_path / "three" / "queue").glob("*/lease-2"))
    assert taken == ["lease-2"]  # that of the killed one, once
