"""The data sets of MEMTOOL_DATA, through the descriptions that ship with memtool."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memtool.settings import StreamSettings
from memtool.streams import cache, create_stream, open_table
from memtool.streams.description import read_description
from memtool.streams.sources import built_in_descriptions

LOCAL = sorted(
    name
    for name, file in built_in_descriptions().items()
    if (described := read_description(file)).kind == "parquet"
    and "${MEMTOOL_DATA}" in described.path
)


def test_pacs_as_four_domains(real_data: Path) -> None:
    stream = create_stream(StreamSettings(source="pacs"), 64)
    assert [task.name for task in stream.tasks] == ["photo", "art_painting", "cartoon", "sketch"]
    assert sum(len(task.train) for task in stream.tasks) == 7968
    assert sum(len(task.test) for task in stream.tasks) == 2023
    assert len(stream.class_names) == 7
    for task in stream.tasks:
        assert task.classes == tuple(range(7))
        # Any leading part of a task is a fair sample.
        assert len(set(task.train.labels[:100])) == 7
        assert len(set(task.test.labels[:100])) == 7


def test_a_warm_cache_decodes_nothing(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = create_stream(StreamSettings(source="pacs"), 64)
    monkeypatch.setattr(cache, "decode_square", None)
    again = create_stream(StreamSettings(source="pacs"), 64)
    for one, other in zip(first.tasks, again.tasks, strict=True):
        assert np.array_equal(one.train.images, other.train.images)
        assert np.array_equal(one.test.labels, other.test.labels)


def test_pacs_keeps_every_label_with_its_image(real_data: Path) -> None:
    import pyarrow.parquet

    table = open_table("pacs", 64)
    assert table.domains is not None
    rows = pyarrow.parquet.read_table(real_data / "pacs" / "test.parquet").to_pylist()[::50]
    index = {image.tobytes(): place for place, image in enumerate(table.images)}
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        assert pixels.shape == (64, 64, 3)
        place = index[pixels.tobytes()]
        assert table.labels[place] == row["label"]
        assert table.domains[place] == row["domain"]


def test_cifar100_as_twenty_tasks(real_data: Path) -> None:
    settings = StreamSettings(source="cifar100", setting="cil", classes_per_task=5)
    stream = create_stream(settings, 32)
    assert len(stream.tasks) == 20
    for task in stream.tasks:
        assert (len(task.train), len(task.test)) == (500, 100)
        assert set(task.train.labels) == set(task.classes)
    assert stream.fingerprint == create_stream(settings, 32).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
def test_every_local_description_opens(real_data: Path, name: str) -> None:
    table = open_table(name, 16)
    assert len(table) > 100
    assert len(np.unique(table.labels)) == len(table.class_names)
    if name == "omniglot":
        assert len(table.class_names) == 1623
        assert len(table) == 32460
