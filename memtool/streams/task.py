"""Samples, tasks and streams: a task is made of images with labels, or of texts with answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt
from typing_extensions import TypeVar

from memtool.settings import TextMetric


@dataclass(frozen=True, eq=False)
class Images:
    """Decoded images and labels.

    images uint8 (n, size, size, 3), perhaps memory-mapped; labels int64 (n,), ids into the
    stream's class names.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> npt.NDArray[np.uint8]:
        """What a model is given: the images."""
        return self.images

    def chosen(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Images:
        """Those at the given places, copied into memory."""
        return Images(self.images[rows], self.labels[rows])

    @classmethod
    def joined(cls, parts: Sequence[Images]) -> Images:
        """Several, one after another, copied into memory; one alone as it is."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )


@dataclass(frozen=True)
class Texts:
    """Prompts and their answers, as many; a prompt that is only asked has none."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def chosen(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Texts:
        """Those at the given places."""
        return Texts(
            tuple(self.prompts[row] for row in rows), tuple(self.answers[row] for row in rows)
        )

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """Several, one after another."""
        return cls(
            tuple(prompt for part in parts for prompt in part.prompts),
            tuple(answer for part in parts for answer in part.answers),
        )


S = TypeVar("S", bound=Images | Texts, default=Any)


def spread(samples: S, count: int) -> S:
    """At most `count` samples, spread evenly."""
    if len(samples) <= count:
        return samples
    found: Any = samples.chosen(np.linspace(0, len(samples) - 1, count).astype(np.int64))
    return found


@dataclass(frozen=True, eq=False)
class Task(Generic[S]):
    """One step of a stream. `number` counts from 1, as on the command line.

    Images have `classes`, perhaps a `domain`, and a `prompt`: the template of what a text tower
    reads about its classes, with {} for the name. Texts have the `metric` of their answers.
    """

    number: int
    name: str
    train: S
    validation: S
    test: S
    domain: str | None = None
    classes: tuple[int, ...] = ()
    prompt: str | None = None
    metric: TextMetric | None = None

    @classmethod
    def pooled(cls, tasks: Sequence[Task[S]]) -> Task[S]:
        """All tasks as one, copied into memory; its number is 0."""
        kind: Any = type(tasks[0].train)
        return cls(
            number=0,
            name="all tasks",
            train=kind.joined([task.train for task in tasks]),
            validation=kind.joined([task.validation for task in tasks]),
            test=kind.joined([task.test for task in tasks]),
            classes=tuple(sorted({one for task in tasks for one in task.classes})),
        )


@dataclass(frozen=True, eq=False)
class Stream(Generic[S]):
    """A data set cut into tasks in a fixed order.

    `setting` is the cut: "dil", "dg", "dgcl" (tasks are domains over the same classes), "xtail"
    (tasks are data sets with classes of their own), "cil", "til" and "mts" (tasks are groups of
    classes), "vil" (groups of classes in a domain), "mtl" (domains or groups of classes, at once),
    "trace" (tasks are folders of texts). `held_out` is the domain of "dg" and "dgcl" that nothing
    is learned from: it is not among the tasks, and all of its images are for testing. `fingerprint`
    is a sha256 of the source, the cut and the order, the same whatever is held out. `notes` are
    sentences on what was taken for what, what was left out, and what is in training and test alike.
    """

    name: str
    setting: str
    tasks: tuple[Task[S], ...]
    class_names: tuple[str, ...]
    fingerprint: str
    held_out: Task[S] | None = None
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many tasks have a number: those to learn, and the one that is held out."""
        return len(self.tasks) + (self.held_out is not None)
