"""Tables as CSV and JSON, read as they are written: a label 007 is the text 007."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtool.errors import DataError, NotFoundError, did_you_mean
from memtool_stores.errors import SchemaError
from memtool_stores.files import read_ordinary
from memtool_stores.printable import printable, shown


class Written(str):
    """Text that may stand for a number: a cell of CSV, or a JSON number."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one file or split.

    `columns` holds the wanted ones but the image, by name; `class_names` those that the data set
    carries itself. `images` gives {"bytes", "path"} of some rows, as `datasets` does, or None where
    there is none. `lines` are the lines of a text file where its rows begin.
    """

    name: str
    is_test: bool
    count: int
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, Sequence[str]]
    images: Callable[[Sequence[int]], Sequence[Any]]
    lines: Sequence[int] = ()

    def place(self, row: int) -> str:
        """`"row 2 of a.csv, line 4"`; rows count from 0, lines from 1."""
        line = f", line {self.lines[row]}" if self.lines else ""
        return f"row {row} of {printable(self.name)}{line}"


Read = tuple[Sequence[str], list[list[Any]], list[int]]
"""Names of columns, rows of values in that order, and the lines where the rows begin."""


def read_rows(
    file: Path, kind: str, name: str, *, image: str, others: Sequence[str], is_test: bool
) -> Rows:
    """The rows of a CSV or JSON file.

    Raises DataError, with the line, for a file that cannot be read as one, that is larger than
    limits.text_bytes, or has not the columns.
    """
    columns, rows, lines = (csv_rows if kind == "csv" else json_rows)(text_of(file), name)
    require_columns(columns, [image, *others], name)
    place = {column: columns.index(column) for column in [image, *others]}
    pictures = [row[place[image]] for row in rows]

    def images(wanted: Sequence[int]) -> list[Any]:
        found = []
        for row in wanted:
            value = pictures[row]
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{name}, row {row}, line {lines[row]}: {image} is {shown(value)}",
                    expected="the name of an image file",
                )
            found.append({"bytes": None, "path": value} if value else None)
        return found

    return Rows(
        name=name,
        is_test=is_test,
        count=len(rows),
        columns={column: [row[place[column]] for row in rows] for column in others},
        class_names={},
        images=images,
        lines=lines,
    )


def require_columns(columns: Sequence[str], wanted: Sequence[str], name: str) -> None:
    """Raise DataError for the first wanted column that is not there."""
    for column in wanted:
        if column not in columns:
            raise DataError(
                f"{printable(name)} has no column {shown(column)}",
                expected=did_you_mean(column, [printable(one)[:80] for one in columns[:50]]),
                remedy="correct image:, label: or domain: in the description",
            )


def text_of(file: Path) -> str:
    """The text of a file. Raises DataError; FileNotFoundError where there is none."""
    shown_file = printable(str(file))
    try:
        return read_ordinary(file, "text_bytes").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shown_file}: byte {error.start} is not UTF-8", remedy="save it as UTF-8"
        ) from error
    except SchemaError as error:
        raise DataError(error.message, expected=error.expected, remedy=error.remedy) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f"{shown_file}: cannot be read ({error.strerror})",
            remedy="check its path and permissions",
        ) from error


def lines_of(file: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that hold anything, each with the words that say where it is.

    Raises NotFoundError, and DataError as `text_of`.
    """
    try:
        text = text_of(file)
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {printable(str(file))}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{printable(str(file))}, line {number}", line


def csv_rows(text: str, name: str) -> Read:
    """Cells as they are written; empty ones, and NaN, are None."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[Any]] = []
    lines: list[int] = []
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            begin, line = line, reader.line_num + 1
            if not cells:
                continue  # an empty line
            if not header:
                header = cells
                twice = next((one for one in header if header.count(one) > 1), None)
                if twice is not None:
                    raise DataError(
                        f"{printable(name)}: two columns are called {shown(twice)}",
                        expected="names of columns in the first line, each once",
                    )
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{printable(name)}, line {begin}: {len(cells)} cells",
                    expected=f"{len(header)}, as in the first line",
                    remedy="put cells with commas between quotes",
                )
            rows.append([_cell(cell) for cell in cells])
            lines.append(begin)
    except csv.Error as error:
        raise DataError(
            f"{printable(name)}, line {reader.line_num}: not CSV: {printable(str(error))}",
            expected="cells between commas, those with commas or quotes between quotes",
        ) from error
    return header, rows, lines


def _cell(text: str) -> Written | None:
    return None if not text.strip() or text.strip().lower() == "nan" else Written(text)


def json_rows(text: str, name: str) -> Read:
    """Values of a list of objects, or of one object a line; null and NaN are None."""
    records: list[tuple[int, Any]] = []
    if text.lstrip()[:1] == "[":
        whole = parse_json(text, f"{printable(name)}")
        records = [(1, record) for record in whole]
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                records.append((number, parse_json(line, f"{printable(name)}, line {number}")))
    columns: dict[str, None] = {}
    for number, record in records:
        if not isinstance(record, dict):
            raise DataError(
                f"{printable(name)}, line {number}: {shown(record)}",
                expected='objects such as {"image": "a.png", "label": "cat"}, one a line or a list',
            )
        columns.update(dict.fromkeys(record))
    names = list(columns)
    rows = [[_as_written(record.get(column)) for column in names] for _, record in records]
    return names, rows, [number for number, _ in records]


def _as_written(value: Any) -> Any:
    return Written(str(value).lower()) if isinstance(value, bool) else value


def parse_json(text: str, where: str) -> Any:
    """JSON with its numbers as they are written; NaN and infinities are None.

    Raises DataError, beginning with `where`.
    """
    try:
        return json.loads(
            text,
            parse_int=Written,
            parse_float=Written,
            parse_constant=lambda _: None,
            object_pairs_hook=_once,
        )
    except RecursionError as error:
        raise DataError(
            f"{where}: lists and objects too deep inside each other", expected=_OBJECTS
        ) from error
    except ValueError as error:
        raise DataError(
            f"{where} cannot be read as JSON: {printable(str(error))}", expected=_OBJECTS
        ) from error


_OBJECTS = "objects in braces, whose keys come once, names and text between double quotes"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} comes twice in one object")
    return found
