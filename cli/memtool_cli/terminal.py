"""How what no verb prints reaches the terminal: warnings, logs, unforeseen errors, any encoding."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

from memtool_cli import failure
from memtool_stores.printable import printable, without_addresses
from memtool_stores.redacted import redacted


def prepare() -> None:
    """Make this process one of the command line. Called once, before anything is printed."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # An umlaut on a terminal of ASCII comes out as its escape; it is no error.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.excepthook = failure.on_unexpected
    warnings.showwarning = _warn
    if logging.lastResort is not None:  # what libraries log that nobody listens to
        logging.lastResort.setFormatter(Plain())


class Plain(logging.Formatter):
    """What is logged as one line that can be printed and holds no secret."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(redacted(without_addresses(super().format(record))))


def _open_closed_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: the next file would take its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del category, filename, lineno, line
    (file or sys.stderr).write(f"warning: {printable(redacted(without_addresses(str(message))))}\n")
