from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memtool.errors import DataError, NotFoundError
from memtool.settings import StreamSettings
from memtool.streams import create_stream, open_table
from memtool.streams.sources import task_names
from memtool_stores import limits

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


@pytest.mark.parametrize(
    ("training", "testing"),
    [("train", "test"), ("Train", "Test"), ("TRAINING", "testing"), ("train2017", "test_set")],
)
@pytest.mark.parametrize("below", ["{}", "photo/{}"])
def test_parts_are_known_by_name_whatever_their_case(
    image_folder: Folder, training: str, testing: str, below: str
) -> None:
    leaves = [below.format(one) for one in ("cat", "dog")]
    image_folder([f"{training}/{leaf}" for leaf in leaves], each=6)
    root = image_folder([f"{testing}/{leaf}" for leaf in leaves], each=3)
    table = open_table(str(root), 12)
    assert table.is_test.sum() == 6
    assert table.domain_names == (("photo",) if below != "{}" else ())
    assert table.notes[0].startswith(
        f"pictures: 18 images; for training: {training} (12); for testing: {testing} (6); "
    )


@pytest.mark.parametrize(
    ("tops", "said"),
    [
        (("train", "val"), "val is for validation"),
        (("train", "Test", "dev"), "dev is for validation"),
        (("train", "Training", "test"), "Training and train are both for training"),
        (("train", "test", "testing"), "test and testing are both for testing"),
        (("train", "test", "photo"), "train is for training, and photo no part"),
        (("photo", "test"), "test is for testing, and photo no part"),
        (("test",), "none for training"),
    ],
)
@pytest.mark.parametrize("below", ["dog", "photo/dog"])
def test_parts_that_leave_a_question_are_refused_by_name(
    image_folder: Folder, tops: tuple[str, ...], said: str, below: str
) -> None:
    root = image_folder([f"{top}/{below}" for top in tops])
    with pytest.raises(DataError, match=f"{', '.join(sorted(tops))} on top: .*{said}") as caught:
        open_table(str(root), 12)
    assert "kind: folder" in str(caught.value)


def test_a_description_says_which_folders_are_parts(image_folder: Folder) -> None:
    leaves = [f"{top}/{one}" for top in ("train", "val", "extra") for one in ("cat", "dog")]
    root = image_folder(leaves, each=3)
    file = root.parent / "mine.yaml"
    for said, is_test in [
        ("train: [train, extra]\ntest: val", 6),
        ("train: train\ntest: [val, extra]", 12),
        ("test: val", 6),
        ("domain_names: [val, train, extra]", 0),
    ]:
        file.write_text(f"kind: folder\npath: {root.name}\n{said}\n")
        table = open_table(str(file), 12)
        assert table.is_test.sum() == is_test
    assert table.domain_names == ("val", "train", "extra")
    file.write_text(f"kind: folder\npath: {root.name}\ntrain: trian\n")
    with pytest.raises(DataError, match="no folder 'trian'"):
        open_table(str(file), 12)


def test_classes_called_as_a_part_are_classes(image_folder: Folder) -> None:
    assert open_table(str(image_folder(["train", "car"])), 12).class_names == ("car", "train")
    root = image_folder(["cat/train", "cat/test", "dog/train"], name="turned")
    with pytest.raises(DataError, match="test, train where its classes would be") as caught:
        open_table(str(root), 12)
    assert "train and test on top" in str(caught.value)


def test_what_is_left_out_is_counted_by_what_it_is(image_folder: Folder) -> None:
    root = image_folder(["ant", "bee"])
    (root / "ant" / ".DS_Store").write_text("")
    assert len(open_table(str(root), 12).notes) == 1  # hidden files alone are not worth a sentence
    for name in ("1.HEIC", "2.heic", "notes.txt", "README"):
        (root / "ant" / name).write_text("")
    (root / "ant" / "lost.png").symlink_to("nowhere.png")
    (root / "ant" / "self.png").symlink_to("self.png")
    (root / "ant" / "up").symlink_to("..")
    os.mkfifo(root / "bee" / "pipe.png")
    (root / "bee" / "AN IMAGE.PNG").write_bytes((root / "bee" / "00.png").read_bytes())
    (root / "bee" / "linked.png").symlink_to("00.png")
    table = open_table(str(root), 12)
    assert len(table) == 12
    counted = set(table.notes[1].removeprefix("pictures: left out: ").split(", "))
    assert counted == {
        *(".heic (2)", ".txt (1)", "without suffix (1)", "hidden (1)", "pipes and devices (1)"),
        *("links that lead nowhere (2)", "links to folders that are read already (1)"),
    }


def test_linked_folders_are_read_once(image_folder: Folder) -> None:
    elsewhere = image_folder(["ant", "bee"], name="elsewhere")
    root = image_folder(["cat"])
    (root / "ant").symlink_to(elsewhere / "ant")
    (root / "again").symlink_to(elsewhere / "ant")
    table = open_table(str(root), 12)
    assert table.class_names in (("ant", "cat"), ("again", "cat"))
    assert "links to folders that are read already (1)" in table.notes[1]
    # Folders that all link to each other would be a walk without an end.
    for one in "abcdefgh":
        (root / one).mkdir()
        for other in "abcdefgh":
            (root / one / f"to {other}").symlink_to(f"../{other}")
    assert len(open_table(str(root), 12)) == len(table)


def test_the_same_image_in_training_and_test_is_counted(
    image_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    leaves = ["Train/cat", "Train/dog", "test/cat", "test/dog"]
    root = image_folder(leaves, each=6)
    again = root / "test" / "cat" / "again.bmp"  # other bytes, the same pixels
    Image.open(root / "Train" / "dog" / "03.png").save(again)
    settings = StreamSettings(source=str(root), setting="cil")
    for _ in range(2):  # from the images, and from the cache
        stream = create_stream(settings, 12)
        said = "pictures: 1 of 13 test images are also among the training images, pixel by pixel"
        assert stream.notes[-1] == said
        assert said in caplog.text
        caplog.clear()
    again.unlink()
    assert "pixel by pixel" not in " ".join(create_stream(settings, 12).notes)


def test_drawn_test_images_are_compared_as_well(image_folder: Folder) -> None:
    root = image_folder(["cat", "dog"], each=10)
    for file in list((root / "cat").iterdir()):
        (root / "cat" / f"copy of {file.name}").write_bytes(file.read_bytes())
    notes = create_stream(StreamSettings(source=str(root), setting="cil"), 12).notes
    assert "of 6 test images are also among" in notes[-1]


def test_names_that_differ_only_in_case_or_white_space_are_said(image_folder: Folder) -> None:
    root = image_folder(["photo/Cat", "photo/cat ", "photo/dog", "Photo/Cat", "Photo/dog"])
    notes = create_stream(StreamSettings(source=str(root)), 12).notes
    assert any("classes that differ only in case" in n and "'Cat', 'cat '" in n for n in notes)
    assert any("domains that differ only in case" in note for note in notes)


def test_a_whole_disk_is_no_data_set(image_folder: Folder) -> None:
    with pytest.raises(DataError, match="/ is a whole file system"):
        open_table("/", 12)
    root = image_folder(["ant", "bee"])
    before = limits.current()
    try:
        limits.use(replace(before, data_files=11))
        with pytest.raises(DataError, match="pictures and below: 12 files") as caught:
            open_table(str(root), 12)
        assert "limits.data_files" in str(caught.value)
        limits.use(replace(before, data_files=12))
        assert len(open_table(str(root), 12)) == 10
    finally:
        limits.use(before)


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(image_folder: Folder) -> None:
    root = image_folder(["ant", "bee"])
    (root / "ant").chmod(0)
    try:
        if os.access(root / "ant", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(DataError, match="ant: cannot be listed"):
            open_table(str(root), 12)
    finally:
        (root / "ant").chmod(0o755)


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


def test_an_unknown_source_lists_what_there_is() -> None:
    with pytest.raises(NotFoundError, match="pacss") as error:
        create_stream(StreamSettings(source="pacss"), 32)
    assert "digits" in str(error.value)
    assert "did you mean 'pacs'" in str(error.value)
