"""The errors of the library: those of the store, and what only the library raises.

MemtoolError
├── those that `memtool_stores.errors` draws, of which the library raises NotFoundError,
│   AlreadyExistsError, BusyError, ChangedMeanwhileError, CorruptError and MismatchError
├── ConfigError           a setting, option or argument cannot be used          exit 2
├── DataError             an image, text or data set cannot be used             exit 2
├── CapacityError         a memory that holds as many patterns as it can        exit 4
└── DivergedError         training reached a loss that is not finite            exit 1

TrainingInterrupted is a KeyboardInterrupt that says where the training was saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from memtool.words import either, near
from memtool_stores.errors import (
    AlreadyExistsError,
    BusyError,
    ChangedMeanwhileError,
    CorruptError,
    MemtoolError,
    MismatchError,
    NotFoundError,
)

__all__ = [
    "AlreadyExistsError",
    "BusyError",
    "CapacityError",
    "ChangedMeanwhileError",
    "ConfigError",
    "CorruptError",
    "DataError",
    "DivergedError",
    "MemtoolError",
    "MismatchError",
    "NotFoundError",
    "TrainingInterrupted",
    "did_you_mean",
]


class ConfigError(MemtoolError):
    """A setting, option or argument cannot be used."""

    code = "config"
    exit_status = 2


class DataError(MemtoolError):
    """An image, a text or a data set cannot be used."""

    code = "data"
    exit_status = 2


class CapacityError(MemtoolError):
    """A memory holds as many patterns as it can."""

    code = "capacity"
    exit_status = 4


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

    def __reduce__(self) -> tuple[type[TrainingInterrupted], tuple[Path]]:
        """How it goes to another process."""
        return type(self), (self.checkpoint,)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`"did you mean 'affine'?"` for the nearest known words, else the list of known words.

    What is near is said by `near`.
    """
    names = list(known)
    if close := near(given, names):
        return f"did you mean {either(close)}? (known: {', '.join(names)})"
    return f"one of {', '.join(names)}"
