"""The record of a study: one question, points along one axis, every figure by seed; as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from memtool import sealed
from memtool.errors import CorruptError, DataError, NotFoundError
from memtool.evaluation.record import Environment, Part
from memtool.evaluation.summary import Summary, summarise

SCHEMA: Final = "memtool.study"
SCHEMA_VERSION: Final = 1

Unit = Literal["share", "points", "ms", "bytes", "degrees", "ratio", "s"]


class Measure(Part):
    """What a study measures at every point. Shares are 0 to 1, points a difference of shares."""

    id: str
    label: str
    unit: Unit
    better: Literal["higher", "lower", "neither"] = "neither"
    about: str = Field(description="what it is, in a sentence")


class Point(Part):
    """A point of a study: settings, or a moment of a run, and what was measured there.

    group: the line that it is on, "" where there is one; label: what stands at the axis; x: where
    it stands, None for points that have no number. values: by measure, then by seed; a measure that
    a point has not is not there. by_task: by measure and seed, of one task after another, None of a
    task without. failed: by seed, why there is nothing.
    """

    group: str = ""
    label: str
    x: float | None = None
    settings: dict[str, JsonValue]
    values: dict[str, dict[int, float]]
    by_task: dict[str, dict[int, tuple[float | None, ...]]]
    failed: dict[int, str]

    def summary(self, measure: str) -> Summary | None:
        """A measure over the seeds that have it; None where no seed has."""
        found = self.values.get(measure)
        return summarise(list(found.values())) if found else None


class StudyRecord(Part):
    """A whole study. `runs` are the folders of its records, from the folder of the study."""

    schema_name: Literal["memtool.study"] = Field(SCHEMA, alias="schema")
    schema_version: Literal[1] = SCHEMA_VERSION
    study: str
    question: str
    axis: str
    measures: tuple[Measure, ...]
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    preset: str | None = None
    command: str | None = None
    configuration: dict[str, JsonValue]
    tasks: tuple[str, ...]
    runs: tuple[str, ...]
    environment: Environment

    @model_validator(mode="after")
    def _knows_its_measures(self) -> StudyRecord:
        known, seeds = {one.id for one in self.measures}, set(self.seeds)
        for point in self.points:
            here = {*point.values, *point.by_task}
            if unknown := here - known:
                raise ValueError(f"point {point.label!r} has {sorted(unknown)}, no measures")
            of = [*map(set, point.values.values()), *map(set, point.by_task.values())]
            if others := set(point.failed).union(*of) - seeds:
                raise ValueError(f"point {point.label!r} has seeds {sorted(others)}")
        return self

    def measure(self, id: str) -> Measure:
        """The measure of an id; NotFoundError when there is none."""
        for one in self.measures:
            if one.id == id:
                return one
        raise NotFoundError(
            f"no measure {id!r} in study {self.study}",
            expected=", ".join(one.id for one in self.measures),
        )

    @property
    def measured(self) -> tuple[Measure, ...]:
        """The measures that some point has."""
        return tuple(one for one in self.measures if any(one.id in p.values for p in self.points))

    @property
    def failed(self) -> int:
        """How many runs ended with an error, each counted once."""
        return len({(p.group, p.label, seed) for p in self.points for seed in p.failed})


def write_study(record: StudyRecord, path: Path) -> Path:
    """Write the record as JSON with its checksum; returns `path`."""
    return sealed.write_json(path, record.model_dump(mode="json", by_alias=True))


def read_study(path: Path) -> StudyRecord:
    """Read what `write_study` wrote. NotFoundError, CorruptError; DataError for another schema."""
    try:
        content: dict[str, Any] = sealed.read_json(path).content
    except FileNotFoundError as error:
        raise NotFoundError(f"no record of a study at {path}") from error
    if content.get("schema") != SCHEMA or content.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path} is {content.get('schema')!r}, version {content.get('schema_version')!r}",
            expected=f"{SCHEMA}, version {SCHEMA_VERSION}",
            remedy="the study.json of a study, or a newer memtool",
        )
    try:
        return StudyRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"{path} is no record of a study: {place}: {first['msg']}") from error
