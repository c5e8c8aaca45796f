"""Descriptions of domains: folders in the published order, and data sets joined by class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from memtool.config import resolve
from memtool.errors import DataError, NotFoundError
from memtool.settings import StreamSettings
from memtool.streams import create_stream, open_table
from memtool.streams.description import read_description
from memtool.streams.sources import built_in_descriptions, task_names

Folder = Callable[..., Path]

# What each stream of domains is called, in the order in which it is learned.
PUBLISHED = {
    "vlcs": ("VLCS", ("Caltech101", "LabelMe", "SUN09", "VOC2007")),
    "core50": ("core50_128x128", tuple(f"s{number}" for number in range(1, 12))),
    "dn4il": ("dn4il", ("real", "clipart", "infograph", "painting", "sketch", "quickdraw")),
    "cddb": ("cddb", ("gaugan", "biggan", "wild", "whichfaceisreal", "san")),
}


def join(folder: Path, *members: str) -> str:
    """A description that joins folders of images, which lie beside it."""
    for member in members:
        (folder / f"{member}.yaml").write_text(yaml.safe_dump({"kind": "folder", "path": member}))
    file = folder / "joined.yaml"
    sources = [f"{member}.yaml" for member in members]
    file.write_text(yaml.safe_dump({"kind": "join", "sources": sources}))
    return str(file)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_is_cut_into_its_published_domains(
    name: str, tmp_path: Path, image_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, domains = PUBLISHED[name]
    assert read_description(built_in_descriptions()[name]).domain_names == domains
    leaves = [f"{domain}/{one}" for domain in domains for one in ("ant", "bee")]
    image_folder(leaves, name=place)
    monkeypatch.setenv("MEMTOOL_DATA", str(tmp_path))
    stream = create_stream(StreamSettings(source=name), 12)
    assert tuple(task.name for task in stream.tasks) == domains
    assert task_names(StreamSettings(source=name)) == list(domains)
    assert {(len(task.train), len(task.test)) for task in stream.tasks} == {(8, 2)}


def test_the_published_split_of_core50_in_classes(
    tmp_path: Path, image_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = [f"o{number}" for number in range(1, 5)]
    sessions = {
        f"s{number}": "test" if number in (3, 7, 10) else "train" for number in range(1, 12)
    }
    image_folder(
        [f"{split}/{session}/{one}" for session, split in sessions.items() for one in objects],
        name="core50_128x128",
        each=2,
    )
    monkeypatch.setenv("MEMTOOL_DATA", str(tmp_path))
    stream = create_stream(StreamSettings(source="core50", setting="cil", classes_per_task=2), 12)
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(32, 12), (32, 12)]


def test_a_folder_that_is_no_domain_of_the_description(
    tmp_path: Path, image_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(["SUN09/ant", "LabelMee/ant"], name="VLCS")
    monkeypatch.setenv("MEMTOOL_DATA", str(tmp_path))
    with pytest.raises(DataError, match="'LabelMee' is no domain") as error:
        open_table("vlcs", 12)
    assert "did you mean 'LabelMe'" in str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_data_that_is_not_there_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMTOOL_DATA", str(tmp_path))
    with pytest.raises(NotFoundError, match=f"there is no folder .*{PUBLISHED[name][0]}"):
        open_table(name, 12)


def test_a_join_keeps_every_label_with_its_image(tmp_path: Path, image_folder: Folder) -> None:
    leaves = ["train/ant", "train/bee", "test/ant", "test/bee"]
    image_folder(leaves, name="first")
    image_folder(leaves[::-1], name="second", each=3)
    source = join(tmp_path, "first", "second")
    table = open_table(source, 12)
    assert table.class_names == ("ant", "bee")
    assert table.domain_names == ("first", "second")
    assert task_names(StreamSettings(source=source)) == ["first", "second"]
    assert table.domains is not None
    for domain, name in enumerate(table.domain_names):
        alone = open_table(str(tmp_path / f"{name}.yaml"), 12)
        rows = table.domains == domain
        assert table.is_test[rows].sum() == alone.is_test.sum()
        found = {
            image.tobytes(): label for image, label in zip(alone.images, alone.labels, strict=True)
        }
        for image, label in zip(table.images[rows], table.labels[rows], strict=True):
            assert found[image.tobytes()] == label


def test_a_join_and_a_chain_are_not_taken_for_each_other(
    tmp_path: Path, image_folder: Folder
) -> None:
    for name in ("first", "second"):
        image_folder(["ant", "bee"], name=name)
    source = join(tmp_path, "first", "second")
    assert len(open_table(source, 12).class_names) == 2
    file = Path(source)
    file.write_text(file.read_text().replace("kind: join", "kind: chain"))
    assert len(open_table(source, 12).class_names) == 4


def test_data_sets_of_other_classes_are_not_joined(tmp_path: Path, image_folder: Folder) -> None:
    image_folder(["ant", "bee"], name="first")
    image_folder(["ant", "cat"], name="second")
    with pytest.raises(DataError, match="second and first differ in their classes: bee, cat"):
        open_table(join(tmp_path, "first", "second"), 12)


def test_idigits_are_four_domains_of_ten_digits(real_data: Path) -> None:
    stream = create_stream(StreamSettings(source="idigits"), 28)
    sizes = {task.name: (len(task.train), len(task.test)) for task in stream.tasks}
    assert sizes == {
        "mnist": (5000, 1000),
        "mnist_m": (3000, 600),
        "usps": (7291, 2007),
        "optdigits": (3823, 1797),
    }
    assert stream.class_names == tuple("0123456789")
    for task in stream.tasks:
        assert task.classes == tuple(range(10))
    # The same rows as the data set alone has, with the same labels.
    alone = open_table("mnist", 28)
    mnist = stream.tasks[0]
    expected = {
        image.tobytes(): label for image, label in zip(alone.images, alone.labels, strict=True)
    }
    for image, label in zip(mnist.train.images[::97], mnist.train.labels[::97], strict=True):
        assert expected[image.tobytes()] == label
    assert len(np.unique(mnist.test.labels)) == 10


@pytest.mark.parametrize("preset", ["mira-dil", "mira-dg", "mira-dg-authors"])
def test_presets_of_domains_take_another_source(preset: str, real_data: Path) -> None:
    changed = {"stream.source": "idigits"}
    config = resolve(preset=preset, overrides=changed, environ={}).config
    stream = create_stream(config.stream, 28)
    assert [task.name for task in stream.tasks] == ["mnist", "mnist_m", "usps", "optdigits"]
    config = resolve(preset=preset, environ={}).config
    stream = create_stream(config.stream, 64)
    assert [task.name for task in stream.tasks] == ["photo", "art_painting", "cartoon", "sketch"]
