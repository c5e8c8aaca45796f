from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from memtool.errors import ConfigError, DataError
from memtool.settings import Setting, StreamSettings
from memtool.streams.cuts import cut
from memtool.streams.table import Table
from memtool.streams.task import Images


def _rows(samples: Images) -> list[int]:
    """The rows of the fixture's table: each image holds its own number."""
    return samples.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("setting", ["dil", "dg"])
def test_domains_become_tasks(table: Table, setting: Setting) -> None:
    stream = cut(table, StreamSettings(setting=setting))
    assert [task.name for task in stream.tasks] == ["photo", "sketch"]
    for number, task in enumerate(stream.tasks):
        rows = np.flatnonzero(table.domains == number)
        assert _rows(task.train) == [row for row in rows if row % 5]
        assert _rows(task.test) == [row for row in rows if row % 5 == 0]
        assert np.array_equal(task.train.labels, table.labels[_rows(task.train)])
        assert task.classes == (0, 1, 2)
        assert task.domain == task.name
    assert stream.class_names == ("ant", "bee", "cat")
    assert stream.setting == setting


@pytest.mark.parametrize("setting", ["cil", "til"])
def test_groups_of_classes_become_tasks(table: Table, setting: Setting) -> None:
    settings = StreamSettings(setting=setting, classes_per_task=3)
    (task,) = cut(table, settings).tasks
    assert sorted(task.classes) == [0, 1, 2]
    assert sorted(_rows(task.train) + _rows(task.test)) == list(range(60))
    assert task.domain is None


def test_an_order_is_followed_and_may_leave_out(table: Table) -> None:
    by_domain = cut(table, StreamSettings(order=("sketch",)))
    assert [task.name for task in by_domain.tasks] == ["sketch"]
    by_class = cut(table, StreamSettings(setting="cil", order=("cat", "ant")))
    assert [task.classes for task in by_class.tasks] == [(2, 0)]
    assert by_class.tasks[0].name == "cat+ant"
    assert set(by_class.tasks[0].train.labels) == {0, 2}


def test_the_class_order_follows_the_seed(table: Table) -> None:
    many = replace(table, class_names=tuple(str(one) for one in range(20)))
    many = replace(many, labels=np.arange(60) % 20, is_test=np.arange(60) >= 40)

    def order(seed: int) -> tuple[int, ...]:
        tasks = cut(many, StreamSettings(setting="cil", seed=seed)).tasks
        return tuple(itertools.chain(*(task.classes for task in tasks)))

    assert sorted(order(0)) == list(range(20))
    assert order(0) == order(0) != order(1)
    assert order(0) != tuple(range(20))


def test_without_a_test_split_a_fifth_of_every_class_is_held_out(table: Table) -> None:
    whole = replace(table, is_test=np.zeros(60, dtype=bool))
    first, second = (cut(whole, StreamSettings(seed=seed)) for seed in (0, 1))
    for task in first.tasks:
        assert np.bincount(task.train.labels).tolist() == [8, 8, 8]
        assert np.bincount(task.test.labels).tolist() == [2, 2, 2]
        assert not set(_rows(task.train)) & set(_rows(task.test))
    assert _rows(first.tasks[0].test) != _rows(second.tasks[0].test)
    # The same images are held out however the data is cut.
    by_class = cut(whole, StreamSettings(setting="cil", classes_per_task=3))
    assert _rows(by_class.tasks[0].test) == sorted(
        _rows(first.tasks[0].test) + _rows(first.tasks[1].test)
    )


def test_a_class_with_one_image_is_for_training(table: Table) -> None:
    labels = np.where(np.arange(60) == 7, 2, np.arange(60) % 2)
    lone = replace(table, domains=None, labels=labels, is_test=np.zeros(60, dtype=bool))
    (task,) = cut(lone, StreamSettings(setting="cil", classes_per_task=3)).tasks
    assert 7 in _rows(task.train)


def test_subsets_are_balanced_and_nested(table: Table) -> None:
    chosen: list[set[int]] = []
    for count in (3, 7, 12, 1000):
        task = cut(table, StreamSettings(train_per_task=count, test_per_task=count)).tasks[1]
        counts = np.bincount(task.train.labels, minlength=3)
        assert counts.max() - counts.min() <= 1
        assert len(task.train) == min(count, 24)
        assert len(task.test) == min(count, 6)
        chosen.append(set(_rows(task.train)))
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]


def test_a_short_class_gives_all_it_has(table: Table) -> None:
    labels = np.where(np.arange(60) < 3, 0, 1)
    skewed = replace(table, domains=None, labels=labels, class_names=("few", "many"))
    (task,) = cut(skewed, StreamSettings(setting="cil", train_per_task=20)).tasks
    assert np.bincount(task.train.labels).tolist() == [2, 18]


def test_validation_is_a_share_of_every_class(table: Table) -> None:
    plain = cut(table, StreamSettings()).tasks[0]
    task = cut(table, StreamSettings(validation=0.25)).tasks[0]
    assert np.bincount(task.validation.labels).tolist() == [2, 2, 2]
    assert sorted(_rows(task.train) + _rows(task.validation)) == _rows(plain.train)
    assert _rows(task.test) == _rows(plain.test)


def test_validation_may_be_a_count(table: Table) -> None:
    plain = cut(table, StreamSettings()).tasks[0]
    task = cut(table, StreamSettings(validation=5)).tasks[0]
    assert sorted(np.bincount(task.validation.labels).tolist()) == [1, 2, 2]
    assert sorted(_rows(task.train) + _rows(task.validation)) == _rows(plain.train)
    assert _rows(task.test) == _rows(plain.test)
    with pytest.raises(ValidationError, match="whole number"):
        StreamSettings(validation=1.5)


@pytest.mark.parametrize("setting", ["dil", "cil", "dg"])
@pytest.mark.parametrize("validation", [0.25, 4])
def test_what_is_measured_may_be_what_was_held_back(
    table: Table, setting: Setting, validation: float
) -> None:
    settings = StreamSettings(setting=setting, validation=validation, classes_per_task=3)
    usual = cut(table, settings)
    held = cut(table, settings.model_copy(update={"split": "validation"}))
    assert held.fingerprint != usual.fingerprint
    for one, other in zip(usual.tasks, held.tasks, strict=True):
        assert _rows(one.train) == _rows(other.train)
        assert _rows(one.validation) == _rows(other.validation) == _rows(other.test)
        assert not set(_rows(one.test)) & set(_rows(other.test) + _rows(other.train))


def test_of_an_unseen_domain_the_sources_are_measured(table: Table) -> None:
    settings = StreamSettings(setting="dg", validation=0.25, split="validation", held_out="sketch")
    stream = cut(table, settings)
    assert stream.held_out is not None
    assert _rows(stream.held_out.test) == [row for t in stream.tasks for row in _rows(t.validation)]


def test_validation_that_leaves_a_class_empty(table: Table) -> None:
    with pytest.raises(DataError, match="without a validation image, of 1 training image") as error:
        cut(table, StreamSettings(validation=0.2, shots=1))
    assert "a larger" in str(error.value.remedy)
    with pytest.raises(DataError, match="and 1 other classes of task 1") as error:
        cut(table, StreamSettings(validation=1))
    assert error.value.remedy == "a larger stream.validation"
    with pytest.raises(DataError, match="leaves no training image of some class") as error:
        cut(table, StreamSettings(validation=50))
    most = int(str(error.value.remedy).rpartition("=")[2])
    assert len(cut(table, StreamSettings(validation=most)).tasks[0].validation) == most
    with pytest.raises(ConfigError, match="validation is 0") as config_error:
        cut(table, StreamSettings(split="validation"))
    assert "stream.validation=0.2" in str(config_error.value.remedy)


def test_the_fingerprint_covers_what_is_cut_and_nothing_else(table: Table) -> None:
    base = cut(table, StreamSettings()).fingerprint
    assert len(base) == 64
    same = [
        StreamSettings(order=("photo", "sketch")),
        StreamSettings(classes_per_task=3),
        StreamSettings(source="elsewhere"),
    ]
    other = [
        StreamSettings(order=("sketch", "photo")),
        StreamSettings(setting="dg"),
        StreamSettings(seed=1),
        StreamSettings(train_per_task=6),
        StreamSettings(test_per_task=6),
        StreamSettings(validation=0.5),
    ]
    assert {cut(table, settings).fingerprint for settings in same} == {base}
    prints = {cut(table, settings).fingerprint for settings in other}
    prints.add(cut(replace(table, fingerprint="other data"), StreamSettings()).fingerprint)
    assert len(prints | {base}) == len(other) + 2


def test_contiguous_rows_are_views_and_others_are_right(table: Table) -> None:
    assert np.shares_memory(table.samples(np.arange(10, 20)).images, table.images)
    rows = np.array([1, 5, 6, 40])
    assert _rows(table.samples(rows)) == rows.tolist()


def test_an_unknown_name_in_the_order(table: Table) -> None:
    with pytest.raises(ConfigError, match="no domain of toy") as domain:
        cut(table, StreamSettings(order=("foto", "sketch")))
    assert "did you mean 'photo'" in str(domain.value)
    with pytest.raises(ConfigError, match="no class of toy") as one:
        cut(table, StreamSettings(setting="cil", order=("beee", "ant")))
    assert "did you mean 'bee'" in str(one.value)


def test_a_name_twice_in_the_order(table: Table) -> None:
    with pytest.raises(ConfigError, match="'photo' twice"):
        cut(table, StreamSettings(order=("photo", "photo")))


@pytest.mark.parametrize("setting", ["dil", "dg"])
def test_no_domains(table: Table, setting: Setting) -> None:
    flat = replace(table, domains=None, domain_names=())
    with pytest.raises(DataError, match="toy has no domains") as error:
        cut(flat, StreamSettings(setting=setting))
    assert "cil or til" in str(error.value)


def test_more_classes_per_task_than_classes(table: Table) -> None:
    with pytest.raises(ConfigError, match="there are 3 classes"):
        cut(table, StreamSettings(setting="cil", classes_per_task=4))


@pytest.mark.parametrize(("part", "is_test"), [("test", False), ("training", True)])
def test_an_empty_task_is_named(table: Table, part: str, is_test: bool) -> None:
    lopsided = np.where(table.domains == 1, is_test, table.is_test)
    with pytest.raises(DataError, match=rf"task 2 \(sketch\) of toy has no {part} images"):
        cut(replace(table, is_test=lopsided), StreamSettings())


def test_a_domain_with_one_class_is_named(table: Table) -> None:
    labels = np.where(table.domains == 1, 2, table.labels)
    with pytest.raises(DataError, match=r"task 2 \(sketch\) of toy has only one class .*: cat"):
        cut(replace(table, labels=labels), StreamSettings())


@pytest.mark.parametrize("setting", ["cil", "til"])
def test_a_lone_last_class_is_named_with_a_width_that_works(table: Table, setting: Setting) -> None:
    with pytest.raises(DataError, match=r"task 2 .* has only one class") as error:
        cut(table, StreamSettings(setting=setting, classes_per_task=2))
    assert "classes_per_task 3" in str(error.value)


def test_one_training_image(table: Table) -> None:
    with pytest.raises(DataError, match="only one class") as error:
        cut(table, StreamSettings(train_per_task=1))
    assert "larger stream.train_per_task" in str(error.value)
