"""The record of one evaluated run: what ran, what came out, on what machine; versioned JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from memtool import sealed
from memtool.errors import DataError, MismatchError, NotFoundError
from memtool.evaluation import metrics as metric_functions
from memtool.evaluation.inside import Inside
from memtool.evaluation.matrix import AccuracyMatrix
from memtool.evaluation.right import Right, confused, right_of
from memtool.evaluation.selection import Selection
from memtool_stores.printable import printable, shown

if TYPE_CHECKING:
    from memtool.reports.figure import Figure

SCHEMA: Final = "memtool.evaluation"
RECORD: Final = "record.json"
"""What the file of a record is called in the folder of a run."""
SCHEMA_VERSION: Final = 4
"""2: rows have `right`. 3: `run` may have `selection`, `bound`. 4: the record may have `inside`,
`run` what a person said of it (`_SAID`), rows what `_NEW_OF_ROWS` names, a selection cells that
failed, the environment `kernels`. Written as the oldest that has all that is in it."""

Kind = Literal["method", "baseline", "upper bound"]
Score = Annotated[float, Field(ge=0, le=1)]

# What decides the numbers of a run; a package that is not installed is left out of the record.
PACKAGES = (
    "memtool",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scikit-learn",
    "scipy",
    "zarr",
    "icechunk",
    "safetensors",
    "peft",
    "accelerate",
    "datasets",
    "pillow",
    "open_clip_torch",
    "transformers",
    "usearch",
)


class Part(BaseModel):
    """Frozen; an unknown key, NaN or infinity is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneIdentity(Part):
    """Which frozen model: its name, and the sha256 of its tensors."""

    name: str
    sha256: str


class DataIdentity(Part):
    """Which data: the stream's name, and the sha256 of its source, cut and order."""

    name: str
    fingerprint: str


class TaskIdentity(Part):
    """One task of the stream, in learning order."""

    name: str
    domain: str | None = None
    classes: tuple[str, ...] = Field((), description="class names in order")
    prompt: str | None = Field(None, description="template of what a text tower reads")
    test_samples: Annotated[int, Field(ge=0)] | None = None


class OrderBound(Part):
    """At which bound the order of a run is, and its similarity (`memtool.streams.bounds`)."""

    name: Literal["hardest", "median", "easiest"]
    similarity: float


class Run(Part):
    """What ran; with `selection` the rows have other settings than `configuration`, as it says.

    name, note, tags: what whoever started it called it, and said of it.
    """

    method: str
    setting: str
    preset: str | None = None
    configuration: dict[str, JsonValue] = Field(description="resolved, as given back by --config")
    command: str | None = Field(None, description="the command that made the record")
    mix: str | None = None
    separation: str | None = None
    backbone: BackboneIdentity
    data: DataIdentity
    tasks: Annotated[tuple[TaskIdentity, ...], Field(min_length=1)]
    class_order: tuple[str, ...] = ()
    seed: int
    store: str | None = None
    store_version: str | None = None
    created: AwareDatetime
    selection: Selection | None = None
    bound: OrderBound | None = None
    name: str | None = None
    note: str | None = None
    tags: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = write(self)
        for name in ("selection", "bound", *_SAID):
            if not getattr(self, name):
                document.pop(name, None)
        return document

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks in learning order."""
        return tuple(task.name for task in self.tasks)

    @field_validator("configuration")
    @classmethod
    def _plain_json(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(value, allow_nan=False)  # ValueError: a number that JSON cannot hold
        return value


_SAID = ("name", "note", "tags")

Ratio = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class AtomUse(Part):
    """How the atoms of a growing bank are used (MoRAM), tasks in the order learned.

    `norm[i][j]`: length of what the atoms of task j add after task i, over that just after task j;
    `difference[i][j]`: length of the change, over the same; both on test images of task j, at the
    layer inputs of then, None for i < j and where atoms added nothing. `reuse[i][j]`: the gate's
    weight on the atoms of task j for test images of task i, with all tasks in the bank.
    """

    norm: tuple[tuple[Ratio | None, ...], ...]
    difference: tuple[tuple[Ratio | None, ...], ...]
    reuse: tuple[tuple[Ratio, ...], ...]


_NEW_OF_ROWS = (
    "replay",
    "reading",
    "confused",
    "ms_per_input",
    "parameters",
    "bytes",
    "unseen",
    "unseen_right",
)
_REPLAY = re.compile(r"(er|der\+\+)(-[a-z-]+)?")
_READINGS = frozenset({"routed", "uniform", "hard", "memory-nonnegative"})


class Row(Part):
    """One method, baseline or upper bound with its own accuracy matrix, all fractions 0..1.

    accuracy: T+1 rows of T scores, None where not measured; recall_error: likewise the relative
    error of every recalled adapter, empty where adapters are not recalled; right: for every task
    which test samples were right in the last row of accuracy that was measured, in the order of the
    task's test samples, None where that is not known, empty where it is known of no task;
    atom_use: of a bank of atoms, where it was measured; loss: shaped as accuracy, of streams of
    texts, nats per answer token; cut_prompts, cut_answers: how many of their tests were longer than
    the limits and lost tokens;
    unseen: accuracy on the domain that nothing is learned from, before any task and after each,
    where tasks come one after another (setting dgcl; where each is held out in turn, the means);
    unseen_right: which of its samples were right at the end; metrics: by metric id; undefined: the
    reason for every metric that the matrix does not define; seconds: wall time.
    """

    id: str
    label: str
    kind: Kind
    accuracy: tuple[tuple[Score | None, ...], ...]
    recall_error: tuple[tuple[Ratio | None, ...], ...] = ()
    right: tuple[Right | None, ...] = ()
    atom_use: AtomUse | None = None
    loss: tuple[tuple[Ratio | None, ...], ...] = ()
    cut_prompts: Annotated[int, Field(ge=0)] | None = None
    cut_answers: Annotated[int, Field(ge=0)] | None = None
    metrics: dict[str, float] = {}
    undefined: dict[str, str] = {}
    seconds: Annotated[float, Field(ge=0)] | None = None
    replay: bool = False
    reading: bool = False
    confused: tuple[tuple[Count, Count, Annotated[int, Field(ge=1)]], ...] = ()
    ms_per_input: Ratio | None = None
    parameters: Count | None = None
    bytes: Count | None = None
    unseen: tuple[Score | None, ...] = ()
    unseen_right: Right | None = None

    @model_serializer(mode="wrap")
    def _without_what_older_ones_lack(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = write(self)
        for name in _NEW_OF_ROWS:
            if not self._is_new(name):
                document.pop(name, None)
        return document

    def _is_new(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False and value != ()

    @property
    def needs_newest(self) -> bool:
        """Whether it has what records of schema 3 have not."""
        return any(map(self._is_new, _NEW_OF_ROWS))

    @property
    def keeps_samples(self) -> bool:
        """Whether it is a row of replay; of a record before schema 4, by its id."""
        return self.replay or _REPLAY.fullmatch(self.id) is not None

    @property
    def reads_memory(self) -> bool:
        """Whether it is another reading of the memory; of a record before schema 4, by its id."""
        return self.reading or self.id in _READINGS

    @field_validator("metrics")
    @classmethod
    def _known_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for id in value:
            metric_functions.metric(id)
        return value

    @classmethod
    def measured(
        cls,
        id: str,
        label: str,
        kind: Kind,
        matrix: AccuracyMatrix,
        *,
        more: Mapping[str, float] | None = None,
        recall_error: Sequence[Sequence[float | None]] = (),
        seconds: float | None = None,
        unseen: Sequence[float | None] = (),
        **about: Any,
    ) -> Row:
        """A row with all metrics of its matrix, and `more` that have inputs of their own.

        `unseen` is as in a row, with what follows from it; `about` are `replay`, `reading` and what
        it costs.
        """
        values = metric_functions.compute(matrix.values)
        return cls(
            id=id,
            label=label,
            kind=kind,
            accuracy=matrix.cells,
            recall_error=tuple(tuple(row) for row in recall_error),
            right=rights(matrix),
            metrics={**values, **metric_functions.of_unseen(unseen), **(more or {})},
            undefined={
                id: reason
                for id, reason in metric_functions.undefined(matrix.values).items()
                if id not in (more or {})
            },
            seconds=seconds,
            confused=confused(matrix.last),
            unseen=tuple(unseen),
            unseen_right=right_of(unseen[-1]) if unseen else None,
            **about,
        )

    def matrix(self, tasks: Sequence[str]) -> AccuracyMatrix:
        """The accuracy matrix under the names of the tasks."""
        return AccuracyMatrix.of_cells(tasks, self.accuracy)

    @property
    def last(self) -> tuple[float | None, ...]:
        """The scores of the last row with any, each a `Share` where `right` knows of what."""
        known = self.right or (None,) * len(self._last_scores)
        return tuple(
            score if right is None else right.share
            for score, right in zip(self._last_scores, known, strict=True)
        )

    @property
    def last_unseen(self) -> float | None:
        """The accuracy on the domain never seen at the end, a `Share` where that is known."""
        if self.unseen_right is not None:
            return self.unseen_right.share
        return self.unseen[-1] if self.unseen else None

    @property
    def _last_scores(self) -> tuple[float | None, ...]:
        measured = [line for line in self.accuracy if any(score is not None for score in line)]
        return measured[-1] if measured else ()

    @model_validator(mode="after")
    def _right_adds_up(self) -> Row:
        if self.right and (
            len(self.right) != len(self._last_scores) or self.last != self._last_scores
        ):
            raise ValueError(f"row {self.id!r}: what was right does not make up its accuracy")
        if self.unseen_right is not None and self.unseen[-1:] != (self.unseen_right.share,):
            raise ValueError(f"row {self.id!r}: what was right does not make up what was unseen")
        return self


def rights(matrix: AccuracyMatrix) -> tuple[Right | None, ...]:
    """What stands in `Row.right` for a matrix: which samples were right after its last row."""
    known = tuple(right_of(score) for score in matrix.last)
    return known if any(known) else ()


class Metrics(Part):
    """What came out."""

    rows: Annotated[tuple[Row, ...], Field(min_length=1)]


class Environment(Part):
    """On what machine, and at what cost."""

    device: str
    python: str
    platform: str
    packages: dict[str, str] = Field(description="version by distribution name")
    wall_seconds: Annotated[float, Field(ge=0)]
    peak_memory_bytes: Annotated[int, Field(ge=0)] | None = None
    kernels: tuple[str, ...] = Field(
        (), description="that computed adapters which inputs picked: dense, gathered, grouped_mm"
    )

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = write(self)
        if not self.kernels:
            document.pop("kernels", None)
        return document

    @classmethod
    def here(
        cls,
        device: str,
        wall_seconds: float,
        *,
        peak_memory_bytes: int | None = None,
        packages: Iterable[str] = PACKAGES,
        kernels: Iterable[str] = (),
    ) -> Environment:
        """Describe this process; peak memory, when not given, is its largest resident size."""
        versions: dict[str, str] = {}
        for name in packages:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return cls(
            device=device,
            python=platform.python_version(),
            platform=platform.platform(),
            packages=versions,
            wall_seconds=wall_seconds,
            peak_memory_bytes=(
                peak_resident_bytes() if peak_memory_bytes is None else peak_memory_bytes
            ),
            kernels=tuple(sorted(kernels)),
        )


def peak_resident_bytes() -> int | None:
    """Largest resident size of this process so far; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Record(Part):
    """One run, evaluated: the three blocks run, metrics and environment."""

    schema_name: Literal["memtool.evaluation"] = Field(SCHEMA, alias="schema")
    schema_version: Literal[1, 2, 3, 4] = SCHEMA_VERSION
    run: Run
    metrics: Metrics
    environment: Environment
    inside: Inside | None = None

    @field_validator("schema_version")
    @classmethod
    def _written_as_the_newest(cls, _: int) -> int:
        return SCHEMA_VERSION

    @model_serializer(mode="wrap")
    def _of_the_oldest_that_has_it(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = write(self)
        if self.inside is None:
            document.pop("inside", None)
        said = any(getattr(self.run, name) for name in _SAID)
        selection = self.run.selection
        failed = selection is not None and selection.has_failed
        newest = said or failed or bool(self.environment.kernels)
        if (
            self.inside is None
            and not newest
            and not any(r.needs_newest for r in self.metrics.rows)
        ):
            chosen = selection is not None or self.run.bound is not None
            document["schema_version"] = 3 if chosen else 2
        return document

    @model_validator(mode="after")
    def _rows_fit_the_tasks(self) -> Record:
        names = self.run.task_names
        if len(set(names)) != len(names):
            raise ValueError(f"task names are not unique: {list(names)}")
        ids = [row.id for row in self.metrics.rows]
        if len(set(ids)) != len(ids):
            raise ValueError(f"row ids are not unique: {ids}")
        for row in self.metrics.rows:
            shape = [len(scores) for scores in row.accuracy]
            if shape != [len(names)] * (len(names) + 1):
                raise ValueError(
                    f"row {row.id!r}: an accuracy matrix with rows of {shape} scores, "
                    f"expected {len(names) + 1} rows of {len(names)}"
                )
            if len(row.unseen) > len(shape):
                raise ValueError(f"row {row.id!r}: {len(row.unseen)} scores on what was never seen")
            if row.loss and [len(losses) for losses in row.loss] != shape:
                raise ValueError(f"row {row.id!r}: losses of another shape than accuracies")
            if row.recall_error and [len(errors) for errors in row.recall_error] != shape:
                raise ValueError(f"row {row.id!r}: recall errors of another shape than accuracies")
        return self

    def row(self, id: str) -> Row:
        """The row of an id; NotFoundError when there is none.

        >>> row = read_record(Path("runs/seed-0/record.json")).row("memory")
        >>> row.kind, 0 <= row.metrics["faa"] <= 1
        ('method', True)
        """
        for row in self.metrics.rows:
            if row.id == id:
                return row
        raise NotFoundError(
            f"no row {id!r} in the record", expected=", ".join(r.id for r in self.metrics.rows)
        )

    def matrix(self, id: str) -> AccuracyMatrix:
        """The accuracy matrix of a row."""
        return self.row(id).matrix(self.run.task_names)

    def plot(self, name: str | None = None) -> Figure:
        """A figure of the report: live in a notebook, and `save` writes it (.svg, .png, .html).

        `name` is recall, methods, curves, matrix, forgetting, paired, confusion, classes, learning,
        keys or recall-error; without one the first that the record has. NotFoundError for one that
        it has not.
        """
        from memtool.reports.notebook import figure_of

        return figure_of(self, name)

    def _repr_html_(self) -> str:
        from memtool.reports.notebook import record_html

        return record_html(self)

    def to_json(self) -> str:
        """The record as JSON text; `from_json` gives back an equal record."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "record") -> Record:
        """A record from JSON text; `where` names it in errors.

        CorruptError: not JSON, or a checksum that does not hold; MismatchError: another schema, or
        a newer version of this one; DataError: a field that is missing, unknown or wrong.
        """
        document = sealed.parse_json(text, where).content
        name = document.get("schema")
        if name != SCHEMA:
            raise MismatchError(f"{where} has schema {shown(name)}", expected=SCHEMA)
        version = document.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise MismatchError(
                f"{where} has schema version {version}, made by a newer memtool",
                expected=f"at most {SCHEMA_VERSION}",
                remedy="upgrade memtool",
            )
        try:
            return cls.model_validate_json(json.dumps(document))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "record"
            raise DataError(printable(f"{where}: {place}: {first['msg']}")) from error


def write_record(record: Record, path: Path) -> Path:
    """Write a record as JSON with its checksum, whole or not at all."""
    return sealed.write_json(path, record.model_dump(mode="json", by_alias=True))


def find_records(path: Path) -> tuple[Path, ...]:
    """The files of the records at a path: itself, or what a run left in this folder.

    A folder has a `record.json`, or one in each of its folders `seed-<number>`, which are taken in
    the order of the numbers. NotFoundError for a folder without any; a path that is no folder is
    not looked at.
    """
    if not path.is_dir():
        return (path,)
    if (path / RECORD).is_file():
        return (path / RECORD,)
    seeds = {
        int(match[1]): file
        for file in path.glob(f"seed-*/{RECORD}")
        if (match := re.fullmatch(r"seed-(\d+)", file.parent.name))
    }
    if not seeds:
        raise NotFoundError(
            f"no {RECORD} in the folder {path}, nor in folders seed-<number> of it",
            expected="a record, or the folder that `memtool run` wrote it to (--set runs=FOLDER)",
        )
    return tuple(seeds[seed] for seed in sorted(seeds))


def read_record(path: Path) -> Record:
    """Read a record; errors as `Record.from_json`.

    NotFoundError when there is no file, MemtoolError where it cannot be read.
    """
    try:
        data = sealed.read_file(path, "text_bytes")
    except FileNotFoundError as error:
        raise NotFoundError(f"no record at {path}") from error
    return Record.from_json(data, str(path))
