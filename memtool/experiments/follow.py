"""What is sent of a run to its log services while it runs, under the same names everywhere.

    loss/task 2 of 5 inverted - adapt    of every training, by step
    accuracy/seen                        mean over the tasks learned so far
    accuracy/task                        share of samples whose task was inferred right
    accuracy/inverted                    of a task after each task; of other rows `joint/accuracy/…`
    keys/drift_degrees                   by which the keys of older adapters turned
    weights/inverted/task-1-seed-0       mean weight of an adapter for the samples of a task
    metric/faa                           of the record, at the end

All but losses go by the number of tasks learned. What goes by tasks is measured for it after each,
on images in about the time that the evaluation of the whole run takes; of texts whose answers are
generated only at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtool.errors import MemtoolError
from memtool.evaluation.metrics import seen_accuracy
from memtool.evaluation.record import Record
from memtool.experiments.runs import dotted
from memtool.methods.method import Method
from memtool.progress import Progress, ProgressEvent
from memtool.streams.task import Task
from memtool.trackers import Card
from memtool.trackers.sending import Send, following
from memtool_stores.names import check_name

POINTS = 200
"""At most so many points of the loss of one training."""

_LIVE = {"faa": "accuracy/seen", "task_accuracy": "accuracy/task", "loss": "loss/seen"}
"""What `Method.measure` calls it, and the curve."""


@dataclass(frozen=True)
class Said:
    """What a person says of a run: for its record, and for the services that follow it.

    Raises SchemaError for a name that cannot be one of a file.
    """

    name: str | None = None
    note: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name, "a run")
        object.__setattr__(self, "tags", tuple(dict.fromkeys(filter(None, self.tags))))

    @property
    def of_record(self) -> dict[str, Any]:
        """The fields of `Run`."""
        return {"name": self.name, "note": self.note or None, "tags": self.tags}


@dataclass(frozen=True)
class Follow:
    """Which services follow an experiment, and where its files lie."""

    services: tuple[str, ...] = ()
    said: Said = Said()
    shared: Path = Path("runs")
    anew: bool = False
    say: Callable[[str], None] = logging.getLogger("memtool.trackers").info


class Followed:
    """One run of a memory, as it is told to the services."""

    def __init__(self, send: Send | None, heard: Progress | None) -> None:
        self._send = send
        self._heard = heard
        self._learned = 0
        self._version: str | None = None

    def progress(self, event: ProgressEvent) -> None:
        """The one callback: whoever listens hears it, and losses become points."""
        if self._heard is not None:
            self._heard(event)
        if self._send is None or not event.metrics:
            return
        before = (event.step - 1) * POINTS // event.total
        if event.step in (1, event.total) or event.step * POINTS // event.total != before:
            # Letters that every service takes in a name.
            stage = event.stage.replace("/", " of ").replace(": ", " - ")
            points = {f"{name}/{stage}": value for name, value in event.metrics.items()}
            self._send(points, step=event.step, axis="step")

    def begin(self, method: Method) -> None:
        """Remember what the memory is before the run learns anything."""
        if self._send is not None and method.workspace.has_store:
            self._version = method.workspace.store.head()

    def learned(self, method: Method) -> None:
        """After a task: how good the memory is, what it recalls, and how far its keys turned."""
        if self._send is None or not method.workspace.has_store:
            return
        work = method.workspace
        known = method.known_tasks("HEAD")
        count = len(known)
        if count in (0, self._learned):
            return
        self._learned = count
        points: dict[str, float] = {}
        head, before = work.store.head(), self._version
        if before is not None and before != head:
            drift = work.store.diff(before, head).key_drift_degrees
            if drift:
                points["keys/drift_degrees"] = sum(drift.values()) / len(drift)
        self._version = head
        if work.reads == "images" or not work.config.text.generate:
            points |= _live(method, known)
        if points:
            self._send(points, step=count, axis="tasks")

    def measured(self, record: Record) -> None:
        """The whole record, at the end."""
        if self._send is None:
            return
        for row in record.metrics.rows:
            whose = "" if row is record.metrics.rows[0] else f"{row.id}/"
            for name, step, value in _curves(row.accuracy, record.run.task_names):
                if whose or name != "seen":  # of the memory that was sent as it was reached
                    self._send({f"{whose}accuracy/{name}": value}, step=step, axis="tasks")
            found = {f"{whose}metric/{id}": value for id, value in row.metrics.items()}
            if found:
                self._send(found, step=len(record.run.tasks), axis="tasks")


@contextmanager
def followed(
    follow: Follow, config: Any, seed: int, bound: str | None, heard: Progress | None, *, main: bool
) -> Iterator[Followed]:
    """A run that is followed for as long as the block runs; of several processes, by `main`."""
    if not follow.services or not main:
        yield Followed(None, heard)
        return
    source = Path(config.stream.source).stem or config.stream.source
    group = follow.said.name or f"{source}-{config.stream.setting}"
    parts = [group, bound, f"seed-{seed}"]
    parts.append(f"without-{held}" if (held := config.stream.held_out) else None)
    name = check_name("-".join(part for part in parts if part), "a run")
    card = Card(
        name=name,
        group=group,
        settings=dotted(config.recorded()),
        folder=config.runs,
        shared=follow.shared,
        note=follow.said.note,
        tags=follow.said.tags,
        anew=follow.anew,
    )
    with following(follow.services, card, say=follow.say) as send:
        yield Followed(send, heard)


def _live(method: Method, known: Sequence[int]) -> dict[str, float]:
    """Accuracy and weights at HEAD; what a method cannot say between two tasks is left out."""
    points: dict[str, float] = {}
    try:
        found = method.measure("HEAD", known)
        points |= {_LIVE[name]: value for name, value in found.items() if name in _LIVE}
        tasks: list[Task] = [method.workspace.task(str(number)) for number in known]
        recalled = method.inside(tasks).recalled
    except MemtoolError:
        return points
    if recalled is not None:
        for task, line in zip(recalled.tasks, recalled.weights, strict=True):
            for adapter, value in zip(recalled.adapters, line, strict=True):
                points[f"weights/{task}/{adapter}"] = value
    return points


def _curves(
    accuracy: Sequence[Sequence[float | None]], names: Sequence[str]
) -> Iterator[tuple[str, int, float]]:
    """Points of a row: the curve, tasks learned, the score; `seen` is the mean of those."""
    import numpy as np

    for step, scores in enumerate(accuracy):
        for name, score in zip(names, scores, strict=True):
            if score is not None:
                yield name, step, score
    for step, mean in enumerate(seen_accuracy(np.array(accuracy, dtype=np.float64)), start=1):
        if mean == mean:  # not NaN: every seen task was measured
            yield "seen", step, float(mean)
