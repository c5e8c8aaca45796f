"""What is measured of a baseline after each task, and the rows of the table that come of it.

Of images the features, under every head that can be made of them; of texts the answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from memtool.evaluation.course import Course
from memtool.evaluation.record import Row
from memtool.learning.answers import Answering, AnswerScores, answer_row
from memtool.learning.learner import Learner
from memtool.methods.baselines.reading import (
    TITLES,
    ClosedForms,
    Reading,
    accuracies,
    readings_of,
)
from memtool.methods.outcome import share_right
from memtool.streams.task import Task


class Testing(ABC):
    """The tests of a learner on tasks."""

    def __init__(self, learner: Learner, tasks: Sequence[Task]) -> None:
        self.learner = learner
        self.tasks = tasks

    @abstractmethod
    def before(self) -> None:
        """Test before the first task, where there is a head."""

    def count(self, task: Task) -> None:
        """Count what closed forms need of a task that was learned; here nothing."""
        del task

    @abstractmethod
    def after(self, number: int) -> None:
        """Test after so many tasks."""

    @abstractmethod
    def at_all_times(self) -> None:
        """Test once, for a learner that stays as it is."""

    @abstractmethod
    def rows(self, seconds: float) -> list[Row]:
        """The rows of the table; `seconds` are those of learning."""

    def about(self) -> dict[str, Any]:
        """What rows say beside their scores: replay, and what the learner trained and keeps."""
        parameters = [one for one in self.learner.parameters() if one.requires_grad]
        found: dict[str, Any] = {"replay": self.learner.replay}
        if parameters:
            found["parameters"] = sum(one.numel() for one in parameters)
            found["bytes"] = sum(one.numel() * one.element_size() for one in parameters)
        return found


class OfHeads(Testing):
    """Features under heads: a row for each way to read them."""

    def __init__(
        self, learner: Learner, tasks: Sequence[Task], readings: Sequence[Reading]
    ) -> None:
        super().__init__(learner, tasks)
        self.closed = ClosedForms(learner.work, len(tasks))
        self.courses = {reading: Course(tasks, learner.work.unseen) for reading in readings}

    def before(self) -> None:
        """A head that is fixed in advance can be read before anything is learned."""
        if "fixed" in self.courses:
            self._read(0, ["fixed"])

    def count(self, task: Task) -> None:
        """The features of its training images, as they are now."""
        self.closed.count(self.learner.features_of(task.train), task)

    def after(self, number: int) -> None:
        """Every reading."""
        self._read(number, [*self.courses])

    def at_all_times(self) -> None:
        """One line, repeated."""
        scores = self._read(0, ["fixed"])["fixed"]
        for number in range(1, len(self.tasks) + 1):
            self.courses["fixed"].add(number, scores)

    def _read(self, number: int, readings: Sequence[Reading]) -> dict[Reading, list[float]]:
        """The scores after so many tasks, by reading."""
        found: dict[Reading, list[float]] = {}
        samples = [task.test for task in self.courses[readings[0]].tested]
        test = [self.learner.features_of(each) for each in samples]
        for reading in readings:
            if reading in ("linear", "fixed"):
                predict = self.learner.objective.classifier().to("cpu")
            else:
                predict = self.closed.solve(reading)
            found[reading] = accuracies(predict, test, samples)
            self.courses[reading].add(number, found[reading])
        return found

    def rows(self, seconds: float) -> list[Row]:
        """A row a reading; that of the learner's own head has its name."""
        learner = self.learner
        return [
            course.row(
                learner.id if reading in ("linear", "fixed") else f"{learner.id}-{reading}",
                f"{learner.label}, {TITLES[reading]}",
                learner.kind,
                seconds=seconds,
                **self.about(),
            )
            for reading, course in self.courses.items()
        ]


@runtime_checkable
class HasScores(Protocol):
    """A learner that is read in its own way, under no head that all could have."""

    def scores(self, task: Task) -> Tensor:
        """Scores (n, classes) of a task's test images as the model is now; the highest wins."""


class OfScores(Testing):
    """A learner that has a classifier of its own: one row."""

    def __init__(self, learner: Learner, tasks: Sequence[Task]) -> None:
        super().__init__(learner, tasks)
        assert isinstance(learner, HasScores)
        self.scores = learner.scores
        self.course = Course(tasks, learner.work.unseen)

    def before(self) -> None:
        """There is no classifier yet."""

    def after(self, number: int) -> None:
        """Its own scores."""
        tested = self.course.tested
        self.course.add(number, [share_right(self.scores(task), task.test) for task in tested])

    def at_all_times(self) -> None:
        """One line, repeated."""
        tested = self.course.tested
        line = [share_right(self.scores(task), task.test) for task in tested]
        for number in range(1, len(self.tasks) + 1):
            self.course.add(number, line)

    def rows(self, seconds: float) -> list[Row]:
        """One row."""
        one = self.learner
        about = self.about()
        return [self.course.row(one.id, one.label, one.kind, seconds=seconds, **about)]


class OfAnswers(Testing):
    """Losses, and metrics of generated answers: one row."""

    def __init__(self, learner: Learner, tasks: Sequence[Task]) -> None:
        super().__init__(learner, tasks)
        self.found: dict[int, AnswerScores] = {}

    def before(self) -> None:
        """A language model can answer before anything is learned."""
        self.after(0)

    def after(self, number: int) -> None:
        """The answers to the test prompts of all tasks."""
        learner = self.learner.eval()
        answering = Answering(learner.work, learner.recall(), learner.objective.backbone)
        stage = f"after {number} tasks: measure {learner.title}"
        self.found[number] = answering.scores(self.tasks, stage, learner.asked)

    def at_all_times(self) -> None:
        """One line, repeated."""
        self.after(0)
        self.found = dict.fromkeys(range(len(self.tasks) + 1), self.found[0])

    def rows(self, seconds: float) -> list[Row]:
        """One row."""
        learner = self.learner
        row = answer_row(learner.id, learner.label, learner.kind, self.tasks, self.found, seconds)
        return [row.model_copy(update=self.about())]


def measured_by(
    learner: Learner, tasks: Sequence[Task], readings: Sequence[Reading] | None = None
) -> Testing:
    """The tests of a learner; `readings` of images: none for all that its head allows."""
    if learner.objective.of_texts:
        return OfAnswers(learner, tasks)
    if isinstance(learner, HasScores):
        return OfScores(learner, tasks)
    every = readings_of(learner.work, is_fixed=learner.objective.is_fixed)
    return OfHeads(learner, tasks, readings or every)
