"""The errors of the library: what was wrong, where, what was expected, and what helps.

MemtoolError
├── ConfigError           a setting, option or argument cannot be used          exit 2
├── DataError             an image, text or data set cannot be used             exit 2
├── MismatchError         two parts that do not fit (shape, rank, backbone)     exit 2
├── NotFoundError         a task, preset, file or adapter that is not there     exit 3
├── AlreadyThereError     something that would be overwritten                   exit 4
├── BusyError             another process works in the same place                exit 4
├── ChangedMeanwhileError another process changed what this one was working on  exit 4
├── CapacityError         a memory that holds as many patterns as it can        exit 4
├── CorruptError          stored bytes that are not what was written            exit 5
└── DivergedError         training reached a loss that is not finite            exit 1

TrainingInterrupted is a KeyboardInterrupt that says where the training was saved.

The store has its own tree (`memtool_stores.StoreError`); the command line maps both to exit codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from memtool_stores.redacted import said


class MemtoolError(Exception):
    """Base of all errors that memtool raises on purpose.

    `message` says what was wrong and where; `expected` what would have been right; `remedy` is the
    command or the change that helps; each is one printable line, whatever a file put into it, and
    none holds a secret.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1

    def __init__(
        self, message: str, *, expected: str | None = None, remedy: str | None = None
    ) -> None:
        self.message = said(message)
        self.expected = None if expected is None else said(expected)
        self.remedy = None if remedy is None else said(remedy)
        super().__init__(self.message)

    def __str__(self) -> str:
        parts = [self.message]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.remedy:
            parts.append(f"try: {self.remedy}")
        return "\n".join(parts)


class ConfigError(MemtoolError):
    """A setting, option or argument cannot be used."""

    code = "config"
    exit_status = 2


class DataError(MemtoolError):
    """An image, a text or a data set cannot be used."""

    code = "data"
    exit_status = 2


class MismatchError(MemtoolError):
    """Two parts do not fit together: shape, rank, layout or backbone."""

    code = "mismatch"
    exit_status = 2


class NotFoundError(MemtoolError):
    """A task, preset, file or adapter is not there."""

    code = "not-found"
    exit_status = 3


class AlreadyThereError(MemtoolError):
    """Something is already there and would be overwritten."""

    code = "already-there"
    exit_status = 4


class BusyError(MemtoolError):
    """Another process works in the same place; nothing was begun."""

    code = "busy"
    exit_status = 4


class ChangedMeanwhileError(MemtoolError):
    """Another process changed what this one was working on; nothing was stored."""

    code = "changed-meanwhile"
    exit_status = 4


class CorruptError(MemtoolError):
    """Bytes on disk are not what was written."""

    code = "corrupt"
    exit_status = 5


class CapacityError(MemtoolError):
    """A memory holds as many patterns as it can."""

    code: ClassVar[str] = "capacity"
    exit_status: ClassVar[int] = 4


class DivergedError(MemtoolError):
    """Training reached a loss that is not finite."""

    code = "diverged"
    exit_status = 1


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during a training whose state was saved: the same command goes on from `checkpoint`.

    An interruption that lost work, or where there was no training, is a plain KeyboardInterrupt.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"the training was saved as {checkpoint}")
        self.checkpoint = checkpoint


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`"did you mean 'affine'?"` for the closest known word, else the list of known words."""
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}? (known: {', '.join(names)})"
    return f"one of {', '.join(names)}"
