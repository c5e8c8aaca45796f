"""A chain of data sets as a stream (setting xtail): one task a data set, a union of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from memtool.errors import ConfigError, NotFoundError
from memtool.settings import StreamSettings
from memtool.streams import Stream, create_stream, open_table
from memtool.streams.prompts import DEFAULT_TEMPLATE, prompt, prompts
from memtool.streams.sources import task_names

Folder = Callable[..., Path]
Chain = Callable[..., str]


@pytest.fixture
def chain(tmp_path: Path, image_folder: Folder) -> Chain:
    """Two described folders, `pets` (with a test part) and `zoo` (without), and a chain of them."""
    parts = [f"{part}/{name}" for part in ("train", "test") for name in ("dog", "big_cat")]
    image_folder(parts, each=6, name="pictures of pets")
    image_folder(["dog", "emu", "yak"], each=10, name="pictures of zoo")
    for name in ("pets", "zoo"):
        content = {"kind": "folder", "path": f"pictures of {name}"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def make(**changes: object) -> str:
        content = {"kind": "chain", "sources": ["pets.yaml", "zoo.yaml"], **changes}
        (tmp_path / "both.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "both.yaml")

    return make


def opened(source: str, **settings: object) -> Stream:
    return create_stream(StreamSettings(source=source, setting="xtail", **settings), 8)


def test_every_data_set_is_a_task_over_the_union_of_classes(chain: Chain) -> None:
    stream = opened(chain())
    pets, zoo = stream.tasks
    assert (stream.name, stream.setting) == ("both", "xtail")
    assert (pets.name, zoo.name) == ("pets", "zoo")
    # A name that both have is told apart, others stay as they are.
    assert stream.class_names == ("big_cat", "dog (pets)", "dog (zoo)", "emu", "yak")
    assert pets.classes == (0, 1)
    assert zoo.classes == (2, 3, 4)
    for task in stream.tasks:
        for part in (task.train, task.test):
            assert set(part.labels.tolist()) == set(task.classes)
            assert part.images.shape[1:] == (8, 8, 3)


def test_a_data_set_without_a_test_part_gives_a_fifth(chain: Chain) -> None:
    pets, zoo = opened(chain()).tasks
    assert (len(pets.train), len(pets.test)) == (12, 12)
    assert (len(zoo.train), len(zoo.test)) == (24, 6)


def test_images_and_labels_are_those_of_the_members(chain: Chain, tmp_path: Path) -> None:
    stream = opened(chain())
    for task in stream.tasks:
        table = open_table(str(tmp_path / f"{task.name}.yaml"), 8)
        index = {image.tobytes(): table.class_names[label]
                 for image, label in zip(table.images, table.labels, strict=True)}  # fmt: skip
        for part in (task.train, task.test):
            for image, label in zip(part.images, part.labels, strict=True):
                name = stream.class_names[label]
                assert index[image.tobytes()] == name.removesuffix(f" ({task.name})")


def test_shots_are_so_many_of_every_class_and_nested(chain: Chain) -> None:
    source = chain()
    few, more = opened(source, shots=2), opened(source, shots=3)
    for small, large in zip(few.tasks, more.tasks, strict=True):
        assert np.bincount(small.train.labels).tolist()[-2:] == [2, 2]
        known = {image.tobytes() for image in large.train.images}
        assert {image.tobytes() for image in small.train.images} <= known
        assert np.array_equal(small.test.images, large.test.images)
    assert few.fingerprint != more.fingerprint != opened(source).fingerprint


def test_the_fingerprint_is_that_of_data_and_cut_not_of_prompts(chain: Chain) -> None:
    first = opened(chain())
    again = opened(chain(prompts={"zoo": "a {} in a zoo."}))
    assert again.fingerprint == first.fingerprint
    assert opened(chain(sources=["zoo.yaml", "pets.yaml"])).fingerprint != first.fingerprint
    assert opened(chain(), order=("zoo", "pets")).fingerprint != first.fingerprint


def test_an_order_names_the_data_sets(chain: Chain) -> None:
    stream = opened(chain(), order=("zoo",))
    assert [task.name for task in stream.tasks] == ["zoo"]
    assert len(stream.class_names) == 5
    assert task_names(StreamSettings(source=chain(), setting="xtail")) == ["pets", "zoo"]


def test_prompts_follow_the_template_of_the_data_set(chain: Chain) -> None:
    stream = opened(chain(prompts={"zoo": "a {} in a zoo."}))
    assert [task.prompt for task in stream.tasks] == [DEFAULT_TEMPLATE, "a {} in a zoo."]
    assert prompts(stream) == (
        "a photo of a big cat.",
        "a photo of a dog (pets).",
        "a dog (zoo) in a zoo.",
        "a emu in a zoo.",
        "a yak in a zoo.",
    )


def test_underscores_and_braces_in_class_names() -> None:
    assert prompt("a photo of a {}.", "yin__yang_") == "a photo of a yin yang."
    assert prompt("a photo of a {}.", "C{0}_{}") == "a photo of a C{0} {}."


def test_wrong_chains_are_told(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names 'pets' twice"):
        opened(chain(sources=["pets.yaml", "pets.yaml"]))
    with pytest.raises(ConfigError, match=r"prompts names 'zoos'(.|\n)*zoo"):
        opened(chain(prompts={"zoos": "a {}"}))
    with pytest.raises(ConfigError, match=r"prompt of 'zoo' is 'a zoo'(.|\n)*one \{\}"):
        opened(chain(prompts={"zoo": "a zoo"}))
    with pytest.raises(ConfigError, match="'sources' is missing"):
        opened(chain(sources=[]))
    with pytest.raises(ConfigError, match="kind chain has no path"):
        opened(chain(path="pictures"))
    with pytest.raises(NotFoundError, match="no data source 'absent'"):
        opened(chain(sources=["absent"]))
    (tmp_path / "long.yaml").write_text("kind: chain\nsources: [both.yaml]\n")
    chain()
    with pytest.raises(ConfigError, match="a chain itself"):
        opened(str(tmp_path / "long.yaml"))
    with pytest.raises(ConfigError, match=r"names 'zo'(.|\n)*'zoo'"):
        opened(chain(), order=("zo",))


def test_seven_real_data_sets(real_data: Path) -> None:
    stream = create_stream(StreamSettings(source="xtail_small", setting="xtail", shots=16), 16)
    assert [task.name for task in stream.tasks] == [
        "caltech101", "dtd10", "eurosat", "cars20", "mnist", "scenes15", "pacs",
    ]  # fmt: skip
    assert [len(task.classes) for task in stream.tasks] == [101, 10, 10, 20, 10, 15, 7]
    assert len(stream.class_names) == 173 == len(set(prompts(stream)))
    twice = {name for name in stream.class_names if name.endswith(")")}
    assert twice == {
        *(f"{name} ({data})" for name in ("Forest", "Highway", "Industrial")
          for data in ("eurosat", "scenes15")),
        "elephant (caltech101)", "elephant (pacs)",
    }  # fmt: skip
    for task in stream.tasks:
        assert np.bincount(task.train.labels).max() == 16
    seen = [hashlib.sha256(image.tobytes()).digest() for image in stream.tasks[4].train.images]
    assert len(set(seen)) > 150
