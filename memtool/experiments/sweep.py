"""A grid of settings by seeds and orders: each cell a run, shared by all who work in one folder.

    <folder>/sweep.json                  what is asked for, and the cells that it makes
    <folder>/cells/<cell>/seed-<n>/      the run of a cell and a seed: record, report, adapters
    <folder>/queue/<cell>-seed-<n>/      who works on it, and what it came to (`queue`)
    <folder>/results.json                all cells, mean and spread over the seeds

Whoever starts the same sweep in the folder joins in. A run that was killed goes on where it was,
as `memtool run` does. What it came to is published once, whoever ran it and however often.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from memtool import __version__, sealed
from memtool.config import (
    not_read_under,
    parse_assignment,
    split_values,
    whole_numbers,
    with_values,
)
from memtool.errors import ConfigError, CorruptError, MemtoolError
from memtool.evaluation.record import OrderBound, Record
from memtool.evaluation.selection import Cell
from memtool.experiments import run as experiment
from memtool.experiments.follow import Said
from memtool.experiments.orders import at_bounds
from memtool.experiments.queue import Fenced, Holder, Lease, Queue, publish_once
from memtool.experiments.runs import PLAN
from memtool.experiments.select import folder_name
from memtool.experiments.swept import (
    Asked,
    CellResult,
    Plan,
    PlannedCell,
    Results,
    RowResult,
    of_another,
    over_seeds,
    read_plan,
    require_same,
)
from memtool.methods.kept import fingerprint_of
from memtool.progress import Progress, ProgressEvent
from memtool.settings import Config, get, keys
from memtool_stores.names import below

LEASE_SECONDS = 120.0
"""Longer than a network file system may show what is old."""

RESULTS = "results.json"

NOT_SWEPT = ("store", "runs", "lock_timeout", "limits", "seed", "orders", "method")
"""Settings that are none of a cell: where things are, and what has an option of its own."""

OF_THE_MACHINE = ("store", "runs", "lock_timeout", "limits", "seed", "orders")
"""Settings that a worker need not share with the one who began."""

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """A cell with one seed."""

    cell: PlannedCell
    seed: int

    @property
    def name(self) -> str:
        """Of its folder in the queue."""
        return f"{self.cell.name}-seed-{self.seed}"


# What is asked for ------------------------------------------------------------------------------


def axes_of(method: str, assignments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """What `--set` says: settings with one value as they are, and those with several, by key.

    Values are separated by `,`, those of a setting that holds several by `;`; whole numbers may be
    a range, 1..4. Raises ConfigError for a key that is no setting, or that no cell can have.
    """
    plain: list[str] = []
    axes: dict[str, list[str]] = {}
    known = keys(method)
    for text in assignments:
        key, said = parse_assignment(text)
        about = known.get(key)
        several = about is not None and "tuple[" in str(about.annotation)
        values = list(split_values(said, ";" if several else ","))
        if about is not None and not several and _is_whole(about.annotation):
            values = [str(one) for one in whole_numbers(said, f"--set {text}")]
        if len(values) < 2 or about is None:
            plain.append(f"{key}={values[0]}" if values and about is not None else text)
            continue
        if key.partition(".")[0] in NOT_SWEPT:
            option = {"orders": "--orders", "method": "--method"}.get(key)
            raise ConfigError(
                f"--set {text}: {key} cannot be what the cells of a sweep differ in",
                expected="a setting of what is learned, and how",
                remedy=f"{option} with one value, and a sweep for each" if option else None,
            )
        if key in axes:
            raise ConfigError(f"--set {text}: {key} has several values twice", expected="once")
        axes[key] = values
    return plain, axes


def _is_whole(annotation: Any) -> bool:
    return "int" in str(annotation).replace("'", "") and "float" not in str(annotation)


def grid(config: Config, axes: Mapping[str, Sequence[str]]) -> tuple[dict[str, JsonValue], ...]:
    """The values of every cell: all combinations. ConfigError for a value that cannot be used."""
    found: dict[str, dict[str, JsonValue]] = {}
    unread = dict.fromkeys(axes, "")
    for combination in itertools.product(*axes.values()):
        texts = dict(zip(axes, combination, strict=True))
        cell = with_values(config, texts, "--set")
        under = {key: not_read_under(cell, key) for key in unread}
        unread = {key: other for key, other in under.items() if other is not None}
        values = {key: _plain(get(cell, key)) for key in axes}
        if found.setdefault(fingerprint_of(values), values) is not values:
            raise ConfigError(
                f"--set {Cell(values=values).text} comes twice", expected="every value once"
            )
    for key, other in unread.items():
        raise ConfigError(
            f"--set {key} has no effect under {other} {_plain(get(config, other))}",
            expected="settings that something reads in one of the cells",
            remedy=f"the same without --set {key}",
        )
    return tuple(found.values())


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def asked_of(
    config: Config, axes: Iterable[str], cells: Sequence[Mapping[str, JsonValue]]
) -> Asked:
    """What a sweep of this configuration is, whose cells have values of these axes."""
    recorded = {k: v for k, v in config.recorded().items() if k not in OF_THE_MACHINE}
    recorded["engine"] = {k: v for k, v in recorded["engine"].items() if k != "threads"}
    return Asked(
        memtool=__version__,
        configuration=recorded,
        axes={key: list({str(c[key]): c[key] for c in cells}.values()) for key in axes},
        seeds=config.seed,
        orders=config.orders,
    )


# The sweep --------------------------------------------------------------------------------------


class Sweep:
    """A sweep in its folder: planned once, worked on by whoever opens it."""

    def __init__(self, folder: Path, plan: Plan, base: Config) -> None:
        self.folder = folder
        self.plan = plan
        self.base = base
        self.queue = Queue(folder / "queue", lease_seconds=plan.lease_seconds)
        self.jobs = [Job(cell, seed) for cell in plan.cells for seed in plan.asked.seeds]

    @classmethod
    def begin(
        cls,
        folder: Path,
        config: Config,
        axes: Mapping[str, Sequence[str]],
        *,
        cells: Sequence[Mapping[str, JsonValue]] | None = None,
        preset: str | None = None,
        lease_seconds: float = LEASE_SECONDS,
        write: bool = True,
    ) -> Sweep:
        """Plan a sweep in a folder, or join the same one that is there; nothing without `write`.

        `cells` with a value of every axis each are run in place of the whole grid. Order bounds are
        found here, once for all workers. Raises AlreadyExistsError for another sweep in the folder,
        ConfigError for what cannot be swept.
        """
        cells = grid(config, axes) if cells is None else cells
        asked = asked_of(config, axes, cells)
        there = read_plan(folder)
        if there is None:
            planned = _planned(config, cells)
            plan = Plan(asked=asked, preset=preset, lease_seconds=lease_seconds, cells=planned)
            if not write:
                return cls(folder, plan, config)
            publish_once(_folder(folder) / PLAN, plan.model_dump(mode="json", by_alias=True))
            there = read_plan(folder)
            assert there is not None
        require_same(there.asked, asked, folder)
        if {fingerprint_of(cell.values) for cell in there.cells} != {
            fingerprint_of(dict(values)) for values in cells
        }:
            raise of_another(folder, f"{len(there.cells)} cells", "others")
        return cls(folder, there, config)

    @classmethod
    def join(cls, folder: Path) -> Sweep:
        """The sweep that is in a folder, as it was asked for.

        Raises ConfigError where there is none, AlreadyExistsError for one of another memtool.
        """
        plan = read_plan(folder)
        if plan is None:
            raise ConfigError(
                f"no sweep in {folder}, and nothing to vary",
                expected="a setting with several values",
                remedy="memtool sweep --set train.lr=1e-3,3e-3 --seed 0..4",
            )
        if plan.asked.memtool != __version__:
            raise of_another(folder, f"memtool {plan.asked.memtool}", f"memtool {__version__}")
        base = Config.model_validate({**plan.asked.configuration, "orders": plan.asked.orders})
        return cls(folder, plan, base.model_copy(update={"seed": plan.asked.seeds}))

    def config_of(self, job: Job, place: str = "") -> Config:
        """The configuration of a job: its values, order and seed; all it writes is in `place`.

        Raises SchemaError for names in the files of the folder that lead out of it.
        """
        cell = below(self.folder / "cells", job.cell.name)
        cell = below(cell, place) if place else cell
        changed = with_values(self.base, job.cell.values, PLAN)
        stream = changed.stream
        if job.cell.order is not None:
            stream = stream.model_copy(update={"order": job.cell.order})
        return changed.model_copy(
            update={
                "seed": (job.seed,),
                "orders": "given",
                "stream": stream,
                "runs": cell,
                "store": str(cell / _store(job)),
            }
        )

    def result(self, job: Job) -> CellResult | None:
        """What a job came to, or None."""
        document = self.queue.result(job.name)
        if document is None:
            return None
        try:
            return CellResult.model_validate(document)
        except ValidationError as error:
            raise CorruptError(
                f"{self.folder / 'queue' / job.name} holds no result of a run: "
                f"{error.errors()[0]['msg']}"
            ) from error

    def open_jobs(self) -> list[Job]:
        """Jobs without a result."""
        return [job for job in self.jobs if not self.queue.is_done(job.name)]

    def retry_failed(self) -> int:
        """Make jobs that ended with an error ones to run again; how many."""
        return sum(
            self.queue.open_again(job.name, lambda found: found.get("failed") is not None)
            for job in self.jobs
        )

    def results(self) -> Results:
        """All cells over their seeds, as far as they are done."""
        found = {(job.cell.name, job.seed): self.result(job) for job in self.jobs}
        seeds = self.plan.asked.seeds
        cells = []
        for cell in self.plan.cells:
            results = [r for seed in seeds if (r := found[cell.name, seed]) is not None]
            cells.append(over_seeds(cell, results))
        scored = any(row.final_average is not None for r in found.values() if r for row in r.rows)
        measured = any(row.loss is not None for r in found.values() if r for row in r.rows)
        return Results(
            axes=self.plan.asked.axes,
            seeds=seeds,
            orders=self.plan.asked.orders,
            measure="loss" if measured and not scored else "accuracy",
            left=sum(result is None for result in found.values()),
            cells=tuple(cells),
        )

    def write_results(self) -> Results:
        """`results` as a file, `results.json` in the folder."""
        found = self.results()
        sealed.write_json(self.folder / RESULTS, found.model_dump(mode="json", by_alias=True))
        return found

    # Work ---------------------------------------------------------------------------------------

    def work(
        self,
        *,
        progress: Progress | None = None,
        say: Callable[[str], None] = lambda _: None,
        log: Sequence[str] = (),
        said: Said | None = None,
        command: str | None = None,
    ) -> Results:
        """Run what nobody runs until all is done, waiting for what others hold; then the results.

        A cell that cannot be run is one that failed, and the others go on.
        """
        self.work_on(self.jobs, progress=progress, say=say, log=log, said=said, command=command)
        self.clear()
        return self.write_results()

    def clear(self) -> None:
        """Take away what workers left that were killed after another had taken their job.

        Of jobs that ended well alone, and not where one may go on who was only stopped, or of whom
        nobody knows: he takes his away himself when he finds that he lost the job.
        """
        for job in self.jobs:
            result = self.result(job)
            if result is None or result.record is None:
                continue
            cell = below(self.folder / "cells", job.cell.name)
            for place in ("", *(folder.name for folder in cell.glob("attempt-*"))):
                counts = cell / place / f"seed-{job.seed}" == self.folder / result.record
                if not counts and not self.queue.may_be_written(job.name, place):
                    _take_away(cell / place, job)

    def work_on(
        self,
        wanted: Sequence[Job],
        *,
        progress: Progress | None = None,
        say: Callable[[str], None] = lambda _: None,
        log: Sequence[str] = (),
        said: Said | None = None,
        command: str | None = None,
    ) -> None:
        """As `work`, of some jobs alone: return when all of them are done, by whomever."""
        waited_for: set[str] = set()
        while jobs := [job for job in wanted if not self.queue.is_done(job.name)]:
            lease = None
            for job in jobs:
                lease = self.queue.claim(job.name)
                if lease is not None:
                    break
            if lease is None:
                self._say_who_works(jobs, waited_for, say)
                time.sleep(min(POLL_SECONDS, self.plan.lease_seconds / 12))
                continue
            with lease:
                self._run(job, lease, progress, say, log, said or Said(), command)

    def _run(
        self,
        job: Job,
        lease: Lease,
        progress: Progress | None,
        say: Callable[[str], None],
        log: Sequence[str],
        said: Said,
        command: str | None,
    ) -> None:
        """A job to its end, unless another process takes it meanwhile."""
        config = self.config_of(job, lease.holder.place)
        number = self.jobs.index(job) + 1

        def tell(event: ProgressEvent) -> None:
            lease.require_held()
            if progress is not None:
                stage = f"run {number}/{len(self.jobs)} {job.name}: {event.stage}"
                progress(replace(event, stage=stage))

        try:
            (record,) = experiment.run(
                config,
                progress=tell,
                command=command,
                preset=self.plan.preset,
                log=log,
                said=replace(said, name=said.name or job.cell.name),
                say=say,
                bound=job.cell.bound,
                tables=False,
            )
            where = config.runs.relative_to(self.folder) / f"seed-{job.seed}"
            result = _measured(job, record, lease.token, where.as_posix())
        except Fenced:
            say(f"{job.name}: another process took it over; what was done here does not count")
            _take_away(config.runs, job)
            return
        except (MemtoolError, RuntimeError) as error:  # RuntimeError: of torch, as no memory left
            text = " ".join("; ".join(str(error).splitlines()).split())[:500]
            say(f"{job.name} failed: {text}")
            result = CellResult(cell=job.cell.name, seed=job.seed, token=lease.token, failed=text)
        if not lease.publish(result.model_dump(mode="json", by_alias=True)):
            say(f"{job.name}: another process was first; what was done here does not count")
            _take_away(config.runs, job)

    def _say_who_works(
        self, jobs: Sequence[Job], waited_for: set[str], say: Callable[[str], None]
    ) -> None:
        for job in jobs:
            holder: Holder | None = self.queue.holder(job.name)
            words = "another process" if holder is None else holder.words
            text = f"waiting for {job.name}, which {words} runs"
            if text not in waited_for:
                waited_for.add(text)
                say(text)


def _store(job: Job) -> str:
    return f"memory-seed-{job.seed}"


def _take_away(place: Path, job: Job) -> None:
    """Remove what a run left that does not count: nobody else works in its place."""
    for name in (f"seed-{job.seed}", _store(job)):
        shutil.rmtree(place / name, ignore_errors=True)


def _measured(job: Job, record: Record, token: int, where: str) -> CellResult:
    rows = record.metrics.rows
    return CellResult(
        cell=job.cell.name,
        seed=job.seed,
        token=token,
        record=where,
        measure="accuracy" if any("faa" in row.metrics for row in rows) else "loss",
        rows=tuple(
            RowResult(
                id=row.id,
                label=row.label,
                kind=row.kind,
                figure=row.metrics.get("faa"),
                metrics=row.metrics,
            )
            for row in rows
        ),
    )


def _planned(config: Config, cells: Sequence[Mapping[str, JsonValue]]) -> tuple[PlannedCell, ...]:
    """The cells; under order bounds three of each, with the orders that their own stream has."""
    found: list[PlannedCell] = []
    bounds: dict[str, list[tuple[OrderBound, tuple[str, ...] | None]]] = {}
    for values in cells:
        name = folder_name(values)
        if config.orders != "bounds":
            found.append(PlannedCell(name=name, values=dict(values)))
            continue
        changed = with_values(config, values, "--set")
        decides = fingerprint_of(
            [changed.stream.model_dump(mode="json"), changed.backbone.model_dump(mode="json")]
        )
        if decides not in bounds:
            bounds[decides] = [
                (OrderBound(name=bound.name, similarity=bound.similarity), one.stream.order)
                for bound, one in at_bounds(changed)
            ]
        found += [
            PlannedCell(name=f"{name}-{bound.name}", values=dict(values), bound=bound, order=order)
            for bound, order in bounds[decides]
        ]
    return tuple(found)


def _folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MemtoolError(
            f"cannot make the folder {folder}: {error.strerror or error}", remedy="--out DIR"
        ) from error
    return folder
