"""Samples, tasks and streams: what a task is made of, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Samples:
    """Decoded images and labels.

    images uint8 (n, size, size, 3), perhaps memory-mapped; labels int64 (n,), ids into the
    stream's class names.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Task:
    """One step of a stream. `number` counts from 1, as on the command line.

    `prompt` is the template of what a text tower reads about its classes, with {} for the name.
    """

    number: int
    name: str
    domain: str | None
    classes: tuple[int, ...]
    train: Samples
    validation: Samples
    test: Samples
    prompt: str | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """A data set cut into tasks in a fixed order.

    `setting` is the cut: "dil", "dg" (tasks are domains over the same classes), "xtail" (tasks are
    data sets with classes of their own), "cil", "til" and "mts" (tasks are groups of classes).
    `held_out` is the domain of "dg" that nothing is learned from: it is not among the tasks, and
    all of its images are for testing. `fingerprint` is a sha256 of the source, the cut and the
    order, the same whatever is held out. `notes` are sentences on what was taken for what, what was
    left out, and what is in training and test alike.
    """

    name: str
    setting: str
    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    fingerprint: str
    held_out: Task | None = None
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many tasks have a number: those to learn, and the one that is held out."""
        return len(self.tasks) + (self.held_out is not None)
