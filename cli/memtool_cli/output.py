"""What a verb says: data on stdout for people and scripts alike, everything else on stderr.

    out = Out(json=False, quiet=False)
    with out.progress() as progress:
        results = mira.adapt("3", progress)
    out.data(results, Table(("adapter", "loss"), rows), ids=[r.path for r in results])
    out.next("memtool write")

A person at a terminal gets a table, a pipe gets tab-separated columns with a header, `--json` one
JSON document per record, `-q` only ids or one number. Whatever a file put into a name or a message,
only characters that can be seen come out, and a table keeps its rows and columns.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from memtool.progress import Progress, ProgressEvent
from memtool_stores.files import is_stdout
from memtool_stores.printable import as_cell, printable, printable_json, without_addresses
from memtool_stores.redacted import redacted

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel
    from rich.table import Table as RichTable

    from memtool.reports.table import Grid

PLAIN_LINE_EVERY_SECONDS = 5.0

_GAP = 3
"""Blanks between two columns."""

_NUMBER = re.compile(r"-|[-+]?[\d.,]+( (%|s|[kMGT]?B))?")


@dataclass(frozen=True)
class Table:
    """Header and rows of cells; without a header every row is a name and its value.

    Columns of `spared` are left out, the first one first, of a terminal that is too narrow for all.
    """

    header: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    title: str = ""
    spared: tuple[str, ...] = ()

    def within(self, width: int) -> Table:
        """The table in so many columns of a terminal, as far as leaving out helps."""
        from rich.cells import cell_len

        left = list(self.header)
        longest = [
            max(
                cell_len(_cell(cell))
                for cell in (self.header[place], *(r[place] for r in self.rows))
            )
            for place in range(len(left))
        ]
        widths = dict(zip(left, longest, strict=True))
        gone = []
        for name in self.spared:
            if sum(widths[one] for one in left) + _GAP * (len(left) - 1) + 2 <= width:
                break
            left.remove(name)
            gone.append(name)
        if not gone:
            return self
        places = [self.header.index(name) for name in left]
        rows = [[row[place] for place in places] for row in self.rows]
        said = f"{', '.join(gone)}: in a wider terminal, or by --json"
        return Table(tuple(left), rows, self.title, notes=(said,))

    notes: tuple[str, ...] = ()
    """Lines below it."""


class Out:
    """The one place that a verb writes to.

    Under torchrun or accelerate launch only the first process speaks.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.speaks = os.environ.get("RANK", "0") == "0"
        self.quiet = quiet or not self.speaks
        self._stdout_is_taken = False

    def data(
        self,
        records: BaseModel | Sequence[BaseModel],
        *tables: Table | Grid,
        ids: Iterable[object],
    ) -> None:
        """Print records: as JSON, one a line; as their ids; or as tables."""
        if not self.speaks or (self.quiet and self._stdout_is_taken):
            return
        stream = self._stream
        if self.json:
            several = records if isinstance(records, Sequence) else (records,)
            indent = 2 if stream.isatty() and len(several) == 1 else None
            for record in several:
                stream.write(printable_json(_document(record, indent)) + "\n")
        elif self.quiet:
            for id in ids:
                self.line(str(id))
        elif stream.isatty():
            self._print(tables, stream)
        else:
            for place, table in enumerate(tables):
                if table.title:
                    stream.flush()
                    self.note(table.title)  # says what the numbers are
                lines = [table.header, *table.rows] if table.header else table.rows
                if place:
                    self.line("")
                for row in lines:
                    stream.write("\t".join(as_cell(_cell(cell)) for cell in row) + "\n")
                for note in getattr(table, "notes", ()):
                    self.note(note)
        stream.flush()

    def _print(self, tables: Iterable[Table | Grid], stream: TextIO) -> None:
        from rich.console import Console

        console = Console(file=stream)
        for table in tables:
            if isinstance(table, Table):
                narrow = table.within(console.width)
                console.print(_grid(narrow))
                for note in narrow.notes:
                    self.note(note)
            else:
                from memtool.reports.table import show

                show(table, console)

    @property
    def machine(self) -> bool:
        """Whether a program reads what is printed: it gets all, not a page."""
        return self.json or self.quiet or not self._stream.isatty()

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._stdout_is_taken else sys.stdout

    def leave_stdout_to(self, file: Path | None) -> None:
        """Print on stderr from here on when `file` stands for stdout: a page must come out whole.

        With -q nothing is printed then.
        """
        self._stdout_is_taken = file is not None and is_stdout(file)

    def line(self, text: str) -> None:
        """One line of data."""
        self._stream.write(printable(text) + "\n")

    def note(self, text: str) -> None:
        """One line for the reader, on stderr; not with -q."""
        if not self.quiet:
            sys.stderr.write(printable(redacted(without_addresses(text))) + "\n")
            sys.stderr.flush()

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """While the block runs, what the library warns of is a note, each once.

        With --json only that a log service failed, which no record says.
        """
        hearer = _Hearer(self)
        loggers = [logging.getLogger(name) for name in ("memtool", "memtool_stores")]
        for logger in loggers:
            logger.addHandler(hearer)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(hearer)

    @contextmanager
    def silent_hearing(self) -> Iterator[None]:
        """While the block runs, what the library warns of is for another one to say."""
        loggers = [logging.getLogger(name) for name in ("memtool", "memtool_stores")]
        hearers = [(one, h) for one in loggers for h in one.handlers if isinstance(h, _Hearer)]
        for logger, hearer in hearers:
            logger.removeHandler(hearer)
        try:
            yield
        finally:
            for logger, hearer in hearers:
                logger.addHandler(hearer)

    def next(self, command: str) -> None:
        """The command that comes next."""
        self.note(f"next: {command}")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A callback for long work: a bar on a terminal, a line every few seconds elsewhere."""
        if self.quiet:
            yield _silence
        elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            with _bar() as progress:
                yield progress
        else:
            yield PlainProgress()


class _Hearer(logging.Handler):
    """Turns warnings of the library into notes."""

    def __init__(self, out: Out) -> None:
        super().__init__(logging.WARNING)
        self._out = out
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, unless it was said."""
        text = record.getMessage()
        if text not in self._said and (not self._out.json or record.name == "memtool.trackers"):
            self._out.note(f"note: {text}")
        self._said.add(text)


class PlainProgress:
    """Progress as lines on stderr, one every few seconds and one at the end of a stage."""

    def __init__(self, every_seconds: float = PLAIN_LINE_EVERY_SECONDS) -> None:
        self.every_seconds = every_seconds
        self._stage = ""
        self._first_step = 0
        self._started = self._spoke = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        """Say where the stage stands, if it is time to."""
        now = time.monotonic()
        if event.stage != self._stage:
            self._stage, self._first_step = event.stage, event.step
            self._started = self._spoke = now
        finished = event.step >= event.total
        if not finished and now - self._spoke < self.every_seconds:
            return
        self._spoke = now
        rate = (event.step - self._first_step) / max(now - self._started, 1e-9)
        parts = [f"{printable(event.stage)}: {event.step}/{event.total}", _numbers(event)]
        if rate > 0 and not finished:
            left = (event.total - event.step) / rate
            parts.append(f"({rate:.1f} steps/s, {duration(left)} left)")
        sys.stderr.write(" ".join(part for part in parts if part) + "\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """`"8.2 s"`, `"3 min 20 s"`, `"2 h 5 min"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """`"512 B"`, `"1.3 MB"`; powers of 1000."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def setting_text(value: object) -> str:
    """A setting as `--set` takes it: several values between commas, and none for no value."""
    if isinstance(value, list):
        return ",".join(map(setting_text, value))
    return "none" if value is None else str(value)


def percent(fraction: float | None) -> str:
    """`"93.4 %"`; a dash for what was not measured."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def brief(text: str) -> str:
    """The beginning of what may be a long prompt, for the title of a table."""
    return text if len(text) <= 100 else text[:99] + "…"


def _silence(_: ProgressEvent) -> None:
    """Progress for -q."""


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[stage]}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, stage="starting", numbers="", rate="")

        def show(event: ProgressEvent) -> None:
            shown, stage = bar.tasks[0], printable(event.stage)
            if shown.fields["stage"] != stage:
                bar.reset(task, total=event.total, stage=stage, numbers="", rate="")
            rate = f"{shown.speed:.1f} steps/s" if shown.speed else ""
            bar.update(task, completed=event.step, numbers=_numbers(event), rate=rate)

        yield show


def _numbers(event: ProgressEvent) -> str:
    return " ".join(f"{printable(name)} {value:.3g}" for name, value in event.metrics.items())


def _cell(cell: object) -> str:
    """What stands in a cell of a table: printable, and on one line."""
    return printable(" ".join("" if cell is None else part for part in str(cell).split()))


def _document(record: BaseModel, indent: int | None) -> str:
    from pydantic_core import PydanticSerializationError

    try:
        return record.model_dump_json(by_alias=True, indent=indent)
    except PydanticSerializationError:  # a path that is not UTF-8: JSON has escapes for its bytes
        text = json.dumps(record.model_dump(mode="json", by_alias=True))
        return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=indent)


def _grid(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(
        title=Text(_cell(table.title)) if table.title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=bool(table.header),
        pad_edge=False,
    )
    width = len(table.header) or max((len(row) for row in table.rows), default=0)
    for place in range(width):
        cells = [_cell(row[place]) for row in table.rows]
        numeric = any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)
        grid.add_column(
            Text(_cell(table.header[place])) if table.header else "",
            justify="right" if numeric and table.header else "left",
            overflow="fold",
        )
    for row in table.rows:
        grid.add_row(*(Text(_cell(cell)) for cell in row))
    return grid
