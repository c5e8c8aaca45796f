"""The accuracy matrix: every score on every task after every task, kept whole and unrounded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool import sealed
from memtool.atomic import write_atomic
from memtool.errors import ConfigError, CorruptError, DataError, MismatchError, NotFoundError
from memtool.evaluation.csv_text import from_csv, to_csv
from memtool.evaluation.right import Share

SCHEMA = "memtool.matrix"
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """Scores as fractions 0..1: values[i, j] on task j after learning i tasks; NaN: not measured.

    tasks: T unique names in learning order; values: float64 (T+1, T), read-only; row 0 is before
    any training. A score that came as a `Share` is kept whole in `shares`, by (i, j); files and
    comparisons are of the values alone.

        matrix = AccuracyMatrix.empty(["photo", "art"]).with_row(1, [0.9, 0.4])
    """

    tasks: tuple[str, ...]
    values: npt.NDArray[np.float64]
    shares: Mapping[tuple[int, int], Share] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        tasks = tuple(self.tasks)
        values = np.array(self.values, dtype=np.float64)  # a copy: nobody else can change it
        if not tasks or len(set(tasks)) != len(tasks):
            raise MismatchError(f"task names {list(tasks)}", expected="one or more unique names")
        if values.shape != (len(tasks) + 1, len(tasks)):
            raise MismatchError(
                f"an accuracy matrix of shape {values.shape} for {len(tasks)} tasks",
                expected=f"({len(tasks) + 1}, {len(tasks)})",
            )
        wrong = np.argwhere((values < 0) | (values > 1))
        if len(wrong):
            row, column = wrong[0]
            raise DataError(
                f"score {values[row, column]:g} on task {tasks[column]!r} after {row} tasks",
                expected="a fraction from 0 to 1",
                remedy="divide percentages by 100",
            )
        values.flags.writeable = False
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "values", values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AccuracyMatrix):
            return NotImplemented
        return self.tasks == other.tasks and np.array_equal(
            self.values, other.values, equal_nan=True
        )

    @classmethod
    def empty(cls, tasks: Sequence[str]) -> AccuracyMatrix:
        """A matrix in which nothing is measured yet."""
        return cls(tuple(tasks), np.full((len(tasks) + 1, len(tasks)), np.nan))

    @classmethod
    def of_cells(
        cls, tasks: Sequence[str], cells: Sequence[Sequence[float | None]]
    ) -> AccuracyMatrix:
        """A matrix of T+1 rows of T scores, None where not measured."""
        if any(len(row) != len(tasks) for row in cells):
            raise MismatchError(
                f"rows of {sorted({len(row) for row in cells})} scores", expected=f"{len(tasks)}"
            )
        values = [[np.nan if cell is None else cell for cell in row] for row in cells]
        return cls(tuple(tasks), np.array(values).reshape(len(cells), len(tasks)))

    @property
    def cells(self) -> tuple[tuple[float | None, ...], ...]:
        """The rows as plain floats, None where not measured."""
        return tuple(
            tuple(None if np.isnan(cell) else float(cell) for cell in row) for row in self.values
        )

    def with_row(self, number: int, scores: Sequence[float | None]) -> AccuracyMatrix:
        """A copy with the T scores after `number` tasks (0: before any training)."""
        if not 0 <= number <= len(self.tasks):
            raise MismatchError(
                f"row {number} of an accuracy matrix", expected=f"0 to {len(self.tasks)}"
            )
        if len(scores) != len(self.tasks):
            raise MismatchError(
                f"{len(scores)} scores for row {number}",
                expected=f"{len(self.tasks)}, one for each task (None where not measured)",
            )
        values = self.values.copy()
        values[number] = [np.nan if score is None else score for score in scores]
        shares = {place: share for place, share in self.shares.items() if place[0] != number}
        for column, score in enumerate(scores):
            if isinstance(score, Share):
                shares[number, column] = score
        return AccuracyMatrix(self.tasks, values, shares)

    @property
    def last(self) -> tuple[float | None, ...]:
        """The T scores of the last row with any, each a `Share` where it came as one; else none."""
        measured = np.flatnonzero(~np.isnan(self.values).all(axis=1))
        if not len(measured):
            return ()
        number = int(measured[-1])
        row = self.cells[number]
        return tuple(self.shares.get((number, column), row[column]) for column in range(len(row)))

    def up_to(self, number: int) -> AccuracyMatrix:
        """The matrix of the first `number` tasks only, as if the stream had ended there."""
        if not 1 <= number <= len(self.tasks):
            raise MismatchError(f"the first {number} tasks", expected=f"1 to {len(self.tasks)}")
        shares = {(i, j): share for (i, j), share in self.shares.items() if i <= number > j}
        return AccuracyMatrix(self.tasks[:number], self.values[: number + 1, :number], shares)

    def to_json(self) -> str:
        """JSON with null where not measured; floats are exact."""
        return json.dumps(self._document(), allow_nan=False) + "\n"

    def _document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "tasks": self.tasks,
            "accuracy": self.cells,
        }

    def to_csv(self) -> str:
        """CSV: `after` (number of tasks learned), then one column a task; floats are exact."""
        rows: list[list[str | int]] = [
            [number, *("" if cell is None else repr(cell) for cell in row)]
            for number, row in enumerate(self.cells)
        ]
        return to_csv([["after", *self.tasks], *rows])

    def save(self, path: Path) -> Path:
        """Write the matrix as JSON with its checksum, or as CSV, by the suffix of `path`."""
        if _suffix(path) == ".csv":
            return write_atomic(path, self.to_csv())
        return sealed.write_json(path, self._document())

    @classmethod
    def load(cls, path: Path) -> AccuracyMatrix:
        """Read what `save` wrote; NotFoundError, CorruptError, or MismatchError (newer schema)."""
        suffix = _suffix(path)
        try:
            data = sealed.read_file(path, "text_bytes")
        except FileNotFoundError as error:
            raise NotFoundError(f"no accuracy matrix at {path}") from error
        try:
            if suffix == ".csv":
                return _from_csv(data.decode())
            return _from_json(sealed.parse_json(data, str(path)).content, path)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CorruptError(
                f"{path} is not an accuracy matrix: {error}", expected="what `save` wrote"
            ) from error


def _suffix(path: Path) -> str:
    if path.suffix not in (".json", ".csv"):
        raise ConfigError(f"accuracy matrix file {path}", expected="a name ending in .json or .csv")
    return path.suffix


def _from_json(document: dict[str, Any], path: Path) -> AccuracyMatrix:
    if document["schema"] != SCHEMA:
        raise CorruptError(f"{path} is {document['schema']!r}", expected=SCHEMA)
    if document["schema_version"] > SCHEMA_VERSION:
        raise MismatchError(
            f"{path} has schema version {document['schema_version']}",
            expected=f"at most {SCHEMA_VERSION}",
            remedy="upgrade memtool",
        )
    if len(document) != 4:
        raise ValueError(f"it has the keys {', '.join(document)}")
    return AccuracyMatrix.of_cells(document["tasks"], document["accuracy"])


def _from_csv(text: str) -> AccuracyMatrix:
    header, *rows = from_csv(text)
    if header[0] != "after" or [row[0] for row in rows] != [str(i) for i in range(len(header))]:
        raise ValueError("the first column is not `after`, 0, 1, 2, …")
    cells = [[None if cell == "" else float(cell) for cell in row[1:]] for row in rows]
    return AccuracyMatrix.of_cells(header[1:], cells)
