"""A sweep by Ray Tune (extra `ray`): each run is a trial, wherever the cluster has room for it.

What is done and who does it is decided by the queue in the folder, as without Ray: a trial that is
begun again after its process was killed goes on where that was, and no run counts twice.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memtool import clusters
from memtool.errors import ConfigError, MemtoolError
from memtool.experiments.follow import Said
from memtool.experiments.runs import PLAN
from memtool.experiments.sweep import Results, Sweep
from memtool.progress import Progress, ProgressEvent
from memtool_stores.printable import printable, shown

TRIES = 3
"""How often a run is begun again whose process was killed."""

TRIALS = "ray"
"""The folder of the sweep that Tune keeps its own files in."""


def work(
    sweep: Sweep,
    cluster: str,
    *,
    progress: Progress | None = None,
    log: Sequence[str] = (),
    said: Said | None = None,
    command: str | None = None,
) -> Results:
    """Run what has no result yet on the cluster at an address, and return the results of all.

    Every machine of it must see the folder. A cell that cannot be run is one that failed, and the
    others go on. Raises ConfigError where there is no cluster, MemtoolError where runs are left
    without a result, as their processes were killed again and again.
    """
    clusters.require_ray("tune")
    jobs = sweep.open_jobs()
    if jobs:
        there = Sweep(sweep.folder.resolve(), sweep.plan, sweep.base)
        with clusters.connected(cluster):
            why = _tune(there, [job.name for job in jobs], progress, (log, said, command))
        if left := [job.name for job in sweep.open_jobs()]:
            raise MemtoolError(
                f"{len(left)} of {len(jobs)} runs have no result, {shown(left[0])} first"
                + (f": {why}" if why else ""),
                remedy="the same command again",
            )
    sweep.clear()
    return sweep.write_results()


def _tune(sweep: Sweep, names: list[str], progress: Progress | None, follow: Any) -> str:
    """Let Tune run jobs; what the last trial said that failed."""
    from ray import tune

    home = Path.cwd()
    cpus, gpus = clusters.resources(sweep.base.engine)
    ended: list[str] = []

    def trial(given: dict[str, str]) -> None:
        run_one(sweep, given["run"], home, *follow)

    class Told(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            del iteration, trials
            ended.append(trial.config["run"])
            if progress is not None:
                progress(ProgressEvent("runs", len(ended), len(names)))

    found = tune.Tuner(
        tune.with_resources(trial, {"cpu": cpus, "gpu": gpus}),
        param_space={"run": tune.grid_search(names)},
        run_config=tune.RunConfig(
            storage_path=str(sweep.folder / TRIALS),
            failure_config=tune.FailureConfig(max_failures=TRIES),
            callbacks=[Told()],
            verbose=0,
        ),
    ).fit()
    return printable(" ".join(str(found.errors[-1]).split())[-300:]) if found.errors else ""


def run_one(
    sweep: Sweep,
    name: str,
    home: Path,
    log: Sequence[str],
    said: Said | None,
    command: str | None,
) -> None:
    """A run to its end, by this process of a cluster, in the folder of the command.

    Raises ConfigError on a machine that does not see the sweep.
    """
    if not (sweep.folder / PLAN).is_file():
        raise ConfigError(
            f"{socket.gethostname()} does not see {sweep.folder}",
            expected="a folder that every machine of the cluster sees",
        )
    if home.is_dir():
        os.chdir(home)
    sweep.base.limits.put_in_force()
    wanted = [job for job in sweep.jobs if job.name == name]
    sweep.work_on(wanted, log=log, said=said, command=command)
