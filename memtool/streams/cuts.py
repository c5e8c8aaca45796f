"""Cutting a table of images into the tasks of a stream."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from memtool.errors import ConfigError, DataError, did_you_mean
from memtool.settings import HOLDS_OUT, StreamSettings
from memtool.streams.groups import Group, groups_of, rows_in_common
from memtool.streams.ordering import (
    balanced,
    held_back,
    position_in_group,
    random_ranks,
    stratified,
)
from memtool.streams.parts import alike
from memtool.streams.table import Table
from memtool.streams.task import Images, Stream, Task

_TEST_SHARE = 0.2


def cut(
    table: Table, settings: StreamSettings, templates: Mapping[str, str] | None = None
) -> Stream:
    """The stream that `settings` cut from `table`; `templates` are those of prompts, by domain.

    "dil", "dg", "dgcl" and "xtail" make one task of every domain (of a chain: of every data set),
    in the table's order or in `settings.order`; "cil", "til" and "mts" make one task of every
    `classes_per_task` classes, or `splits` tasks of as equal a number of classes as they can, in an
    order drawn from the seed or in `settings.order`. "vil" makes one of every such group of classes
    in every domain, "mtl" of every domain, or of groups of classes where there are none or `splits`
    is set (`memtool.streams.groups`). An order may leave domains, classes or tasks out. Under
    "dil", "vil" and "mtl" a domain of training images alone is tested on the domains that have test
    images alone, where there are any, and these make no task. A table without a test split gives a
    fifth of every class (of every domain) to testing, by the seed; under "xtail" each data set does
    that for itself. `shots` keeps so many training images of every class, `train_per_task` and
    `test_per_task` choose as equally from the classes as they can, and a larger number keeps what a
    smaller one chose; `validation` is then taken from the training images, class by class.
    `held_out` takes a domain of "dg" or "dgcl" out of the tasks, which keep their numbers, and
    gives all of its images to testing.
    Under `split` "validation" the images to test on are those held back for validation, and no test
    image is in the stream; of the held-out domain those of the domains that are learned from
    (Gulrajani and Lopez-Paz 2021: training-domain validation).

    Raises ConfigError for settings that do not fit the table, and DataError for a table without
    domains where tasks are domains, for a task with no image or with one class only, for a
    validation share that leaves a class empty, and for test images of a class that no task has
    training images of.
    """
    if settings.split == "validation" and not settings.validation:
        raise ConfigError(
            "stream.split is validation, and stream.validation is 0: no image is held back",
            expected="a share of the training images, or a number of them a task",
            remedy="--set stream.validation=0.2, for the training, too",
        )
    groups = groups_of(table, settings)
    is_test = _test_rows(table, settings)
    in_common = rows_in_common(table, settings.setting)
    tasks = tuple(
        _task(table, settings, is_test, in_common, number, group)
        for number, group in enumerate(groups, start=1)
    )
    if templates:
        tasks = tuple(
            dataclasses.replace(task, prompt=templates.get(task.domain) if task.domain else None)
            for task in tasks
        )
    held_out = None
    if settings.held_out is not None:
        held_out = _held_out(table, settings, tasks)
        tasks = tuple(task for task in tasks if task.number != held_out.number)
    _check_classes(table, tasks, held_out)
    return Stream(
        name=table.name,
        setting=settings.setting,
        tasks=tasks,
        class_names=table.class_names,
        fingerprint=_fingerprint(table, settings, groups),
        held_out=held_out,
        notes=_notes(table, is_test, in_common, groups, held_out),
    )


def _notes(
    table: Table,
    is_test: npt.NDArray[np.bool_],
    in_common: npt.NDArray[np.bool_],
    groups: Sequence[Group],
    held_out: Task | None,
) -> tuple[str, ...]:
    """What is worth knowing of the data: the table's own notes, names alike, images in both parts.

    Images are compared before `shots` and the like choose among them.
    """
    notes = [*table.notes, *alike(table.class_names, f"{table.name}: classes")]
    notes += alike(table.domain_names, f"{table.name}: domains")
    if table.content is None:
        return tuple(notes)
    used = np.any([group.rows(table) for group in groups], axis=0)
    used |= in_common
    if held_out is not None:
        is_test = np.asarray(table.domains) == table.domain_names.index(held_out.name)
    test, train = table.content[used & is_test], table.content[used & ~is_test]
    both = int(np.isin(test, train).sum())
    if both:
        notes.append(
            f"{table.name}: {both:,} of {len(test):,} test images are also among the training "
            "images, pixel by pixel"
        )
    return tuple(notes)


def _held_out(table: Table, settings: StreamSettings, tasks: Sequence[Task]) -> Task:
    """The task of the domain that is held out, with all of its images for testing."""
    name = settings.held_out
    names = [task.name for task in tasks]
    if settings.setting not in HOLDS_OUT:
        raise ConfigError(
            f"stream.held_out is {name!r} under stream.setting {settings.setting}",
            expected="stream.setting dg, or dgcl: only domain generalisation holds a domain out",
        )
    if name not in names:
        raise ConfigError(
            f"stream.held_out names {name!r}, which is no domain of {table.name}",
            expected=did_you_mean(str(name), names),
        )
    if len(tasks) < 2:
        raise ConfigError(
            f"stream.held_out {name!r} leaves no domain of {table.name} to learn from",
            expected="two domains or more",
        )
    task = tasks[names.index(name)]
    assert table.domains is not None
    rows = np.flatnonzero(table.domains == table.domain_names.index(name))
    if settings.test_per_task is not None:
        ranks = random_ranks(len(table), "subset", _test_seed(settings))
        rows = rows[balanced(table.labels[rows], ranks[rows], settings.test_per_task)]
    nothing = table.samples(rows[:0])
    test = table.samples(rows)
    if settings.split == "validation":
        test = Images.joined([one.validation for one in tasks if one is not task])
    return dataclasses.replace(task, train=nothing, validation=nothing, test=test)


def _test_rows(table: Table, settings: StreamSettings) -> npt.NDArray[np.bool_]:
    has_test = np.full(len(table), table.is_test.any())
    if settings.setting == "xtail" and table.domains is not None:
        has_test = np.isin(table.domains, np.unique(table.domains[table.is_test]))
    if has_test.all():
        return table.is_test
    groups = table.labels
    if table.domains is not None:
        groups = table.domains * len(table.class_names) + table.labels
    drawn = stratified(groups, random_ranks(len(table), "test", _test_seed(settings)), _TEST_SHARE)
    return np.where(has_test, table.is_test, drawn)


def _test_seed(settings: StreamSettings) -> int:
    return settings.seed if settings.test_seed is None else settings.test_seed


def _task(
    table: Table,
    settings: StreamSettings,
    is_test: npt.NDArray[np.bool_],
    in_common: npt.NDArray[np.bool_],
    number: int,
    group: Group,
) -> Task:
    inside = group.rows(table)
    train = np.flatnonzero(inside & ~is_test)
    test = np.flatnonzero(inside & is_test)
    if not len(test):
        test = np.flatnonzero(group.of_classes(table) & in_common)
    ranks = random_ranks(len(table), "subset", settings.seed)
    test_ranks = random_ranks(len(table), "subset", _test_seed(settings))

    def limited(
        rows: npt.NDArray[np.int64], count: int | None, ranks: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.int64]:
        if count is None:
            return rows
        return rows[balanced(table.labels[rows], ranks[rows], count)]

    if settings.shots is not None:
        train = train[position_in_group(table.labels[train], ranks[train]) < settings.shots]
    train = limited(train, settings.train_per_task, ranks)
    test = limited(test, settings.test_per_task, test_ranks)
    validation = train[:0]
    if settings.validation > 0:
        ranks = random_ranks(len(table), "validation", settings.seed)
        held = held_back(table.labels[train], ranks[train], settings.validation)
        train, validation = train[~held], train[held]

    where = f"task {number} ({group.name}) of {table.name}"
    _check(table, settings, train, test, where)
    if settings.validation > 0:
        _check_validation(table, settings.validation, train, validation, where)
    if settings.split == "validation":
        test = validation
    present = np.union1d(table.labels[train], table.labels[test]).tolist()
    classes = group.classes or tuple(present)
    if group.domain is not None:
        classes = tuple(one for one in classes if one in present)
    return Task(
        number=number,
        name=group.name,
        domain=None if group.domain is None else table.domain_names[group.domain],
        classes=classes,
        train=table.samples(train),
        validation=table.samples(validation),
        test=table.samples(test),
    )


def _check(
    table: Table,
    settings: StreamSettings,
    train: npt.NDArray[np.int64],
    test: npt.NDArray[np.int64],
    where: str,
) -> None:
    """A task has images to learn from, images to test on, and something to tell apart."""
    for rows, part in ((train, "training"), (test, "test")):
        if len(rows) == 0:
            raise DataError(
                f"{where} has no {part} images",
                expected="at least one image of every class in each split",
                remedy="add images, or leave it out by stream.order",
            )
    classes = np.unique(table.labels[train])
    if len(classes) > 1:
        return
    if settings.train_per_task == 1:
        remedy = "a larger stream.train_per_task"
    elif settings.setting in ("cil", "til", "mts", "vil") and settings.splits is None:
        named = settings.order if settings.setting != "vil" else None
        count = len(named or table.class_names)
        widths = [width for width in range(2, count + 1) if count % width != 1]
        nearest = min(widths, key=lambda width: abs(width - settings.classes_per_task), default=2)
        remedy = f"stream.classes_per_task {nearest}"
    else:
        remedy = "add images of other classes, or leave it out by stream.order"
    raise DataError(
        f"{where} has only one class in its training images: {table.class_names[int(classes[0])]}",
        expected="at least two classes to tell apart",
        remedy=remedy,
    )


def _check_validation(
    table: Table,
    wanted: float,
    train: npt.NDArray[np.int64],
    validation: npt.NDArray[np.int64],
    where: str,
) -> None:
    """What is held back is of every class of the task, and as much as was asked for."""
    held = table.labels[validation]
    empty = np.setdiff1d(table.labels[train], held)
    if len(empty):
        one = int(empty[0])
        more = f" and {len(empty) - 1} other classes" if len(empty) > 1 else ""
        count = int((table.labels[train] == one).sum())
        raise DataError(
            f"stream.validation {wanted:g} leaves {table.class_names[one]}{more} of {where} "
            f"without a validation image, of {count} training image{'s' if count > 1 else ''}",
            expected="an image of every class on both sides",
            remedy="a larger stream.validation"
            if count > 1
            else "a larger stream.train_per_task or stream.shots, or more images of the class",
        )
    if wanted >= 1 and len(validation) < wanted:
        raise DataError(
            f"stream.validation {wanted:g} leaves no training image of some class of {where}, "
            f"which has {len(train) + len(validation)}",
            expected=f"at most {len(validation)}, which leaves one image of every class",
            remedy=f"--set stream.validation={len(validation)}",
        )


def _check_classes(table: Table, tasks: Sequence[Task], held_out: Task | None) -> None:
    """A class that is tested was in the training images of some task: no other can be right."""
    tested = [*tasks, held_out] if held_out is not None else tasks
    learned = np.unique(np.concatenate([task.train.labels for task in tasks]))
    for task in tested:
        unseen = np.setdiff1d(task.test.labels, learned)
        if len(unseen) == 0:
            continue
        names = [table.class_names[one] for one in unseen[:5].tolist()]
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        raise DataError(
            f"{int(np.isin(task.test.labels, unseen).sum())} test images of task {task.number} "
            f"({task.name}) of {table.name} are of classes that no task has training images of: "
            f"{', '.join(names)}{more}",
            expected="training images of every class that is tested",
            remedy="a larger stream.train_per_task, or add such images, or leave those of the "
            "test part out",
        )


def _fingerprint(table: Table, settings: StreamSettings, groups: Sequence[Group]) -> str:
    identity = {
        "source": table.fingerprint,
        "setting": settings.setting,
        "groups": [group.identity for group in groups],
        "train_per_task": settings.train_per_task,
        "test_per_task": settings.test_per_task,
        "validation": settings.validation,
        "seed": settings.seed,
    }
    if settings.shots is not None:
        identity["shots"] = settings.shots
    if settings.split != "test":
        identity["split"] = settings.split
    if settings.test_seed is not None:
        identity["test_seed"] = settings.test_seed
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
