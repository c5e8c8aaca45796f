from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memtool.config import StreamSettings
from memtool.errors import DataError, NotFoundError
from memtool.streams import create_stream, open_table
from memtool.streams.sources import task_names

Folder = Callable[..., Path]


def test_domain_class_image(image_folder: Folder) -> None:
    root = image_folder(["photo/dog", "photo/cat", "sketch/dog", "sketch/cat"], each=10)
    stream = create_stream(StreamSettings(source=str(root)), 12)
    assert stream.name == "pictures"
    assert stream.class_names == ("cat", "dog")
    assert [task.name for task in stream.tasks] == ["photo", "sketch"]
    assert [len(task.train) for task in stream.tasks] == [16, 16]
    assert [len(task.test) for task in stream.tasks] == [4, 4]
    assert task_names(StreamSettings(source=str(root))) == ["photo", "sketch"]


def test_class_image(image_folder: Folder) -> None:
    root = image_folder(["ant", "bee", "cat", "dog"])
    stream = create_stream(StreamSettings(source=str(root), setting="cil"), 12)
    assert [len(task.classes) for task in stream.tasks] == [2, 2]
    with pytest.raises(DataError, match="has no domains"):
        create_stream(StreamSettings(source=str(root)), 12)


def test_train_and_test_on_top(image_folder: Folder) -> None:
    leaves = [f"{domain}/{one}" for domain in ("photo", "sketch") for one in ("cat", "dog")]
    image_folder([f"train/{leaf}" for leaf in leaves], each=6)
    root = image_folder([f"test/{leaf}" for leaf in leaves], each=3)
    stream = create_stream(StreamSettings(source=str(root)), 12)
    assert [len(task.train) for task in stream.tasks] == [12, 12]
    assert [len(task.test) for task in stream.tasks] == [6, 6]


def test_every_image_keeps_its_label_and_domain(image_folder: Folder) -> None:
    root = image_folder(["photo/dog", "photo/cat", "sketch/dog", "sketch/cat"], each=7)
    table = open_table(str(root), 12)
    assert table.domains is not None
    seen = {
        (image.tobytes(), table.domain_names[domain], table.class_names[label])
        for image, domain, label in zip(table.images, table.domains, table.labels, strict=True)
    }
    expected = set()
    for file in root.rglob("*.png"):
        pixels = np.asarray(Image.open(file).crop((2, 0, 14, 12)))
        expected.add((pixels.tobytes(), file.parts[-3], file.parts[-2]))
    assert seen == expected
    assert np.all(np.diff(table.domains) >= 0)


def test_other_files_and_hidden_ones_are_left_alone(image_folder: Folder) -> None:
    root = image_folder(["ant", "bee"])
    (root / "README.md").write_text("about")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "a.png").write_bytes(b"no image")
    assert len(open_table(str(root), 12)) == 10


def test_an_image_at_the_wrong_depth_is_named(image_folder: Folder) -> None:
    image_folder(["photo/dog", "photo/cat"])
    root = image_folder(["stray"], each=1)
    with pytest.raises(DataError, match=r"stray.00\.png") as error:
        open_table(str(root), 12)
    assert "domain/class/image" in str(error.value)


def test_images_without_any_folder(image_folder: Folder) -> None:
    root = image_folder(["."])
    with pytest.raises(DataError, match=r"00\.png"):
        open_table(str(root), 12)


def test_a_split_beside_domains(image_folder: Folder) -> None:
    root = image_folder(["train/dog", "val/dog"])
    with pytest.raises(DataError, match="train, val on top"):
        open_table(str(root), 12)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        open_table(str(tmp_path), 12)


def test_a_broken_image_is_named(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(["ant", "bee"])
    (root / "bee" / "03.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"bee.03\.png: not an image that can be read"):
        open_table(str(root), 12)
    # Nothing half-made stays behind.
    assert [file.suffix for file in (own_cache / "images").iterdir()] == [".lock"]


@pytest.mark.parametrize("source", ["pacss", "no/such/folder"])
def test_an_unknown_source_lists_what_there_is(source: str) -> None:
    with pytest.raises(NotFoundError, match=source) as error:
        create_stream(StreamSettings(source=source), 32)
    assert "digits" in str(error.value)
    if source == "pacss":
        assert "did you mean 'pacs'" in str(error.value)
