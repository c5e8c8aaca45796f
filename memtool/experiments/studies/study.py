"""What a study is, and how it is done: its points as the cells of a sweep, then its record.

<folder>/                the folder of a sweep, see `memtool.experiments.sweep`
<folder>/looked/<run>.json   what was measured on the memory of a run
<folder>/study.json      the record
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import JsonValue

from memtool import registry, sealed
from memtool.config import with_values
from memtool.errors import AlreadyExistsError, ConfigError, MemtoolError
from memtool.evaluation.record import RECORD, Environment, Record, read_record
from memtool.evaluation.study import Measure, Point, StudyRecord, write_study
from memtool.experiments.orders import of_seed
from memtool.experiments.sweep import Job, Sweep
from memtool.methods import open_method
from memtool.methods.retrospect import LooksBack
from memtool.progress import Progress
from memtool.settings import Config, get
from memtool.streams.task import Task

STUDY: Final = "study.json"
"""What the record of a study is called in its folder."""

SIZES: Mapping[str, int] = {"stream.train_per_task": 200, "stream.test_per_task": 100}
"""Images a task where nobody says how many; how long that takes says the dry run."""


@dataclass(frozen=True)
class Variant:
    """A point that is asked for: what it is called, where it stands, and its settings."""

    label: str
    settings: Mapping[str, Any]
    x: float | None = None


@dataclass(frozen=True)
class Found:
    """What was measured at one moment of one run; as the fields of `Point`."""

    values: Mapping[str, float]
    by_task: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    label: str | None = None
    x: float | None = None


class Study(ABC):
    """A question: which points it has, and what is measured at them."""

    name: ClassVar[str]
    question: ClassVar[str]
    axis: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    settings: ClassVar[tuple[str, ...]]
    """Values of stream.setting under which it can be asked."""
    points: ClassVar[tuple[str, ...]]
    """Those of who asks for none."""
    moments: ClassVar[bool] = False
    """Whether a run is a line, whose points are moments of it."""

    @abstractmethod
    def variants(self, config: Config, words: Sequence[str]) -> list[Variant]:
        """The points that words ask for. Raises ConfigError for a word that is none."""

    @abstractmethod
    def found(self, record: Record, looked: Mapping[str, Any]) -> list[Found]:
        """What a run came to, from its record and from what `look` saw."""

    def look(self, method: LooksBack, tasks: Sequence[Task]) -> dict[str, JsonValue]:
        """What is to be measured on the memory of a run beside its record; here nothing.

        `tasks` are those that it learned, in their order.
        """
        del method, tasks
        return {}

    def passes(self, tests: Sequence[int]) -> int:
        """Test images that `look` reads, of tasks with so many."""
        del tests
        return 0


def studied(config: Config, given: frozenset[str] = frozenset()) -> Config:
    """The configuration of every run of a study: no baselines, and `SIZES` where nothing is set.

    `given` are keys that somebody set to none on purpose.
    """
    sizes = {key: n for key, n in SIZES.items() if get(config, key) is None and key not in given}
    return with_values(config, {**sizes, "baselines": "none"}, "a study")


def require_able(study: Study, config: Config) -> None:
    """Raise ConfigError for a configuration that the study cannot be asked of."""
    setting = config.stream.setting
    if setting == "trace":
        raise _cannot_look_back(study, "texts")
    if not issubclass(registry.find("methods", config.method), LooksBack):
        raise _cannot_look_back(study, f"method {config.method}")
    if setting not in study.settings:
        raise ConfigError(
            f"study {study.name} under stream.setting {setting}",
            expected=f"one of {', '.join(study.settings)}",
            remedy=f"memtool study {study.name} --set stream.setting={study.settings[0]}",
        )
    if config.orders != "given":
        raise ConfigError(
            f"study {study.name} with orders {config.orders}",
            expected="orders given",
            remedy="--set orders=given, or --set vary=order, which draws one for every seed",
        )


def _cannot_look_back(study: Study, what: str) -> ConfigError:
    return ConfigError(
        f"study {study.name} of {what}",
        expected="a method that looks back on its tasks, as mira does on images",
        remedy=f"memtool study {study.name} --preset mira-cil",
    )


class OpenStudy:
    """A study of a configuration in a folder."""

    def __init__(self, study: Study, sweep: Sweep, variants: Sequence[Variant]) -> None:
        self.study, self.sweep, self.variants = study, sweep, tuple(variants)

    @classmethod
    def begin(
        cls,
        study: Study,
        folder: Path,
        config: Config,
        points: Sequence[str] = (),
        *,
        preset: str | None = None,
        write: bool = True,
    ) -> OpenStudy:
        """Plan the study in a folder, or join the same one that is there; nothing without `write`.

        `config` as from `studied`; `points` are words, those of the study where there are none.
        Raises ConfigError for what cannot be studied, AlreadyExistsError for another study there.
        """
        require_able(study, config)
        variants = study.variants(config, tuple(points) or study.points)
        keys = list(dict.fromkeys(key for one in variants for key in one.settings))
        cells = [_values(config, one, keys, study) for one in variants]
        for place, values in enumerate(cells):
            if values in cells[:place]:
                raise ConfigError(
                    f"study {study.name}: point {variants[place].label} is "
                    f"{variants[cells.index(values)].label} once more",
                    expected="every point once",
                )
        axes = {key: [str(values[key]) for values in cells] for key in keys}
        try:
            sweep = Sweep.begin(folder, config, axes, cells=cells, preset=preset, write=write)
        except AlreadyExistsError as error:
            raise AlreadyExistsError(
                f"study {study.name}: {error.message}",
                expected="the same study, which this process would join",
                remedy="--out with another folder, or points, seeds and settings as it was begun "
                "with",
            ) from error
        # Who began it may have said the points in another order.
        in_order = [variants[cells.index(dict(cell.values))] for cell in sweep.plan.cells]
        return cls(study, sweep, in_order)

    @property
    def folder(self) -> Path:
        """Where it all lies."""
        return self.sweep.folder

    def variant_of(self, job: Job) -> Variant:
        """The point that a run is of."""
        places = [cell.name for cell in self.sweep.plan.cells]
        return self.variants[places.index(job.cell.name)]

    def work(
        self,
        *,
        progress: Progress | None = None,
        say: Callable[[str], None] = lambda _: None,
        command: str | None = None,
    ) -> StudyRecord:
        """Do all that is not done yet, and write the record; runs that fail are told in it."""
        begin = time.perf_counter()
        self.sweep.work(progress=progress, say=say, command=command)
        records, looked = dict[str, Record](), dict[str, Mapping[str, Any]]()
        for job in self.sweep.jobs:
            result = self.sweep.result(job)
            if result is None or result.record is None:
                continue
            folder = self.folder / result.record
            records[job.name] = read_record(folder / RECORD)
            looked[job.name] = self._looked(job, folder, progress)
        if not records:
            failed = self.sweep.result(self.sweep.jobs[0])
            raise MemtoolError(
                f"study {self.study.name}: every run failed: {failed and failed.failed}",
                remedy=f"memtool study {self.study.name} --retry-failed, else as before",
            )
        first = next(iter(records.values()))
        record = StudyRecord(
            study=self.study.name,
            question=self.study.question,
            axis=self.study.axis,
            measures=self.study.measures,
            points=tuple(self._points(records, looked)),
            seeds=self.sweep.plan.asked.seeds,
            preset=self.sweep.plan.preset,
            command=command,
            configuration=self.sweep.plan.asked.configuration,
            tasks=first.run.task_names,
            runs=tuple(
                found.record
                for job in self.sweep.jobs
                if (found := self.sweep.result(job)) is not None and found.record is not None
            ),
            environment=Environment.here(first.environment.device, time.perf_counter() - begin),
        )
        write_study(record, self.folder / STUDY)
        return record

    def _looked(self, job: Job, folder: Path, progress: Progress | None) -> Mapping[str, Any]:
        """What `look` saw on the memory of a run: from its file, else measured and kept there."""
        file = self.folder / "looked" / f"{job.name}.json"
        try:
            return sealed.read_json(file).content
        except FileNotFoundError:
            pass
        place = folder.parent.relative_to(self.folder / "cells" / job.cell.name).as_posix()
        config = self.sweep.config_of(job, "" if place == "." else place)
        method = open_method(of_seed(config, job.seed), seed=job.seed, progress=progress)
        if not isinstance(method, LooksBack):
            raise _cannot_look_back(self.study, f"method {config.method}")
        seen = self.study.look(method, method.workspace.stream.tasks)
        file.parent.mkdir(parents=True, exist_ok=True)
        sealed.write_json(file, seen)
        return seen

    def _points(
        self, records: Mapping[str, Record], looked: Mapping[str, Mapping[str, Any]]
    ) -> list[Point]:
        found = []
        several = len(self.variants) > 1
        for variant, cell in zip(self.variants, self.sweep.plan.cells, strict=True):
            jobs = [job for job in self.sweep.jobs if job.cell.name == cell.name]
            failed = {
                job.seed: result.failed
                for job in jobs
                if (result := self.sweep.result(job)) is not None and result.failed is not None
            }
            moments = {
                job.seed: self.study.found(records[job.name], looked[job.name])
                for job in jobs
                if job.name in records
            }
            group = variant.label if self.study.moments and several else ""
            if not moments:
                found.append(_point(group, variant, cell.values, {}, failed))
            for place in range(len(next(iter(moments.values()), []))):
                each = {seed: every[place] for seed, every in moments.items()}
                found.append(_point(group, variant, cell.values, each, failed))
        return found


def _point(
    group: str,
    variant: Variant,
    settings: Mapping[str, JsonValue],
    each: Mapping[int, Found],
    failed: Mapping[int, str],
) -> Point:
    """A point of what each seed came to there."""
    first = next(iter(each.values()), Found({}))
    ids = dict.fromkeys(id for one in each.values() for id in one.values)
    lists = dict.fromkeys(id for one in each.values() for id in one.by_task)
    return Point(
        group=group,
        label=first.label or variant.label,
        x=first.x if first.label else variant.x,
        settings=dict(settings),
        values={
            id: {seed: float(one.values[id]) for seed, one in each.items() if id in one.values}
            for id in ids
        },
        by_task={
            id: {seed: tuple(one.by_task[id]) for seed, one in each.items() if id in one.by_task}
            for id in lists
        },
        failed=dict(failed),
    )


def _values(
    config: Config, variant: Variant, keys: Sequence[str], study: Study
) -> dict[str, JsonValue]:
    """What a point has of all settings in which the points differ."""
    changed = with_values(config, dict(variant.settings), f"study {study.name}")
    return {key: get(changed, key) for key in keys}
