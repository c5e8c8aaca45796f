"""A sweep on a Ray cluster: every run that is left is a trial of Tune, on any of its machines.

The sweep's folder says what is done and who works on what, as without Ray: a trial takes its run
from the queue there, and others that serve the folder at the same time take theirs. So a trial that
is killed loses its run alone, which is tried again, and the same command goes on after any stop.
All machines see the folder at the same path.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from memtool import cluster
from memtool.errors import MemtoolError
from memtool.experiments.follow import Said
from memtool.experiments.sweep import POLL_SECONDS, Sweep
from memtool.experiments.swept import Results, read_plan
from memtool.progress import Progress, ProgressEvent

logger = logging.getLogger(__name__)

DEATHS = 5
"""How often the process of a run may die before the run is left as it is."""

TRIALS = "ray"
"""The folder, in that of the sweep, for what Tune keeps while it runs."""

OF_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # whose banner is printed whatever `verbose` says
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends it as it ends any verb
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Work:
    """What a trial is told beside the name of its run: the sweep, where it is, how it is followed.

    `home` is the folder in which the command was started.
    """

    sweep: Sweep
    home: str
    log: tuple[str, ...] = ()
    said: Said | None = None
    command: str | None = None


def run_job(trial: Mapping[str, str], work: Work) -> dict[str, Any]:
    """The run named `trial["job"]` to its result, by whomever: what a trial of Tune is.

    Raises MemtoolError on a machine that does not see the sweep, or has another memtool.
    """
    cluster.begin_in(work.home)
    folder = work.sweep.folder
    if read_plan(folder) is None:
        raise MemtoolError(
            f"{socket.gethostname()} sees no sweep in {folder}",
            expected="a folder that all machines of the cluster see at the same path",
            remedy="--out DIR on a file system that they share",
        )
    sweep = Sweep(folder, Sweep.join(folder).plan, work.sweep.base)
    sweep.base.limits.put_in_force()
    (job,) = (one for one in sweep.jobs if one.name == trial["job"])
    sweep.work_on([job], say=logger.info, log=work.log, said=work.said, command=work.command)
    result = sweep.result(job)
    assert result is not None
    row = next((row for row in result.rows if row.kind == "method"), None)
    figures = {"final_average": row and row.final_average, "loss": row and row.loss}
    known = {name: figure for name, figure in figures.items() if figure is not None}
    return {"failed": result.failed is not None, **known}


def work_on_ray(
    sweep: Sweep,
    address: str,
    *,
    resources: Mapping[str, float],
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
    log: Sequence[str] = (),
    said: Said | None = None,
    command: str | None = None,
) -> Results:
    """As `Sweep.work`, by trials of Tune on the cluster at an address; `resources` is for each.

    Raises ConfigError where there is no Ray, or no cluster; MemtoolError where runs are left
    without a result, as their processes died too often.
    """
    sweep = Sweep(sweep.folder.resolve(), sweep.plan, sweep.base)
    jobs = [job.name for job in sweep.open_jobs()]
    with cluster.joined(address) as ray, _environment(OF_TUNE):
        if jobs:
            engine = sweep.base.engine
            each = cluster.reserved(resources, ray, device=engine.device, threads=engine.threads)
            for sentence in cluster.lacks(each, ray):
                say(sentence)
            work = Work(sweep, str(Path.cwd()), tuple(log), said, command)
            with _told(sweep, progress):
                errors = _fit(jobs, work, each)
            if left := sweep.open_jobs():
                raise MemtoolError(
                    f"{len(left)} runs are without a result, {left[0].name} the first: "
                    + (errors[0] if errors else "they were stopped"),
                    remedy=f"the same command again goes on; memtool sweep --out {sweep.folder} "
                    "without --ray runs them here",
                )
    sweep.clear()
    return sweep.write_results()


def _fit(jobs: Sequence[str], work: Work, each: Mapping[str, float]) -> list[str]:
    """A trial for every run; in a line each, why those that failed did."""
    try:
        from ray import tune
    except ImportError as error:
        raise cluster.needs_ray(error) from error
    place = work.sweep.folder / TRIALS / uuid.uuid4().hex
    tuner = tune.Tuner(
        tune.with_resources(partial(run_job, work=work), dict(each)),
        param_space={"job": tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(
            trial_name_creator=_name, trial_dirname_creator=_name, max_concurrent_trials=len(jobs)
        ),
        run_config=tune.RunConfig(
            name=place.name,
            storage_path=str(place.parent),
            failure_config=tune.FailureConfig(max_failures=DEATHS),
            verbose=0,
        ),
    )
    try:
        found = tuner.fit()
    finally:
        shutil.rmtree(place.parent if _is_alone(place) else place, ignore_errors=True)
    return [" ".join(str(error).strip().splitlines()[-1:]) for error in found.errors]


def _name(trial: Any) -> str:
    return str(trial.config["job"])


def _is_alone(place: Path) -> bool:
    return {place} >= set(place.parent.glob("*"))


@contextmanager
def _told(sweep: Sweep, progress: Progress | None) -> Iterator[None]:
    """Tell how many runs are done, by whomever, as the folder says."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(POLL_SECONDS):
            done = len(sweep.jobs) - len(sweep.open_jobs())
            if progress is not None:
                progress(ProgressEvent("runs", done, len(sweep.jobs)))

    thread = threading.Thread(target=look, name="memtool-told", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process for as long as the block runs; those that are set stay."""
    own = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
