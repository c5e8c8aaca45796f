"""Tasks made alike: the last task of a stream, step by step the first one once more.

What `stream.alike` asks for, to see what a memory does with two tasks that it cannot tell apart.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt

from memtool.errors import ConfigError
from memtool.settings import StreamSettings
from memtool.streams.ordering import balanced, position_in_group, random_ranks, stratified
from memtool.streams.task import Images, Stream, Task

SETTINGS = ("dil", "cil", "til")
"""Those in which two tasks can be made alike: images, learned one after another."""


def made_alike(stream: Stream, settings: StreamSettings) -> Stream:
    """The stream, with the last task as like the first as `settings.alike` says, 0 to 1.

    By "copies" that share of the last task's images gives way to that share of the first task's,
    with their labels, in training, validation and test: at 1 the last task is the first, image by
    image. By "others" the same, but the first task learns from one half of its training images, and
    the other half comes again: at 1 a task is revisited. By "looks" every image of the last task is
    a blend, pixel by pixel, with an image of its class of the first, whose share it is; labels and
    numbers of images stay. `require_able` has said that it can be so. Raises ConfigError for a
    stream that has no first and last task.
    """
    if settings.alike == 0:
        return stream
    tasks = stream.tasks
    if len(tasks) < 2:
        raise ConfigError(
            f"stream.alike {settings.alike:g} of a stream of one task, {tasks[0].name}",
            expected="two tasks or more: the last is made like the first",
            remedy="a longer stream.order, or --set stream.alike=0",
        )
    first, last = tasks[0], tasks[-1]
    again = first
    if settings.alike_by == "others":
        first, again = _halved(first, settings.seed)
    how = _blended if settings.alike_by == "looks" else _exchanged

    def mixed(own: Images, other: Images) -> Images:
        return how(own, other, settings.alike, settings.seed)

    changed = dataclasses.replace(
        last,
        train=mixed(last.train, again.train),
        validation=mixed(last.validation, again.validation),
        test=mixed(last.test, again.test),
    )
    if settings.alike_by != "looks":
        changed = dataclasses.replace(changed, classes=_classes(changed, last, first))
    words = f"{stream.fingerprint} alike {settings.alike!r} by {settings.alike_by}"
    return dataclasses.replace(
        stream,
        tasks=(first, *tasks[1:-1], changed),
        fingerprint=hashlib.sha256(words.encode()).hexdigest(),
    )


def require_able(settings: StreamSettings) -> None:
    """Raise ConfigError for `settings.alike` where no two tasks can be made alike so."""
    if settings.alike == 0:
        return
    named = f"stream.alike {settings.alike:g}"
    if settings.setting not in SETTINGS:
        raise ConfigError(
            f"{named} under stream.setting {settings.setting}",
            expected=f"one of {', '.join(SETTINGS)}: images, learned one task after another",
            remedy="--set stream.alike=0",
        )
    if settings.alike_by == "looks" and settings.setting != "dil":
        raise ConfigError(
            f"{named} by looks under stream.setting {settings.setting}: tasks of other classes "
            "have no image of a class to blend with",
            expected="stream.setting dil, whose tasks share their classes",
            remedy="--set stream.alike_by=copies",
        )


def _exchanged(own: Images, other: Images, share: float, seed: int) -> Images:
    """The share of `other`, and of `own` what is not that share; each as equal from all classes."""
    kept = len(own) - round(share * len(own))
    taken = round(share * len(other))
    return Images.joined([_some(own, kept, seed), _some(other, taken, seed)])


def _some(samples: Images, count: int, seed: int) -> Images:
    ranks = random_ranks(len(samples), "alike", seed)
    return samples.chosen(np.flatnonzero(balanced(samples.labels, ranks, count)))


def _blended(own: Images, other: Images, share: float, seed: int) -> Images:
    """Every image as (1 − share) of itself and the share of one of its class in `other`.

    Of a class that `other` has not, images stay as they are. Images of a class are paired in the
    order of their draws, those of `other` again from the first where they are fewer.
    """
    images = own.images.copy()
    own_place = position_in_group(own.labels, random_ranks(len(own), "alike", seed))
    other_place = position_in_group(other.labels, random_ranks(len(other), "alike", seed))
    for label in np.intersect1d(own.labels, other.labels).tolist():
        mine, theirs = np.flatnonzero(own.labels == label), np.flatnonzero(other.labels == label)
        theirs = theirs[np.argsort(other_place[theirs])]
        partners = theirs[own_place[mine] % len(theirs)]
        mixed = (1 - share) * own.images[mine] + share * other.images[partners].astype(np.float64)
        images[mine] = np.rint(mixed).astype(np.uint8)
    return Images(images, own.labels)


def _halved(task: Task[Images], seed: int) -> tuple[Task[Images], Task[Images]]:
    """The task with one half of its training images of every class, and with the other."""
    ranks = random_ranks(len(task.train), "revisited", seed)
    half = stratified(task.train.labels, ranks, 0.5)

    def of(mask: npt.NDArray[np.bool_]) -> Task[Images]:
        return dataclasses.replace(task, train=task.train.chosen(np.flatnonzero(mask)))

    return of(~half), of(half)


def _classes(changed: Task[Images], last: Task[Images], first: Task[Images]) -> tuple[int, ...]:
    """The classes that are there now, in the order of the last task and then of the first."""
    labels = {*changed.train.labels.tolist(), *changed.test.labels.tolist()}
    known = dict.fromkeys((*last.classes, *first.classes))
    return tuple(one for one in known if one in labels)
