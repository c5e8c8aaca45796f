"""What later tasks did to earlier ones, and which of two tasks is chosen: what a method can say.

Only some can: a method that has both methods of `LooksBack` is one of them, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from memtool.streams.task import Task


@dataclass(frozen=True)
class OldTask:
    """An earlier task at a later moment, against the moment when it was learned.

    coefficient_drift: relative change of the weights that its test images give the adapters that
    were there; new_coefficients: length of the weights on adapters that came later, over that of
    its own then, both None where its images had no weight then; new_share: their part of the
    weight; key_degrees: mean angle that its keys turned as they are asked, None where none had a
    direction then; accuracy: of its test images.
    """

    coefficient_drift: float | None
    new_coefficients: float | None
    new_share: float
    key_degrees: float | None
    accuracy: float


@dataclass(frozen=True)
class Moment:
    """After `learned` tasks: the `old` ones in order, and the accuracy of the newest."""

    learned: int
    old: tuple[OldTask, ...]
    newest: float


@dataclass(frozen=True)
class Choices:
    """Between two tasks: test images of either that chose their `own`, and one of the two."""

    own: float
    either: float


@runtime_checkable
class LooksBack(Protocol):
    """A method that can tell its tasks apart in the memory that it made of them."""

    def look_back(self, tasks: Sequence[Task]) -> list[Moment]:
        """The memory after each of `tasks`, which were learned in this order.

        Raises NotFoundError for a task that no version was consolidated after.
        """

    def choices(self, pair: tuple[Task, Task]) -> Choices:
        """Which of two tasks the test images of both choose, as shares of all of them."""
