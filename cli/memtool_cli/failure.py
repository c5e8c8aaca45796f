"""From an error to what the user reads and the exit code that a script sees."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from contextlib import suppress
from types import TracebackType

import typer

from memtool.errors import MemtoolError, TrainingInterrupted
from memtool_stores.printable import one_line, printable, without_addresses
from memtool_stores.redacted import redacted

NO, USAGE, NOT_FOUND = 1, 2, 3
INTERRUPTED, BROKEN_PIPE = 130, 141

EXIT_CODES = """\
0 done
1 the answer is no, or the work failed
2 usage or configuration
3 not found
4 conflict
5 integrity
130 interrupted, what was committed is safe
141 broken pipe"""

# What a verb may raise on purpose; anything else is a bug and goes to `on_unexpected`.
EXPECTED: tuple[type[BaseException], ...] = (
    MemtoolError,
    MemtoolError,
    typer.TyperException,
    typer.Exit,
    typer.Abort,
    KeyboardInterrupt,
    OSError,
    ImportError,  # of a library that found no memory; others are unforeseen
)


def report(error: BaseException) -> int:
    """Tell the user on stderr what was wrong and what helps; the exit code."""
    match error:
        case typer.Exit():
            return error.exit_code
        case typer.Abort():
            _say("not done: nothing was changed")
            return NO
        case TrainingInterrupted():
            _say(
                f"interrupted: every committed version is safe, and {error}",
                remedy="the same command again, to go on",
            )
            return INTERRUPTED
        case KeyboardInterrupt():
            _say("interrupted: every committed version is safe")
            return INTERRUPTED
        case BrokenPipeError():
            close_stdout()
            return BROKEN_PIPE
        case MemtoolError():
            _say(f"error: {error.message}", expected=error.expected, remedy=error.remedy)
            return error.exit_status
        case typer.TyperException():
            return _report_usage(error)
        case OSError():
            return _report_system(error)
        case ImportError() if re.search("failed to map|annot allocate memory", str(error)):
            return _report_system(OSError(errno.ENOMEM, "not enough memory", error.name))
    raise error


def show_traceback(error: BaseException) -> None:
    """Print where an error came from: for --debug; it holds no secret, and nothing that steers."""
    for line in redacted("".join(traceback.format_exception(error))).splitlines():
        sys.stderr.write(printable(line) + "\n")


def close_stdout() -> None:
    """Stdout takes no more: what Python still flushes at its end goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def on_unexpected(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    """`sys.excepthook`: an error that nobody foresaw, in one line. Python then exits with 1."""
    if "--debug" in sys.argv:
        show_traceback(error)
        return
    text = str(error).partition("\n")[0]
    _say(
        f"error: unexpected {kind.__name__}: {text}",
        remedy="the same command with --debug, and report what it shows",
    )


def _report_usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    message = one_line(error.format_message())
    if not message:  # no arguments at all: the help page has been printed
        return USAGE
    command = context.command_path if context else "memtool"
    _say(f"error: {message}", remedy=f"{command} --help")
    return error.exit_code


def _report_system(error: OSError) -> int:
    name = error.filename or "the output"
    match error.errno:
        case errno.ENOENT:
            _say(f"error: {name} is not there")
            return NOT_FOUND
        case errno.EACCES | errno.EPERM | errno.EROFS:
            _say(
                f"error: {name}: {error.strerror}",
                remedy="another place with --store PATH or --set runs=PATH, or other permissions",
            )
            return USAGE
        case errno.ENOSPC | errno.EDQUOT:
            close_stdout()  # it may be what is full
            _say(
                f"error: {name}: {error.strerror}; every committed version is safe",
                remedy="free some space (memtool gc), then the same command again",
            )
            return NO
        case errno.EMFILE | errno.ENFILE:
            _say(
                f"error: {name}: too many open files; nothing is known to be damaged",
                remedy="more files for each process (`ulimit -n 4096`), then again",
            )
            return NO
        case errno.ENOMEM:
            _say(
                f"error: {name}: not enough memory; nothing is known to be damaged",
                remedy="end other programs, or take away the limit (`ulimit -v unlimited`)",
            )
            return NO
    _say(f"error: {error}")
    return NO


def _say(message: str, *, expected: str | None = None, remedy: str | None = None) -> None:
    lines = [without_addresses(message)]
    if expected:
        lines.append(f"  expected: {one_line(expected)}")
    if remedy:
        lines.append(f"  try: {one_line(remedy)}")
    with suppress(OSError):  # nobody reads it, or it is full: the exit code still says how it ended
        sys.stderr.write("\n".join(printable(redacted(line)) for line in lines) + "\n")
        sys.stderr.flush()
