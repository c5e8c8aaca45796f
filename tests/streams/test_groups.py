"""Which classes and domains make a task under vil, mtl and dgcl, and what their labels are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from memtool.errors import ConfigError, DataError
from memtool.settings import StreamSettings
from memtool.streams import create_stream
from memtool.streams.cuts import cut
from memtool.streams.table import Table
from memtool.streams.task import Images
from tests.streams.conftest import Folder


@pytest.fixture
def shop(table: Table) -> Table:
    """Two domains of four classes, of which every image holds its row number."""
    labels = np.arange(60) % 4
    return replace(table, labels=labels, class_names=("ant", "bee", "cat", "dog"))


def _rows(samples: Images) -> list[int]:
    return samples.images[:, 0, 0, 0].tolist()


def test_every_group_of_classes_comes_once_in_every_domain(shop: Table) -> None:
    tasks = cut(shop, StreamSettings(setting="vil")).tasks
    assert len(tasks) == 4
    assert {task.name.partition("@")[2] for task in tasks} == {"photo", "sketch"}
    for task in tasks:
        group, _, domain = task.name.partition("@")
        assert task.domain == domain
        assert group == "+".join(shop.class_names[one] for one in task.classes)
        rows = _rows(task.train) + _rows(task.test)
        assert {shop.domain_names[shop.domains[row]] for row in rows} == {domain}
        assert set(shop.labels[rows].tolist()) == set(task.classes)
    each = [row for task in tasks for row in _rows(task.train) + _rows(task.test)]
    assert sorted(each) == list(range(60))
    groups = [frozenset(task.classes) for task in tasks]
    assert len(set(groups)) == 2
    assert frozenset.union(*groups) == {0, 1, 2, 3}


def test_the_order_of_pairs_follows_the_seed_or_is_named(shop: Table) -> None:
    given = StreamSettings(setting="vil", class_order="given")

    def names(settings: StreamSettings) -> list[str]:
        return [task.name for task in cut(shop, settings).tasks]

    orders = {tuple(names(given.model_copy(update={"seed": seed}))) for seed in range(8)}
    pairs = [
        f"{group}@{domain}"
        for group, domain in itertools.product(("ant+bee", "cat+dog"), ("photo", "sketch"))
    ]
    assert len(orders) > 2
    assert all(sorted(order) == sorted(pairs) for order in orders)
    some = ("cat+dog@sketch", "ant+bee@photo")
    assert names(given.model_copy(update={"order": some})) == list(some)
    with pytest.raises(ConfigError, match="no task of toy") as error:
        names(given.model_copy(update={"order": ("cat+dog@skech",)}))
    assert "did you mean 'cat+dog@sketch'" in str(error.value)


def test_one_domain_is_cil_and_one_group_is_dil(shop: Table) -> None:
    def same(one: StreamSettings, other: StreamSettings, of: Table = shop) -> None:
        first, second = cut(of, one).tasks, cut(of, other).tasks
        assert [task.name for task in first] == [task.name for task in second]
        for left, right in zip(first, second, strict=True):
            assert (left.number, left.classes) == (right.number, right.classes)
            assert _rows(left.train) == _rows(right.train)
            assert _rows(left.test) == _rows(right.test)

    whole = StreamSettings(setting="vil", splits=1, order=("photo", "sketch"), train_per_task=8)
    same(whole, StreamSettings(setting="dil", train_per_task=8))
    alone = replace(shop, domains=np.zeros(60, dtype=np.int64), domain_names=("photo",))
    cil = StreamSettings(setting="cil", seed=3, validation=0.25)
    names = tuple(task.name for task in cut(alone, cil).tasks)
    same(cil.model_copy(update={"setting": "vil", "order": names}), cil, alone)


def test_domains_of_test_images_alone_test_those_of_training_images_alone(shop: Table) -> None:
    """As the published split of CORe50."""
    apart = replace(shop, is_test=shop.domains == 1)
    (dil,) = cut(apart, StreamSettings()).tasks
    assert (dil.name, len(dil.train), _rows(dil.test)) == ("photo", 30, list(range(30, 60)))
    for task in cut(apart, StreamSettings(setting="vil")).tasks:
        assert "@" not in task.name
        assert task.domain == "photo"
        wanted = [row for row in range(30, 60) if shop.labels[row] in task.classes]
        assert _rows(task.test) == wanted
    with pytest.raises(DataError, match="no test images"):
        cut(apart, StreamSettings(setting="dgcl"))


def test_mtl_has_a_task_a_domain_or_a_group_of_classes(shop: Table) -> None:
    of_domains = cut(shop, StreamSettings(setting="mtl"))
    assert [task.name for task in of_domains.tasks] == ["photo", "sketch"]
    of_classes = cut(shop, StreamSettings(setting="mtl", splits=2, class_order="given"))
    assert [task.name for task in of_classes.tasks] == ["ant+bee", "cat+dog"]
    flat = replace(shop, domains=None, domain_names=())
    assert len(cut(flat, StreamSettings(setting="mtl")).tasks) == 2


def test_dgcl_holds_a_domain_out_of_the_tasks(shop: Table) -> None:
    stream = cut(shop, StreamSettings(setting="dgcl", held_out="photo"))
    assert [(task.number, task.name) for task in stream.tasks] == [(2, "sketch")]
    assert stream.held_out is not None
    assert _rows(stream.held_out.test) == list(range(30))
    assert len(stream.held_out.train) == 0


def test_labels_that_come_again_under_cil_are_an_error_that_names_vil(shop: Table) -> None:
    twice = StreamSettings(setting="cil", order=("ant", "bee", "cat", "ant"))
    with pytest.raises(ConfigError, match="'ant' twice") as error:
        cut(shop, twice)
    assert error.value.expected == "every class once"
    assert "stream.setting=vil" in str(error.value.remedy)
    mended = twice.model_copy(update={"setting": "vil", "order": None})
    labels = [one for task in cut(shop, mended).tasks for one in task.classes]
    assert len(labels) > len(set(labels))


def test_vil_needs_domains(shop: Table) -> None:
    flat = replace(shop, domains=None, domain_names=())
    with pytest.raises(DataError, match="cannot be cut as vil") as error:
        cut(flat, StreamSettings(setting="vil"))
    assert "cil" in str(error.value.remedy)
    assert cut(flat, StreamSettings(setting="cil")).tasks


def test_core50_as_it_is_published(image_folder: Folder) -> None:
    """Sessions below train and test: every session is learned, those of test are tested on."""
    sessions = [f"train/{s}/{o}" for s in ("s1", "s2") for o in ("o1", "o10", "o2", "o3")]
    folder = image_folder([*sessions, *(f"test/s3/{o}" for o in ("o1", "o10", "o2", "o3"))], each=3)
    settings = StreamSettings(source=str(folder), setting="vil", splits=2, class_order="given")
    tasks = create_stream(settings, 16).tasks
    assert {(task.name, len(task.train), len(task.test)) for task in tasks} == {
        (f"{pair}@{session}", 6, 6) for pair in ("o1+o10", "o2+o3") for session in ("s1", "s2")
    }
